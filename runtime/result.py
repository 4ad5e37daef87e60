"""What a generation returns: pictures, the requests that made them, and the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from fastface_trt.runtime.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Pictures of one call, in the order of the requests.

    images: PIL RGB pictures. requests: what made each. parameters: per picture what `write_picture`
    stores. seconds: wall-clock time per stage (`face`, `text`, `unet`, `vae`, `total`).
    unet_samples: rows evaluated in all; branches: per picture and step the branches that ran.
    warnings: what was changed or cut, in sentences.
    """

    images: list[Image.Image]
    requests: list[GenerationRequest]
    parameters: list[Mapping[str, Any]]
    seconds: Mapping[str, float]
    unet_samples: int
    branches: list[list[tuple[str, ...]]]
    warnings: list[str] = field(default_factory=list)
