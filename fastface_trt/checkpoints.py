"""The registry of checkpoints: weights, sampler, steps and size that belong together.

Importable without torch, so that the command line can list it. Revisions are commit hashes of the
hub repositories, so an export is reproducible; `--base` takes other weights, and `ID@REVISION`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastface_trt.engines.manifest import AdapterKind
from fastface_trt.errors import UnknownName
from fastface_trt.mini import folders

OPENRAIL_PP = "CreativeML Open RAIL++-M"
FACEID_LICENCE = "non-commercial research (InsightFace embeddings)"


@dataclass(frozen=True)
class HubItem:
    """A hub repository, or one file or folder of it, at a pinned revision; or a local path."""

    location: str
    revision: str | None = None
    path: str | None = None
    licence: str = "unknown"


SDXL_BASE = HubItem(
    "stabilityai/stable-diffusion-xl-base-1.0",
    "462165984030d82259a11f4367a4eed129e94a7b",
    licence=OPENRAIL_PP,
)
FACEID_PLUS_V2 = HubItem(
    "h94/IP-Adapter-FaceID",
    "43907e6f44d079bf1a9102d9a6e56aef7a219bae",
    "ip-adapter-faceid-plusv2_sdxl.bin",
    FACEID_LICENCE,
)
FACEID = HubItem(
    "h94/IP-Adapter-FaceID",
    "d638c8c2e4dafedfb9dc6f6b502b9ab71b22406f",
    "ip-adapter-faceid_sdxl.bin",
    FACEID_LICENCE,
)
FACEID_PORTRAIT = HubItem(
    "h94/IP-Adapter-FaceID",
    "43907e6f44d079bf1a9102d9a6e56aef7a219bae",
    "ip-adapter-faceid-portrait_sdxl.bin",
    FACEID_LICENCE,
)
FACEID_PORTRAIT_UNNORM = HubItem(
    "h94/IP-Adapter-FaceID",
    "43907e6f44d079bf1a9102d9a6e56aef7a219bae",
    "ip-adapter-faceid-portrait_sdxl_unnorm.bin",
    FACEID_LICENCE,
)
PULID = HubItem(
    "guozinan/PuLID",
    "d58b3ba191be1280c37ace0656a2e65cd9b8c8d8",
    "pulid_v1.1.safetensors",
    "Apache-2.0, with face embeddings for non-commercial research (InsightFace antelopev2)",
)
ADAPTERS: Mapping[AdapterKind, HubItem] = {
    "faceid-plus-v2": FACEID_PLUS_V2,
    "faceid": FACEID,
    "faceid-portrait": FACEID_PORTRAIT,
    "faceid-portrait-unnorm": FACEID_PORTRAIT_UNNORM,
    "pulid": PULID,
}
"""The published adapters for SDXL, by the name that `--adapter` takes."""
FACE_MODELS: Mapping[AdapterKind, str] = {
    "faceid-plus-v2": "buffalo_l",
    "faceid": "buffalo_l",
    "faceid-portrait": "buffalo_l",
    "faceid-portrait-unnorm": "buffalo_l",
    "pulid": "antelopev2",
}
"""InsightFace's packs whose embeddings the adapters were trained with."""
CLIP_VIT_H = HubItem(
    "h94/IP-Adapter",
    "018e402774aeeddd60609b4ecdb7e298259dc729",
    "models/image_encoder",
    "Apache-2.0",
)
EVA02_CLIP_L = HubItem(
    "QuanSun/EVA-CLIP",
    "690a5975ca06e9a43d16bae440dd08213bfff0c5",
    "EVA02_CLIP_L_336_psz14_s6B.pt",
    "MIT",
)
FP16_VAE = HubItem(
    "madebyollin/sdxl-vae-fp16-fix", "207b116dae70ace3637169f1ddd2434b91b3a8cd", licence="MIT"
)
TINY_VAE = HubItem("madebyollin/taesdxl", None, licence="MIT")


