"""`Session`: pictures one at a time, from and into memory of the caller.

Shape legend: C latent channels, h × w latent size, T image tokens, K their width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastface_trt.embedding import foreign
from fastface_trt.embedding.foreign import Foreign
from fastface_trt.engines.contract import IMAGE_TOKENS
from fastface_trt.engines.device import Device, DeviceTensor, Tensor
from fastface_trt.errors import Cancelled, InvalidRequest
from fastface_trt.pipeline import FastFace
from fastface_trt.runtime.face import CROP_SIZE, EMBEDDING_SIZE, ChannelOrder, Face
from fastface_trt.runtime.job import Job
from fastface_trt.runtime.noise import INITIAL_LATENTS
from fastface_trt.runtime.request import GenerationRequest

OnProgress: TypeAlias = Callable[[int, int], bool | None]
"""Told (step, steps), counted from 1, after each step; returning False cancels."""

_PORTRAIT_SIZE = 512


@dataclass(frozen=True, slots=True)
class Output:
    """What a call made.

    pixels: RGB, uint8 [H, W, 3]: the caller's own memory where `out` was given and lies on the
    host, an array of its own where it was not, None where `out` lies on a GPU or decoding was not
    asked for. latents: the final ones, float32 [C,h,w] on the engines' device, the caller's own.
    parameters: what `write_picture` stores. warnings: what was changed or cut, in sentences.
    """

    pixels: NDArray[np.uint8] | None
    latents: Tensor
    parameters: Mapping[str, Any]
    warnings: tuple[str, ...]


class Session:
    """Pictures over a loaded `FastFace`, which the caller closes after the last call.

    Any number of threads may call it at once; a picture does not depend on what the others ask
    for. What is passed in on the host is copied; what comes out is the caller's.
    """

    def __init__(self, fastface: FastFace) -> None:
        self._fastface = fastface

    @property
    def device(self) -> Device:
        """Where the engines run; its `wait` and `signal` order other work of the caller's."""
        return self._fastface.device

    @property
    def token_shape(self) -> tuple[int, int]:
        """(T, K) of image tokens."""
        return self._tokens()[0]

    def latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        """(C, h, w) of a request's latents."""
        manifest = self._fastface.manifest
        factor = manifest.vae_scale_factor
        return manifest.latent_channels, request.height // factor, request.width // factor

    def face(
        self,
        embedding: Foreign,
        crop_bgr: Foreign | None = None,
        *,
        portrait_bgr: Foreign | None = None,
    ) -> Face:
        """A face from what the caller's own analysis found, copied to the host.

        embedding: [512] of any length, from the recogniser that the adapter was trained with.
        crop_bgr: the aligned face, uint8 [224, 224, 3], which FaceID-Plus-v2 and PuLID need.
        portrait_bgr: uint8 [512, 512, 3], which PuLID needs. Raises `InvalidRequest`.
        """
        values = foreign.host_values(
            embedding, name="The face embedding", shape=(EMBEDDING_SIZE,), device=self.device
        )
        norm = float(np.linalg.norm(values))
        if norm == 0:
            raise InvalidRequest("The face embedding is all zero.", "Pass a recogniser's output.")
        kind = self._fastface.manifest.adapter_kind
        for name, given, needed in (
            ("crop_bgr", crop_bgr, kind != "faceid"),
            ("portrait_bgr", portrait_bgr, kind == "pulid"),
        ):
            if needed and given is None:
                raise InvalidRequest(
                    f"A face for {kind} needs {name} beside its embedding.",
                    "Pass it, or pass the picture to FastFace.analyze.",
                )
        crop = self._square(crop_bgr, "The aligned face", CROP_SIZE)
        return Face(
            embedding=np.asarray(values / np.float32(norm), dtype=np.float32),
            embedding_norm=norm,
            crop_bgr=np.zeros((CROP_SIZE, CROP_SIZE, 3), np.uint8) if crop is None else crop,
            box=(0.0, 0.0, float(CROP_SIZE), float(CROP_SIZE)),
            score=1.0,
            index=0,
            count=1,
            detector_size=0,
            portrait_bgr=self._square(portrait_bgr, "The portrait", _PORTRAIT_SIZE),
        )

    def tokens(
        self, face: Face | Foreign, *, channel_order: ChannelOrder = "bgr", view: bool = False
    ) -> Tensor:
        """Image tokens [T, K] on the engines' device: those of a face, or somebody else's, checked.

        A copy, unless `view` of tokens that are on the device already; see `foreign.place`.
        """
        if isinstance(face, Face):
            # What the stages return is kept for the next call with this face.
            tokens = self.device.copy(self._fastface.stages.image_tokens(face, channel_order))
        else:
            tokens = self._placed(face, view=view)
        if not view:
            self.device.synchronize()  # another thread may be given it
        return tokens

    def generate(
        self,
        request: GenerationRequest,
        tokens: Face | Foreign,
        *,
        latents: Foreign | None = None,
        out: Foreign | None = None,
        decode: bool = True,
        stream: object = None,
        event: object = None,
        done: object = None,
        on_progress: OnProgress | None = None,
    ) -> Output:
        """Make one picture.

        tokens: a face, or image tokens [T, K] as `tokens` takes them; on the engines' GPU they are
        read in place. latents: standard normal noise float32 [C,h,w] to
        start from, in place of the seed's. out: memory for the picture, see `foreign.target`; it is
        checked before anything runs, and written last, only by a call that succeeds. `decode=False`
        stops at the latents. All work waits for what is on CUDA stream `stream` and for `event`;
        `stream` then waits for it, and `done` is recorded behind it. Raises `InvalidRequest`,
        `Cancelled`, `EngineFailed`.
        """
        stages = self._fastface.stages
        request = request.for_adapter(self._fastface.manifest.adapter_kind)
        stages.check_size(request)
        if out is not None and not decode:
            raise InvalidRequest("An output buffer was given and no picture asked for.", "")
        self.device.wait(stream=stream, event=event)
        target = (
            None if out is None else foreign.target(self.device, out, request.height, request.width)
        )
        noise = None
        if latents is not None:
            noise = foreign.host_values(
                latents,
                name="The initial latents",
                shape=self.latent_shape(request),
                device=self.device,
            )
        job = stages.job(request, self._ready(tokens))
        if noise is not None:
            job = _starting_from(job, noise)
        run = stages.start(job)
        while not run.finished:
            stages.step([run])
            if on_progress is not None and on_progress(run.step, request.steps) is False:
                raise Cancelled(f"The run was cancelled after step {run.step}.")
        pixels = self._write(run.latents, target) if decode else None
        self.device.signal(stream=stream, event=done)
        return Output(
            pixels,
            run.latents,
            self._fastface.parameters(request),
            tuple(self._fastface.warnings([request])),
        )

    def decode(self, latents: Foreign, *, out: Foreign | None = None) -> NDArray[np.uint8] | None:
        """The picture of final latents float32 [C,h,w]; see `generate` for `out` and the result."""
        channels, factor = self._fastface.manifest.latent_channels, self._factor
        shape = tuple(getattr(latents, "shape", ()))
        if len(shape) != 3 or shape[0] != channels:
            raise InvalidRequest(f"The latents are {list(shape)}, not [{channels}, h, w].", "")
        height, width = (side * factor for side in shape[1:])
        target = None if out is None else foreign.target(self.device, out, height, width)
        placed = foreign.place(self.device, latents, name="The latents", shape=shape)
        return self._write(placed, target)

    def _write(self, latents: Tensor, target: foreign.Target | None) -> NDArray[np.uint8] | None:
        if isinstance(target, DeviceTensor):
            self.device.write(target, self._fastface.stages.decode(latents))
            return None
        return self._fastface.stages.decode(latents, out=target)

    def _ready(self, tokens: Face | Foreign) -> Tensor:
        if isinstance(tokens, Face):
            return self._fastface.stages.image_tokens(tokens)
        on_gpu = foreign.location(tokens, "The image tokens") == "gpu"
        return self._placed(tokens, view=on_gpu)

    def _placed(self, tokens: Foreign, *, view: bool) -> Tensor:
        shape, dtype = self._tokens()
        return foreign.place(
            self.device, tokens, name="The image tokens", shape=shape, dtype=dtype, view=view
        )

    def _tokens(self) -> tuple[tuple[int, int], str]:
        spec = self._fastface.manifest.modules["unet"]
        given = next(tensor for tensor in spec.inputs if tensor.name == IMAGE_TOKENS)
        _, count, width = given.shape
        assert isinstance(count, int)
        assert isinstance(width, int)
        return (count, width), given.dtype

    @property
    def _factor(self) -> int:
        return self._fastface.manifest.vae_scale_factor

    def _square(self, source: Foreign | None, name: str, side: int) -> NDArray[np.uint8] | None:
        if source is None:
            return None
        return foreign.host_values(
            source, name=name, shape=(side, side, 3), dtype="uint8", device=self.device
        )


def _starting_from(job: Job, noise: NDArray[np.float32]) -> Job:
    def source(stream: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return noise if stream == INITIAL_LATENTS else job.noise(stream, shape)

    return replace(job, noise=source)
