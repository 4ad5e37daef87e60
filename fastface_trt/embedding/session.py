"""`Session`: pictures one at a time, from and into memory of the caller.

Shape legend: C latent channels, h × w latent size, T image tokens, K their width.

Tensors of other libraries, checked and on the engines' device; output buffers of callers.

Anything counts that has `__dlpack__`, `__cuda_array_interface__` or `__array_interface__`, on the
host also the buffer protocol. What lies on the host goes to a GPU if the engines are there; what
lies on a GPU is never brought to the host behind the caller's back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import dlpack
from fastface_trt.engines.contract import IMAGE_TOKENS
from fastface_trt.engines.device import Array, Device, DeviceTensor, HostDevice, Tensor, dtype_name
from fastface_trt.engines.manifest import EMBEDDING_ALONE
from fastface_trt.errors import Cancelled, InvalidRequest
from fastface_trt.runtime.face import CROP_SIZE, EMBEDDING_SIZE, ChannelOrder, Face
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import INITIAL_LATENTS, NoiseSource, noise_of

Foreign: TypeAlias = Any
"""An object with one of the protocols above."""

Target: TypeAlias = NDArray[np.uint8] | DeviceTensor
"""Where a picture goes: uint8 [H, W, 3] in the caller's memory."""

_FLOATS = ("float32", "float16", "bfloat16")


def place(
    device: Device,
    source: Foreign,
    *,
    name: str,
    shape: Sequence[int],
    dtype: str = "float32",
    view: bool = False,
) -> Tensor:
    """`source` as a dense tensor of `shape` and `dtype` on `device`, in memory of its own.

    On the host any floating-point type is cast to `dtype`; on a GPU it has to be that. With `view`
    nothing is copied: the caller keeps the values as they are until everything that uses the tensor
    has run, and gives them in `dtype` on the device. Raises `InvalidRequest`, naming `name`.
    """
    on_host = location(source, name) == "host"
    if not on_host and isinstance(device, HostDevice):
        raise InvalidRequest(
            f"{name} lies on a GPU and the engines run on the host.", "Copy it to the host first."
        )
    if on_host:
        values = host_values(source, name=name, shape=shape, dtype=dtype, view=view)
        if view and not isinstance(device, HostDevice):
            raise InvalidRequest(
                f"{name} lies on the host and the engines run on {device.name}.",
                "Pass it without view.",
            )
        return device.upload(values)
    tensor = _borrow(device, source, name)
    _check_shape(name, tensor.shape, shape)
    if dtype_name(tensor) != dtype:
        raise InvalidRequest(
            f"{name} is {dtype_name(tensor)} and the engine takes {dtype}.",
            "Convert it on the GPU; only values on the host are converted here.",
        )
    return tensor if view else device.copy(tensor)


