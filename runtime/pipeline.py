"""`FastFace`: an export opened on a backend, ready to turn faces and prompts into pictures."""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
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
from fastface_trt.runtime.face import ChannelOrder, Face, FaceAnalyzer, one_person
from fastface_trt.runtime.images import PictureSource, load_picture
from fastface_trt.runtime.picture_file import Destination, PictureWriter
from fastface_trt.runtime.picture_names import face_name, name_fields, picture_hash
from fastface_trt.runtime.prompt_syntax import signs_in
from fastface_trt.runtime.request import (
    GenerationRequest,
    OutputType,
    check_callable,
    check_pictures,
    check_run,
    parse_call,
    request_for,
)
from fastface_trt.runtime.sampling import (
    OnStep,
    OnStepEnd,
    denoise,
    on_step_end,
    require_finite,
)
from fastface_trt.runtime.stages import Stages
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline

OneFace: TypeAlias = PictureSource | Face
FaceInput: TypeAlias = OneFace | list[OneFace] | tuple[OneFace, ...]
"""A picture with a face (path, bytes, PIL, RGB array), a face that was analysed before, or several
of either that show one person, for an adapter that takes them."""

OnPicture: TypeAlias = Callable[[int, Image.Image, Mapping[str, Any]], None]
"""Is given the index of a request, its picture (RGB) and what `write_picture` stores in it."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Pictures of one call, in the order of the requests.

    images: PIL RGB pictures, or by `output_type` an array: "np" float32 [N,H,W,3] from 0 to 1,
    "latent" float32 [N,C,h,w]. requests: what made each. parameters: per picture what
    `write_picture` stores. seconds: wall-clock time per stage (`face`, `text` with the noise,
    `unet`, `vae`) and their `total`, without what it took to build and open models. unet_samples:
    rows evaluated in all; branches: per picture and step the branches that ran. warnings: what was
    changed or cut, in sentences. names: per picture what its file's name is made of
    (`picture_names.FIELDS`).
    """

    images: list[Image.Image]
    requests: list[GenerationRequest]
    parameters: list[Mapping[str, Any]]
    seconds: Mapping[str, float]
    unet_samples: int
    branches: list[list[tuple[str, ...]]]
    warnings: list[str] = field(default_factory=list)
    names: list[Mapping[str, Any]] = field(default_factory=list)

    def save(
        self,
        out: str | os.PathLike[str] = "out",
        *,
        name: str | None = None,
        format: str | None = None,
        quality: int | None = None,
        ai_generated: bool = True,
    ) -> list[Path]:
        """Write the pictures as the command line does, with parameters and mark; returns the files.

        `out` is a folder, made as needed, in which no file is replaced; or for one picture a file
        (.png, .jpg, .webp), which is. `name` is a template of names in a folder, such as
        `{face}-{seed}` (see `picture_names`). `ai_generated=False` leaves out the mark. Raises
        `InvalidRequest`, `UnknownName`, `StorageError`.
        """
        pixels = [np.asarray(image) for image in self.images]
        if any(one.shape[2:] != (3,) for one in pixels):
            raise InvalidRequest(
                "Latents are no pictures.", "Leave output_type at pil to save pictures."
            )
        place = Destination.of(out, count=len(pixels), format=format, template=name)
        place.check()
        with PictureWriter() as writer:
            for one, parameters, fields in zip(pixels, self.parameters, self.names, strict=True):
                place.write(
                    writer,
                    fields,
                    one if one.dtype == np.uint8 else np.rint(one * 255).astype(np.uint8),
                    parameters=parameters,
                    ai_generated=ai_generated,
                    quality=quality,
                )
        return writer.written


