"""What every peer is given, what it returns, and how a peer is called."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt.runtime.face import Face
from fastface_trt.runtime.presets import preset_fields
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import INITIAL_LATENTS, standard_noise


@dataclass(frozen=True)
class Work:
    """One picture to make: a preset's request, the analysed face and the shape of the latents."""

    preset: str
    request: GenerationRequest
    face: Face
    latent_shape: tuple[int, int, int]

    def with_preset(self, preset: str) -> "Work":
        """The same picture with another preset's guidance and manipulation."""
        plain = GenerationRequest(self.request.prompt)
        fields = {name: getattr(plain, name) for name in ("alpha", "beta", "guidance_rescale")}
        fields |= {"manipulation": plain.manipulation} | preset_fields(preset, self.request.steps)
        return replace(self, preset=preset, request=replace(self.request, **fields))

    @property
    def guided(self) -> bool:
        """Whether any step combines branches; without it diffusers, too, evaluates only one."""
        full = replace(self.request, plan="exact").guidance_steps()
        return any(len(step.branches) > 1 for step in full)

    def initial_noise(self) -> NDArray[np.float32]:
        """The noise that every peer starts from, [1,C,h,w]."""
        seed, image_index = self.request.seed, self.request.image_index
        return standard_noise(seed, image_index, INITIAL_LATENTS, self.latent_shape)[None]


@dataclass(frozen=True)
class Made:
    """A finished picture and its final latents [C,h,w]."""

    picture: Image.Image
    latents: NDArray[np.float32]


class Peer(Protocol):
    """One way of making the picture."""

    name: str
    label: str

    def work(self, work: Work) -> Work:
        """The work that it really does where it cannot do all of it; else the work itself."""
        ...

    def unet_samples(self, work: Work) -> int:
        """UNet samples that it evaluates per picture."""
        ...

    def prepare(self, work: Work) -> float | None:
        """Do once what the first picture needs (compile, export); seconds, None for nothing."""
        ...

    def before(self) -> None:
        """Called before every picture, outside the measured time."""
        ...

    def picture(self, work: Work) -> Image.Image:
        """Make the picture; this is what is measured."""
        ...

    def made(self, work: Work) -> Made:
        """Make the picture and keep its latents, for comparing."""
        ...


class Unready(Exception):
    """A peer that cannot run here, with the reason in one sentence."""


def one_line(error: BaseException) -> str:
    """The first line of an error, for a table."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


def versions(packages: Sequence[str]) -> dict[str, Any]:
    """Installed versions by package."""
    from importlib.metadata import version

    return {name: version(name) for name in packages}
