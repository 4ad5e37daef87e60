"""A request as one export makes it: its size and steps where the caller names none, and its limits.

It needs nothing but the manifest, so a server checks requests before any engine is asked.
"""

from typing import Any

from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.presets import preset_fields
from fastface_trt.runtime.request import GenerationRequest


def request_for(
    manifest: ExportManifest,
    prompt: str,
    *,
    preset: str = "plain",
    steps: int | None = None,
    **fields: Any,
) -> GenerationRequest:
    """A request with the export's size and steps, a preset's fields, and then `fields`.

    Raises `InvalidRequest` and `UnknownName`.
    """
    steps = manifest.steps if steps is None else steps
    if steps not in manifest.allowed_steps:
        raise InvalidRequest(
            f"The schedule of this {manifest.checkpoint} export does not do {steps} steps.",
            f"Choose one of {', '.join(map(str, manifest.allowed_steps))}.",
        )
    values: dict[str, Any] = {"height": manifest.height, "width": manifest.width}
    values |= preset_fields(preset, steps) | fields
    try:
        return GenerationRequest(prompt, steps=steps, **values)
    except TypeError as error:
        raise InvalidRequest(f"A request has no such field: {error}.", "") from None


def check_size(manifest: ExportManifest, request: GenerationRequest) -> None:
    """Raise `InvalidRequest` unless the export makes pictures of the request's size."""
    size = (request.height, request.width)
    if manifest.fixed_size and size != (manifest.height, manifest.width):
        raise InvalidRequest(
            f"This export makes only {manifest.width}x{manifest.height} pictures.",
            "Export without --fixed-size for others.",
        )
    unit = manifest.vae_scale_factor * 4  # the UNet halves the latents twice
    if any(side % unit for side in size):
        raise InvalidRequest(
            f"{request.width}x{request.height} does not fit the model.",
            f"Width and height must be multiples of {unit} pixels.",
        )
