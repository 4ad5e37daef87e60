"""The judges of photographs, as the paper's protocol has them: ID, CLIP, AE, IR, FCS, FFC."""

from collections.abc import Callable
from dataclasses import dataclass

from fastface_trt.evaluation.clip_judges import (
    AESTHETIC_HEAD,
    CLIP_L,
    AestheticJudge,
    ClipJudge,
    ClipView,
    FaceClipJudge,
)
from fastface_trt.evaluation.face_judges import (
    FaceView,
    IdentityJudge,
    NoFaceJudge,
    OtherPeopleJudge,
)
from fastface_trt.evaluation.judges import Judge, choose_judges
from fastface_trt.evaluation.reward_judge import MODEL, RewardJudge
from fastface_trt.export.checkpoints import HubItem
from fastface_trt.runtime.face import FaceAnalyzer


@dataclass(frozen=True)
class JudgeWeights:
    """Where the judges' weights are: hub items or local paths; the paper's by default."""

    face_model: str = "buffalo_l"
    clip: HubItem = CLIP_L
    aesthetic_head: HubItem = AESTHETIC_HEAD
    image_reward: str = MODEL


def real_judges(
    weights: JudgeWeights, names: list[str] | None, *, licence_acknowledged: bool
) -> list[Judge]:
    """The judges of `names`, None: all. Nothing is loaded, and no face model without its licence.

    Raises `UnknownName`, and for those that look at faces what `FaceAnalyzer` raises.
    """
    clip = ClipView(weights.clip)
    views: list[FaceView] = []

    def view() -> FaceView:
        if not views:
            analyzer = FaceAnalyzer(weights.face_model, licence_acknowledged=licence_acknowledged)
            views.append(FaceView(analyzer))
        return views[0]

    makers: dict[str, Callable[[], Judge]] = {
        "id": lambda: IdentityJudge(view()),
        "id_other": lambda: OtherPeopleJudge(view()),
        "clip": lambda: ClipJudge(clip),
        "ae": lambda: AestheticJudge(clip, weights.aesthetic_head),
        "ir": lambda: RewardJudge(weights.image_reward),
        "fcs": lambda: FaceClipJudge(clip, view()),
        "ffc": lambda: NoFaceJudge(view()),
    }
    return [make() for make in choose_judges(makers, names)]