@dataclass(frozen=True)
class Checkpoint:
    """One distilled (or base) SDXL checkpoint with the schedule that it was made for.

    `unet` and `lora` may hold `{steps}` in their path: Hyper and Lightning ship one file per number
    of steps. Where both are there, `unet` is for the base itself and `lora` for another one.
    `distilled_base`: the base itself is what was distilled, and nothing does it to another one.
    `size` is the side of the square picture in pixels. `image_encoder` is what a FaceID-Plus-v2
    adapter looks with. `fp16_vae` stands in for the base's own VAE where that overflows.
    """

    name: str
    base: HubItem
    scheduler: Mapping[str, Any]
    steps: int
    allowed_steps: tuple[int, ...]
    size: int
    unet: HubItem | None = None
    lora: HubItem | None = None
    lora_scale: float = 1.0
    distilled_base: bool = False
    adapter: HubItem = FACEID_PLUS_V2
    image_encoder: HubItem = CLIP_VIT_H
    fp16_vae: HubItem | None = FP16_VAE
    face_model: str | None = None
    """Name of an InsightFace pack, or a folder that is copied into the export; None is the pack
    that the adapter was trained with."""


_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
_DDIM = {
    "class": "DDIMScheduler",
    **_NOISE,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
}
_EULER = {"class": "EulerDiscreteScheduler", **_NOISE, "timestep_spacing": "trailing"}
_EULER_ANCESTRAL = {**_EULER, "class": "EulerAncestralDiscreteScheduler"}
_LCM = {
    "class": "LCMScheduler",
    **_NOISE,
    "original_inference_steps": 50,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
}


MINI = Checkpoint(
    "mini",
    HubItem(str(folders.CHECKPOINT), licence="Apache-2.0"),
    _DDIM,
    steps=4,
    allowed_steps=(1, 2, 3, 4, 8),
    size=96,
    adapter=HubItem(str(folders.ADAPTER), licence="Apache-2.0"),
    image_encoder=HubItem(str(folders.IMAGE_ENCODER), licence="Apache-2.0"),
    fp16_vae=None,
    face_model=str(folders.FACE_MODEL),
)

CHECKPOINTS: Mapping[str, Checkpoint] = {
    c.name: c
    for c in (
        Checkpoint(
            "hyper",
            SDXL_BASE,
            _DDIM,
            steps=4,
            allowed_steps=(1, 2, 4, 8),
            size=1024,
            lora=HubItem(
                "ByteDance/Hyper-SD",
                "bc08d970a87c74c71209491d64e3525845698863",
                "Hyper-SDXL-{steps}step{plural}-lora.safetensors",
                OPENRAIL_PP,
            ),
        ),
        Checkpoint(
            "lightning",
            SDXL_BASE,
            _EULER,
            steps=4,
            allowed_steps=(2, 4, 8),
            size=1024,
            unet=HubItem(
                "ByteDance/SDXL-Lightning",
                "c9a24f48e1c025556787b0c58dd67a091ece2e44",
                "sdxl_lightning_{steps}step_unet.safetensors",
                OPENRAIL_PP,
            ),
            lora=HubItem(
                "ByteDance/SDXL-Lightning",
                "c9a24f48e1c025556787b0c58dd67a091ece2e44",
                "sdxl_lightning_{steps}step_lora.safetensors",
                OPENRAIL_PP,
            ),
        ),
        Checkpoint(
            "lcm",
            SDXL_BASE,
            _LCM,
            steps=4,
            allowed_steps=tuple(range(2, 9)),
            size=1024,
            lora=HubItem(
                "latent-consistency/lcm-lora-sdxl",
                "a18548dd4956b174ec5b0d78d340c8dae0a129cd",
                "pytorch_lora_weights.safetensors",
                OPENRAIL_PP,
            ),
        ),
        Checkpoint(
            "turbo",
            HubItem(
                "stabilityai/sdxl-turbo",
                "71153311d3dbb46851df1931d3ca6e939de83304",
                licence="Stability AI non-commercial research community licence",
            ),
            _EULER_ANCESTRAL,
            steps=4,
            allowed_steps=(1, 2, 3, 4),
            size=512,
            distilled_base=True,
        ),
        Checkpoint(
            "base", SDXL_BASE, _DDIM, steps=30, allowed_steps=tuple(range(1, 101)), size=1024
        ),
        MINI,
    )
}


def find_checkpoint(name: str) -> Checkpoint:
    """The registry's entry for `name`; raises `UnknownName` with the nearest one."""
    if name not in CHECKPOINTS:
        raise UnknownName("checkpoint", name, CHECKPOINTS)
    return CHECKPOINTS[name]
