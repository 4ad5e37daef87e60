"""`FastFace`: an export opened on a backend, ready to turn faces and prompts into pictures.

What a generation returns: pictures, the requests that made them, and the numbers.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

from PIL import Image

from fastface_trt import __version__
from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.device import Device, Tensor
from fastface_trt.engines.engine import Closing, Progress
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    EngineManifest,
    ExportManifest,
    read_manifest,
)
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.conditioning import Recent
from fastface_trt.runtime.export_folder import find_export, with_schedule_of
from fastface_trt.runtime.face import ChannelOrder, Face, FaceAnalyzer
from fastface_trt.runtime.images import PictureSource, load_picture
from fastface_trt.runtime.modules import ModuleSet
from fastface_trt.runtime.request import GenerationRequest, request_for
from fastface_trt.runtime.sampling import OnStep, denoise
from fastface_trt.runtime.stages import Stages
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Pictures of one call, in the order of the requests.

    images: PIL RGB pictures. requests: what made each. parameters: per picture what `write_picture`
    stores. seconds: wall-clock time per stage (`face`, `text` with the noise, `unet`, `vae`,
    `total`).
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


FaceInput: TypeAlias = PictureSource | Face
"""A picture with a face (path, bytes, PIL, RGB array), or a face that was analysed before."""

OnPicture: TypeAlias = Callable[[int, Image.Image, Mapping[str, Any]], None]
"""Is given the index of a request, its picture (RGB) and what `write_picture` stores in it."""


class FastFace(Closing):
    """Identity-preserving generation with decoupled guidance and attention manipulation.

    Use `FastFace.load`, call the object, and close it (or use it in a `with` block). One object may
    be called from several threads.
    """

    def __init__(self, modules: ModuleSet, faces: FaceAnalyzer) -> None:
        self._modules = modules
        self._faces = faces
        self._analysed: Recent[Face] = Recent(64)
        self.stages = Stages(modules)

    @classmethod
    def load(
        cls,
        export: str | os.PathLike[str] = "mini",
        *,
        backend: str = "onnxruntime",
        cache: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        engine_options: Mapping[str, Any] | None = None,
        build: bool = True,
        licence_acknowledged: bool = False,
        progress: Progress | None = None,
        schedule_of: str | None = None,
    ) -> "FastFace":
        """Open an export (a folder, or `mini`) on a backend, building the engines it lacks.

        `cache` is the engine cache's folder, `threads` the CPU threads per module (default: all
        cores). `engine_options` are the backend's own (see `builders.make_builder`); without any an
        engine that was built with others serves too. With `build=False` a missing engine is an
        `EngineMismatch` instead of minutes of building. `licence_acknowledged` confirms the licence
        of downloaded face models. `schedule_of` names a checkpoint of the registry whose sampler
        and steps are used instead of the export's own. Raises `ExportIncomplete`, `ManifestError`,
        `BackendUnavailable`, `BuildFailed`, `UnknownName`.
        """
        folder = find_export(export)
        store = EngineCache(None if cache is None else Path(cache))
        manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest)
        if schedule_of is not None:
            manifest = with_schedule_of(manifest, schedule_of)
        builder = make_builder(
            manifest,
            backend,
            threads=threads,
            options=engine_options,
            cache=store,
        )
        modules = ModuleSet(
            folder,
            builder,
            store,
            progress or (lambda line: None),
            build=build,
            manifest=manifest,
        )
        name = modules.manifest.face_model
        local = modules.folder / name
        faces = FaceAnalyzer(
            local if local.is_dir() else name,
            licence_acknowledged=licence_acknowledged,
            portraits=modules.manifest.adapter_kind == "pulid",
        )
        return cls(modules, faces)

    @property
    def manifest(self) -> ExportManifest:
        """The manifest of the export."""
        return self._modules.manifest

    def warm_up(self) -> None:
        """Build and open all engines now, so that the first picture does not wait for them."""
        for name in self._modules:
            self._modules[name]
        self._faces.load()

    def analyze(
        self,
        picture: FaceInput,
        *,
        index: int | None = None,
        timeline: Timeline = NO_TIMELINE,
    ) -> Face:
        """Find the face of a picture: the largest, or the `index`-th by size.

        The last 64 faces are kept in memory by the content of their pictures, until `forget`.
        Raises `BadPicture`, `NoFaceFound`, `FaceIndexOutOfRange`.
        """
        if isinstance(picture, Face):
            return picture
        with timeline.span("read_picture"):
            pixels = load_picture(picture)
            key = (hashlib.blake2b(pixels.data).digest(), pixels.shape, index)
        face = self._analysed.get(key)
        if face is None:
            face = self._faces.analyze(pixels, index=index, timeline=timeline)
            self._analysed.put(key, face)
        return face

    def __call__(
        self,
        prompt: str | Sequence[str],
        face: FaceInput | list[FaceInput] | tuple[FaceInput, ...],
        *,
        preset: str = "plain",
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        face_index: int | None = None,
        channel_order: ChannelOrder = "bgr",
        max_rows: int | None = None,
        on_step: OnStep | None = None,
        timeline: Timeline = NO_TIMELINE,
        **fields: Any,
    ) -> GenerationResult:
        """Make pictures of a person: one per prompt and face, times `num_images_per_prompt`.

        `prompt` and `face` are single or lists of equal length. `preset` is one of
        `presets.PRESETS`; `fields` are further fields of `GenerationRequest` (seed, height, width,
        negative_prompt, ip_adapter_scale, alpha, beta, rescale, manipulation, …) and override it.
        Raises `InvalidRequest`, `UnknownName` and the errors of `analyze`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        faces: list[FaceInput] = [*face] if isinstance(face, list | tuple) else [face]
        if len(faces) == 1:
            faces *= len(prompts)
        if len(prompts) == 1:
            prompts *= len(faces)
        if len(prompts) != len(faces) or not prompts:
            raise InvalidRequest(
                f"{len(prompts)} prompts and {len(faces)} faces do not pair up.",
                "Give equally many, or one of either.",
            )
        if "steps" in fields:
            raise InvalidRequest("A call takes num_inference_steps, not steps.", "Rename it.")
        if num_images_per_prompt < 1:
            raise InvalidRequest("num_images_per_prompt is below 1.", "Ask for at least one.")
        requests = [
            self.request(text, preset=preset, steps=num_inference_steps, picture=picture, **fields)
            for text in prompts
            for picture in range(num_images_per_prompt)
        ]
        pictures = [one for one in faces for _ in range(num_images_per_prompt)]
        return self.generate(
            requests,
            pictures,
            face_index=face_index,
            channel_order=channel_order,
            max_rows=max_rows,
            on_step=on_step,
            timeline=timeline,
        )

    def request(
        self, prompt: str, *, preset: str = "plain", steps: int | None = None, **fields: Any
    ) -> GenerationRequest:
        """A request with this export's size and steps, a preset's fields, and then `fields`."""
        return request_for(self.manifest, prompt, preset=preset, steps=steps, **fields)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        faces: Sequence[FaceInput],
        *,
        face_index: int | None = None,
        channel_order: ChannelOrder = "bgr",
        max_rows: int | None = None,
        on_step: OnStep | None = None,
        on_picture: OnPicture | None = None,
        timeline: Timeline = NO_TIMELINE,
    ) -> GenerationResult:
        """Run requests with their faces, one each, in one batch; settings may all differ.

        `max_rows` bounds the rows of a UNet call (memory). `on_step` is called after every step of
        every request and may return False to cancel (`Cancelled`). `on_picture` is called with each
        picture before the next is decoded: handed to a `PictureWriter` there, it becomes a file
        meanwhile. `timeline` is told the stages of this call: see `runtime.timeline`.
        """
        requests = [request.for_adapter(self.manifest.adapter_kind) for request in requests]
        seconds: dict[str, float] = {}
        with self._timed(seconds, "total"):
            for request in requests:
                self.stages.check_size(request)
            with self._timed(seconds, "face"):
                tokens = self._face_tokens(faces, face_index, channel_order, timeline)
            with self._timed(seconds, "text"):
                samples = [
                    self.stages.sample(request, one, timeline)
                    for request, one in zip(requests, tokens, strict=True)
                ]
            with self._timed(seconds, "unet"):
                latents = denoise(
                    self._modules["unet"],
                    samples,
                    guidance=self.stages.guidance,
                    on_step=on_step,
                    max_rows=max_rows,
                    timeline=timeline,
                )
            parameters = [self.parameters(request) for request in requests]
            images = []
            with self._timed(seconds, "vae"):
                for index, one in enumerate(latents):
                    images.append(Image.fromarray(self.stages.decode(one, timeline)))
                    if on_picture is not None:
                        on_picture(index, images[-1], parameters[index])
        return GenerationResult(
            images,
            requests,
            parameters,
            seconds,
            sum(request.unet_samples for request in requests),
            [[step.branches for step in sample.guidance_steps] for sample in samples],
            self.warnings(requests),
        )

    def _face_tokens(
        self,
        faces: Sequence[FaceInput],
        index: int | None,
        order: ChannelOrder,
        timeline: Timeline,
    ) -> list[Tensor]:
        analysed: dict[int, Tensor] = {}
        for face in faces:  # the same object many times is one face
            if id(face) not in analysed:
                found = self.analyze(face, index=index, timeline=timeline)
                analysed[id(face)] = self.stages.image_tokens(found, order, timeline)
        return [analysed[id(face)] for face in faces]

    def parameters(self, request: GenerationRequest) -> Mapping[str, Any]:
        """What `write_picture` stores in a picture of this request, as JSON values."""
        manifest = self.manifest
        return request.to_dict() | {
            "checkpoint": manifest.checkpoint,
            "adapter": manifest.adapter,
            "scheduler": manifest.scheduler["class"],
            "size": f"{request.width}x{request.height}",
            "backend": self._modules.builder.backend,
            "software": f"FastFace-TRT {__version__}",
        }

    def warnings(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """What was changed or cut in pictures of these requests, in sentences."""
        warnings = []
        if self.manifest.adapter_kind == "pulid" and self.manifest.face_parser is None:
            warnings.append(
                "This export has no face parser, so the adapter sees what is around the face; "
                "export with --face-parser for PuLID's own preprocessing."
            )
        for text in dict.fromkeys(t for r in requests for t in (r.prompt, r.negative_prompt)):
            cut = self.stages.cut_from(text)
            if cut:
                warnings.append(f"The prompt is longer than 77 tokens; this was cut: {cut!r}.")
        return warnings

    @contextmanager
    def _timed(self, seconds: dict[str, float], stage: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self._modules.device.synchronize()  # or the time would be that of queueing the work
        seconds[stage] = perf_counter() - started

    @property
    def device(self) -> Device:
        """Where the tensors of the engines live."""
        return self._modules.device

    def engines(self) -> dict[str, EngineManifest]:
        """What is known of each module's engine: its key, size and build. Only those that exist."""
        return self._modules.engine_manifests()

    def forget(self) -> None:
        """Drop every face, and every encoding of a prompt or a face, kept for the next call."""
        self._analysed.clear()
        self.stages.forget()

    def close(self) -> None:
        """Free the engines and what is kept on their device."""
        self.forget()
        self._modules.close()


__all__ = ["FaceInput", "FastFace", "find_export", "with_schedule_of"]
