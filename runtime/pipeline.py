"""`FastFace`: an export opened on a backend, ready to turn faces and prompts into pictures."""

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
from fastface_trt.engines.contract import MAX_WINDOWS, TEXT_POSITIONS
from fastface_trt.engines.device import Device, HostDevice
from fastface_trt.engines.engine import Closing, Progress
from fastface_trt.engines.manifest import EngineManifest, ExportManifest
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.conditioning import Recent
from fastface_trt.runtime.export_folder import Export, ModuleSet
from fastface_trt.runtime.face import ChannelOrder, Face, FaceAnalyzer
from fastface_trt.runtime.images import PictureSource, load_picture
from fastface_trt.runtime.prompt_syntax import signs_in
from fastface_trt.runtime.request import GenerationRequest, request_for
from fastface_trt.runtime.sampling import OnStep, denoise
from fastface_trt.runtime.stages import Stages
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline

FaceInput: TypeAlias = PictureSource | Face
"""A picture with a face (path, bytes, PIL, RGB array), or a face that was analysed before."""

OnPicture: TypeAlias = Callable[[int, Image.Image, Mapping[str, Any]], None]
"""Is given the index of a request, its picture (RGB) and what `write_picture` stores in it."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Pictures of one call, in the order of the requests.

    images: PIL RGB pictures. requests: what made each. parameters: per picture what `write_picture`
    stores. seconds: wall-clock time per stage (`face`, `text` with the noise, `unet`, `vae`) and
    their `total`, without what it took to build and open models. unet_samples: rows evaluated in
    all; branches: per picture and step the branches that ran. warnings: what was changed or cut, in
    sentences.
    """

    images: list[Image.Image]
    requests: list[GenerationRequest]
    parameters: list[Mapping[str, Any]]
    seconds: Mapping[str, float]
    unet_samples: int
    branches: list[list[tuple[str, ...]]]
    warnings: list[str] = field(default_factory=list)


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
        """Open an export (see `find_export`) on a backend, building the engines it lacks.

        `cache` is the engine cache's folder, `threads` the CPU threads per module (default: all
        cores). `engine_options` are the backend's own (see `backends.make_builder`); without any an
        engine that was built with others serves too. With `build=False` a missing engine is an
        `EngineMismatch` instead of minutes of building. `licence_acknowledged` confirms the licence
        of downloaded face models. `schedule_of` names a checkpoint of the registry whose sampler
        and steps are used instead of the export's own. Raises `ExportIncomplete`, `ManifestError`,
        `BackendUnavailable`, `BuildFailed`, `UnknownName`.
        """
        opened = Export.open(export, schedule_of=schedule_of)
        store = EngineCache(None if cache is None else Path(cache))
        builder = make_builder(
            opened.manifest, backend, threads=threads, options=engine_options, cache=store
        )
        modules = ModuleSet(opened, builder, store, progress or (lambda line: None), build=build)
        return cls(
            modules, FaceAnalyzer.of_export(opened, licence_acknowledged=licence_acknowledged)
        )

    @property
    def manifest(self) -> ExportManifest:
        """The manifest of the export."""
        return self._modules.manifest

    @property
    def device(self) -> Device:
        """Where the tensors of the engines live."""
        return self._modules.device

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
        steps: int | None = None,
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
        negative_prompt, ip_adapter_scale, alpha, beta, guidance_rescale, manipulation, …) as
        `request.parse_request` reads them, and override it. `num_inference_steps` is diffusers'
        name of `steps`.
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
        if num_images_per_prompt < 1:
            raise InvalidRequest("num_images_per_prompt is below 1.", "Ask for at least one.")
        fields["num_inference_steps"] = num_inference_steps
        requests = [
            self.request(text, preset=preset, steps=steps, image_index=index, **fields)
            for text in prompts
            for index in range(num_images_per_prompt)
        ]
        return self.generate(
            requests,
            [one for one in faces for _ in range(num_images_per_prompt)],
            face_index=face_index,
            channel_order=channel_order,
            max_rows=max_rows,
            on_step=on_step,
            timeline=timeline,
        )

    def request(
        self, prompt: str, *, preset: str = "plain", steps: int | None = None, **fields: Any
    ) -> GenerationRequest:
        """A request with this export's size and steps; see `request.parse_request`."""
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
        for request in requests:
            self.stages.check_size(request)
        if not all(isinstance(face, Face) for face in faces):
            self._faces.load()
        seconds: dict[str, float] = {}
        with _timed(seconds, "face"):
            found = self._analyze_each(faces, face_index, timeline)
        self._open_engines()  # after the faces: who has none need not wait for a build
        with _timed(seconds, "face", self.device):
            tokens = {
                key: self.stages.image_tokens(face, channel_order, timeline)
                for key, face in found.items()
            }
        with _timed(seconds, "text", self.device):
            samples = [
                self.stages.sample(request, tokens[id(face)], timeline)
                for request, face in zip(requests, faces, strict=True)
            ]
        with _timed(seconds, "unet", self.device):
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
        with _timed(seconds, "vae", self.device):
            for index, one in enumerate(latents):
                images.append(Image.fromarray(self.stages.decode(one, timeline)))
                if on_picture is not None:
                    on_picture(index, images[-1], parameters[index])
        return GenerationResult(
            images,
            requests,
            parameters,
            seconds | {"total": sum(seconds.values())},
            sum(request.unet_samples for request in requests),
            [[step.branches for step in sample.guidance_steps] for sample in samples],
            self.warnings(requests, list(found.values())),
        )

    def _analyze_each(
        self, faces: Sequence[FaceInput], index: int | None, timeline: Timeline
    ) -> dict[int, Face]:
        """The faces by `id` of what they were found in: the same object many times is one face."""
        objects = {id(face): face for face in faces}
        return {
            key: self.analyze(face, index=index, timeline=timeline) for key, face in objects.items()
        }

    def _open_engines(self) -> None:
        """Build and open what every picture needs."""
        for name in self._modules:
            if name != "guidance_step" or not isinstance(self.device, HostDevice):
                self._modules[name]

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

    def warnings(
        self, requests: Sequence[GenerationRequest], faces: Sequence[Face] = ()
    ) -> list[str]:
        """What was changed or cut in pictures of these requests and faces, in sentences."""
        warnings = [*dict.fromkeys(face.warning for face in faces if face.warning is not None)]
        if self.manifest.adapter_kind == "pulid" and self.manifest.face_parser is None:
            warnings.append(
                "This export has no face parser, so the adapter sees what is around the face; "
                "export with --face-parser for PuLID's own preprocessing."
            )
        texts = dict.fromkeys(
            (text, r.prompt_syntax) for r in requests for text in (r.prompt, r.negative_prompt)
        )
        for text, syntax in texts:
            if cut := self.stages.cut_from(text, syntax):
                most, possible = self.stages.most_tokens, MAX_WINDOWS * (TEXT_POSITIONS - 2)
                warnings.append(
                    f"The prompt is longer than {most} tokens; this was cut: {cut!r}."
                    + (f" Exported again it may have {possible}." if most < possible else "")
                )
            if syntax == "plain" and (found := signs_in(text)):
                warnings.append(
                    f"The prompt has {found[0]!r:.60}, which plain text does not read as a weight: "
                    f"it was taken literally. The prompt syntax {found[1]} reads it."
                )
        return warnings

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


@contextmanager
def _timed(seconds: dict[str, float], stage: str, device: Device | None = None) -> Iterator[None]:
    """Add the seconds that the block takes, its work on the device included, to the stage's."""
    started = perf_counter()
    yield
    if device is not None:
        device.synchronize()  # or the time would be that of queueing the work
    seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - started