def host_values(
    source: Foreign,
    *,
    name: str,
    shape: Sequence[int],
    dtype: str = "float32",
    view: bool = False,
    device: Device | None = None,
) -> Array:
    """`source` as an array of `shape` and `dtype` on the host, a copy unless `view`.

    What lies on a GPU is downloaded where `device` is given. Raises `InvalidRequest`.
    """
    if location(source, name) == "gpu":
        if device is None or isinstance(device, HostDevice):
            raise InvalidRequest(f"{name} lies on a GPU.", "Copy it to the host first.")
        tensor = _borrow(device, source, name)
        if dtype_name(tensor) == "bfloat16":
            raise InvalidRequest(f"{name} is bfloat16, which numpy lacks.", "Pass float32.")
        array = device.download(tensor)
    else:
        borrowed = _borrow(HostDevice(), source, name)
        assert isinstance(borrowed, np.ndarray)
        array = borrowed
    _check_shape(name, array.shape, shape)
    if array.dtype != dtype and (view or array.dtype.kind != "f" or dtype not in _FLOATS):
        raise InvalidRequest(f"{name} is {array.dtype}, not {dtype}.", "Convert it first.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(f"{name} holds values that are not finite.", "Check its source.")
    return array if view else np.array(array, dtype=dtype)


def output(device: Device, out: Foreign, height: int, width: int) -> Target:
    """The caller's memory for a picture: uint8 [H, W, 3], or as many bytes in one row.

    Raises `InvalidRequest` unless it is dense, writable and exactly as large as the picture.
    """
    name, shape = "The output buffer", (height, width, 3)
    on_host = location(out, name) == "host"
    if not on_host and isinstance(device, HostDevice):
        raise InvalidRequest(
            f"{name} lies on a GPU and the engines run on the host.", "Pass host memory."
        )
    memory = _borrow(HostDevice() if on_host else device, out, name, writable=True)
    if dtype_name(memory) != "uint8":
        raise InvalidRequest(f"{name} holds {dtype_name(memory)}, not uint8.", "Pass bytes.")
    if tuple(memory.shape) not in (shape, (height * width * 3,)):
        raise InvalidRequest(
            f"{name} has shape {list(memory.shape)} and the picture {list(shape)}.",
            f"Pass exactly {height * width * 3} bytes.",
        )
    if isinstance(memory, DeviceTensor):
        return DeviceTensor(memory.address, shape, "uint8", memory.memory)
    return memory.reshape(shape)


def location(source: Foreign, name: str) -> Literal["host", "gpu"]:
    """Where the memory of `source` lies; raises `InvalidRequest` for neither."""
    if isinstance(source, np.ndarray):
        return "host"
    if isinstance(source, DeviceTensor):
        return "gpu"
    if hasattr(source, "__dlpack_device__"):
        kind = int(source.__dlpack_device__()[0])
        if kind not in (dlpack.HOST, dlpack.CUDA_HOST, dlpack.CUDA, dlpack.CUDA_MANAGED):
            raise InvalidRequest(
                f"{name} lies on a device of DLPack type {kind}.", "Pass host or CUDA memory."
            )
        return "host" if kind in (dlpack.HOST, dlpack.CUDA_HOST) else "gpu"
    return "gpu" if hasattr(source, "__cuda_array_interface__") else "host"


def _borrow(device: Device, source: Foreign, name: str, *, writable: bool = False) -> Tensor:
    try:
        return device.borrow(source, writable=writable)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:  # each library has its own
        raise InvalidRequest(
            f"{name} cannot be taken: {str(error).rstrip('.')}.",
            "Pass a dense tensor with __dlpack__, or an array.",
        ) from None


def _check_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise InvalidRequest(
            f"{name} has shape {list(found)}, not {list(wanted)}.", "Reshape it first."
        )


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
        """(T, K) of image tokens: of an export that takes several pictures, T of all of them."""
        return self._tokens()[0]

    def latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        """(C, h, w) of a request's latents."""
        return self._fastface.manifest.latent_shape(request.height, request.width)

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
        values = host_values(
            embedding, name="The face embedding", shape=(EMBEDDING_SIZE,), device=self.device
        )
        norm = float(np.linalg.norm(values))
        if norm == 0:
            raise InvalidRequest("The face embedding is all zero.", "Pass a recogniser's output.")
        kind = self._fastface.manifest.adapter_kind
        for name, given, needed in (
            ("crop_bgr", crop_bgr, kind not in EMBEDDING_ALONE),
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

        A copy, unless `view` of tokens that are on the device already; see `place`.
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
        start from, in place of the seed's. out: memory for the picture, see `output`; it is
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
        target = None if out is None else output(self.device, out, request.height, request.width)
        noise = None
        if latents is not None:
            initial = host_values(
                latents,
                name="The initial latents",
                shape=self.latent_shape(request),
                device=self.device,
            )
            noise = _starting_from(initial, request)
        sample = stages.sample(request, self._ready(tokens), noise=noise)
        while not sample.finished:
            stages.step([sample])
            if on_progress is not None and on_progress(sample.step, request.steps) is False:
                raise Cancelled(f"The run was cancelled after step {sample.step}.")
        pixels = self._write(sample.latents, target) if decode else None
        self.device.signal(stream=stream, event=done)
        return Output(
            pixels,
            sample.latents,
            self._fastface.parameters(request),
            tuple(self._fastface.warnings([request], [tokens] if isinstance(tokens, Face) else [])),
        )

    def decode(self, latents: Foreign, *, out: Foreign | None = None) -> NDArray[np.uint8] | None:
        """The picture of final latents float32 [C,h,w]; see `generate` for `out` and the result."""
        manifest = self._fastface.manifest
        channels, factor = manifest.latent_channels, manifest.vae_scale_factor
        shape = tuple(getattr(latents, "shape", ()))
        if len(shape) != 3 or shape[0] != channels:
            raise InvalidRequest(f"The latents are {list(shape)}, not [{channels}, h, w].", "")
        height, width = (side * factor for side in shape[1:])
        target = None if out is None else output(self.device, out, height, width)
        placed = place(self.device, latents, name="The latents", shape=shape)
        return self._write(placed, target)

    def _write(self, latents: Tensor, target: Target | None) -> NDArray[np.uint8] | None:
        if isinstance(target, DeviceTensor):
            self.device.write(target, self._fastface.stages.decode(latents))
            return None
        return self._fastface.stages.decode(latents, out=target)

    def _ready(self, tokens: Face | Foreign) -> Tensor:
        if isinstance(tokens, Face):
            return self._fastface.stages.image_tokens(tokens)
        on_gpu = location(tokens, "The image tokens") == "gpu"
        return self._placed(tokens, view=on_gpu)

    def _placed(self, tokens: Foreign, *, view: bool) -> Tensor:
        """Tokens of as many pictures as they are for, or of all that the export takes."""
        shape, dtype = self._tokens()
        given: tuple[int, ...] = tuple(getattr(tokens, "shape", ()))
        each = self._fastface.manifest.tokens_per_face
        if given[:1] and given[0] in range(each, shape[0], each):
            shape = (given[0], shape[1])
        return place(
            self.device, tokens, name="The image tokens", shape=shape, dtype=dtype, view=view
        )

    def _tokens(self) -> tuple[tuple[int, int], str]:
        spec = self._fastface.manifest.modules["unet"]
        given = next(tensor for tensor in spec.inputs if tensor.name == IMAGE_TOKENS)
        _, count, width = given.shape
        assert isinstance(count, int)
        assert isinstance(width, int)
        return (count, width), given.dtype

    def _square(self, source: Foreign | None, name: str, side: int) -> NDArray[np.uint8] | None:
        if source is None:
            return None
        return host_values(
            source, name=name, shape=(side, side, 3), dtype="uint8", device=self.device
        )


def _starting_from(initial: NDArray[np.float32], request: GenerationRequest) -> NoiseSource:
    drawn = noise_of(request)
    return lambda stream, shape: initial if stream == INITIAL_LATENTS else drawn(stream, shape)