class FastFace(Closing):
    """Identity-preserving generation with decoupled guidance and attention manipulation.

    Use `FastFace.load`, call the object, and close it (or use it in a `with` block), after which it
    makes no pictures (`Unavailable`). One object may be called from several threads.
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
        progress = progress or (lambda line: None)
        modules = ModuleSet(opened, builder, store, progress, build=build)
        faces = FaceAnalyzer.of_export(
            opened, licence_acknowledged=licence_acknowledged, progress=progress
        )
        return cls(modules, faces)

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

        Several pictures are of one person, whose faces come back as one with `Face.others`.
        The last 64 faces are kept in memory by the content of their pictures, until `forget`.
        Raises `BadPicture`, `NoFaceFound`, `FaceIndexOutOfRange`.
        """
        self._modules.require_open()
        if isinstance(picture, Face):
            return picture
        if isinstance(picture, list | tuple):
            check_pictures(self.manifest, len(picture))
            return one_person(
                [self.analyze(one, index=index, timeline=timeline) for one in picture]
            )
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
        prompt: str | Sequence[str] | None = None,
        face: FaceInput | list[FaceInput] | tuple[FaceInput, ...] | None = None,
        *,
        preset: str = "plain",
        face_index: int | None = None,
        channel_order: ChannelOrder = "bgr",
        max_rows: int | None = None,
        output_type: OutputType = "pil",
        on_step: OnStep | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        timeline: Timeline = NO_TIMELINE,
        **fields: Any,
    ) -> GenerationResult:
        """Make pictures of a person: one per prompt and face, times `num_images_per_prompt`.

        `prompt`, `face` and negative_prompt are single or lists of equal length (a person of
        several pictures is a list in that of the faces: `face=[["a.png", "b.png"]]`); `seed` is
        single or a list of one per picture. `preset` is one of `presets.PRESETS`; `fields` are
        further fields of `GenerationRequest` (seed, steps, height, width, negative_prompt,
        ip_adapter_scale, alpha, beta, guidance_rescale, manipulation, …) as `request.parse_request`
        reads them, and override it.

        What diffusers has: `num_images_per_prompt`; `num_inference_steps` is steps; `generator` (a
        torch.Generator, whose initial seed is taken, or a number) is seed;
        `callback_on_step_end(pipe, step, timestep, {"latents": …})` is called once per step, may
        return False to cancel, and changes nothing; `output_type` is pil, np or latent.
        Raises `InvalidRequest`, `UnknownName` and the errors of `analyze`.
        """
        requests, faces = parse_call(
            self.manifest, prompt, face, known=_OF_A_CALL, preset=preset, **fields
        )
        if callback_on_step_end is not None:
            if on_step is not None:
                raise InvalidRequest(
                    "on_step and callback_on_step_end are both given.", "Give one of them."
                )
            check_callable("callback_on_step_end", callback_on_step_end)
            on_step = on_step_end(callback_on_step_end, self, len(requests))
        result = self.generate(
            requests,
            faces,
            face_index=face_index,
            channel_order=channel_order,
            max_rows=max_rows,
            output_type=output_type,
            on_step=on_step,
            timeline=timeline,
        )
        # Told by its name even where `fields` have changed it.
        return replace(result, names=[{**told, "preset": preset} for told in result.names])

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
        output_type: OutputType = "pil",
        on_step: OnStep | None = None,
        on_picture: OnPicture | None = None,
        timeline: Timeline = NO_TIMELINE,
    ) -> GenerationResult:
        """Run requests with their faces, one each, in one batch; settings may all differ.

        `max_rows` bounds the rows of a UNet call (memory). `on_step` is called after every step of
        every request and may return False to cancel (`Cancelled`). `on_picture` is called with each
        picture before the next is decoded: handed to a `PictureWriter` there, it becomes a file
        meanwhile. `output_type` says what `GenerationResult.images` are; nothing is decoded for
        latents. `timeline` is told the stages of this call: see `runtime.timeline`.
        """
        check_run(
            requests,
            faces,
            face_index=face_index,
            channel_order=channel_order,
            max_rows=max_rows,
            output_type=output_type,
            on_step=on_step,
        )
        presets = [request.preset for request in requests]
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
        images: Any = []
        with _timed(seconds, "vae", self.device):
            for index, one in enumerate(latents):
                if output_type == "latent":
                    require_finite(self.device, one)
                    images.append(self.device.download(one))
                    continue
                images.append(Image.fromarray(self.stages.decode(one, timeline)))
                if on_picture is not None:
                    on_picture(index, images[-1], parameters[index])
        if output_type != "pil":
            images = np.array(images, np.float32) / np.float32(255 if output_type == "np" else 1)
        return GenerationResult(
            images,
            requests,
            parameters,
            seconds | {"total": sum(seconds.values())},
            sum(request.unet_samples for request in requests),
            [[step.branches for step in sample.guidance_steps] for sample in samples],
            self.warnings(requests, list(found.values())),
            [
                name_fields(
                    told,
                    face=face_name(face) or "face",
                    preset=preset,
                    hash=self.picture_hash(told, found[id(face)], channel_order),
                )
                for told, face, preset in zip(parameters, faces, presets, strict=True)
            ],
        )

    def _analyze_each(
        self, faces: Sequence[FaceInput], index: int | None, timeline: Timeline
    ) -> dict[int, Face]:
        """The faces by `id` of what they were found in: the same object many times is one face."""
        objects = {id(face): face for face in faces}
        found = {
            key: self.analyze(face, index=index, timeline=timeline) for key, face in objects.items()
        }
        for face in found.values():
            check_pictures(self.manifest, 1 + len(face.others))
        return found

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

    def picture_hash(
        self, parameters: Mapping[str, Any], face: Face, channel_order: ChannelOrder = "bgr"
    ) -> str:
        """8 hexadecimal digits that differ where anything does that makes this export's picture."""
        seen = [
            b"" if part is None else part.tobytes()
            for one in (face, *face.others)
            for part in (one.embedding, one.crop_bgr, one.portrait_bgr)
        ]
        return picture_hash(parameters, self._modules.export_hash, channel_order, *seen)

    def warnings(
        self, requests: Sequence[GenerationRequest], faces: Sequence[Face] = ()
    ) -> list[str]:
        """What was changed or cut in pictures of these requests and faces, in sentences."""
        shown = [one for face in faces for one in (face, *face.others)]
        warnings = [*dict.fromkeys(one.warning for one in shown if one.warning is not None)]
        if self.manifest.max_faces > 1 and faces:
            told = (
                request.told_strength(self.manifest, count)
                for count in sorted({1 + len(face.others) for face in faces})
                for request in requests
            )
            warnings += [*dict.fromkeys(one for one in told if one)]
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


_OF_A_CALL = frozenset(inspect.signature(FastFace.__call__).parameters) - {"self", "fields"}


@contextmanager
def _timed(seconds: dict[str, float], stage: str, device: Device | None = None) -> Iterator[None]:
    """Add the seconds that the block takes, its work on the device included, to the stage's."""
    started = perf_counter()
    yield
    if device is not None:
        device.synchronize()  # or the time would be that of queueing the work
    seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - started
