"""What the C library calls: plain values in, plain values out, one function per C function.

Memory comes as memoryviews over the host's own, DLPack tensors as capsules.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.embedding.session import Output, Session
from fastface_trt.engines import dlpack
from fastface_trt.errors import FastFaceError, InvalidRequest
from fastface_trt.runtime.face import CROP_SIZE, EMBEDDING_SIZE, Face, one_person
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.request import check_pictures, parse_request


class Capsule:
    """A DLPack capsule of host memory as an object that numpy and others take."""

    def __init__(self, capsule: object) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> object:
        """The capsule; it can be taken once."""
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where its tensor lies."""
        return dlpack.device_of(self._capsule)


class DeviceBytes:
    """A C program's memory on a GPU."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
        }


class Host:
    """A session as the C library holds it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._fastface = FastFace.load(**options)
        try:
            self._fastface.warm_up()
        except BaseException:
            self._fastface.close()
            raise
        self._session = Session(self._fastface)

    def describe(self) -> tuple[int, int, int, int, int]:
        """Width, height, steps, token count, token width."""
        manifest = self._fastface.manifest
        return (manifest.width, manifest.height, manifest.steps, *self._session.token_shape)

    def analyze(self, file: bytes | None, rgb: memoryview | None, size: Any, index: int) -> Face:
        """The face of a file's bytes, or of pixels whose size is (height, width)."""
        if file is not None:
            return self._fastface.analyze(file, index=index)
        return self._fastface.analyze(_rows(rgb, (*size, 3)), index=index)

    def embed(
        self,
        values: memoryview | None,
        capsule: object,
        crop_bgr: memoryview | None,
        portrait: memoryview | None,
    ) -> Face:
        """A face from an embedding: float32 values, or a DLPack capsule."""
        source: Any = Capsule(capsule)
        if values is not None:
            source = _numbers(values, (EMBEDDING_SIZE,), "face embedding's values")
        return self._session.face(
            source,
            None if crop_bgr is None else _rows(crop_bgr, (CROP_SIZE, CROP_SIZE, 3)),
            portrait_bgr=None if portrait is None else _rows(portrait, (512, 512, 3)),
        )

    def one_person(self, faces: list[Face]) -> Face:
        """The person whom all of these faces are of."""
        check_pictures(self._fastface.manifest, sum(1 + len(face.others) for face in faces))
        return one_person(faces)

    def generate(
        self,
        fields: dict[str, Any],
        further: str | None,
        face: Face | None,
        tokens: memoryview | None,
        capsule: object,
        latents: memoryview | None,
        out: memoryview | tuple[int, int] | None,
        order: tuple[int | None, int | None, int | None],
        on_progress: Callable[[int, int], bool] | None,
    ) -> tuple[NDArray[np.uint8] | None, int, int, int]:
        """Pixels [H, W, 3], their address, height and width.

        They lie in `out` where that is given: host memory, or address and bytes on a GPU, where the
        pixels are None. `capsule` holds tokens by DLPack, `order` a CUDA stream, an event, and the
        event to record.
        """
        values = fields | _json_object(further)
        request = parse_request(values, self._fastface.manifest)
        source: Any = face if capsule is None else Capsule(capsule)
        if tokens is not None:
            most, width = self._session.token_shape
            # Of an export that takes several pictures there may be fewer, which the session checks.
            rows = tokens.nbytes // (4 * width) if self._fastface.manifest.max_faces > 1 else most
            source = _numbers(tokens, (rows, width), "image tokens")
        noise: Any = latents
        if latents is not None:
            noise = _numbers(latents, self._session.latent_shape(request), "initial latents")
        stream, event, done = order
        output: Output = self._session.generate(
            request,
            source,
            latents=noise,
            out=DeviceBytes(*out) if isinstance(out, tuple) else out,
            stream=stream,
            event=event,
            done=done,
            on_progress=on_progress,
        )
        address = out[0] if isinstance(out, tuple) else 0
        if output.pixels is not None:
            address = output.pixels.ctypes.data
        return output.pixels, address, request.height, request.width

    def close(self) -> None:
        """Free the engines."""
        self._fastface.close()


def describe_error(error: BaseException) -> tuple[str, str]:
    """Code and sentence of an error for a C program; the code is empty where it is none of ours."""
    if isinstance(error, FastFaceError):
        return error.code, f"{error.message} {error.hint}".strip()
    return "", f"{type(error).__name__}: {error}"


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"parameters_json is not JSON: {error}.", "") from None
    if not isinstance(values, dict):
        raise InvalidRequest("parameters_json is not a JSON object.", 'Pass {"alpha": 1.5}.')
    return values


def _rows(pixels: memoryview | None, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if pixels is None:
        raise InvalidRequest("A picture has neither pixels nor a file.", "Set rgb or file.")
    return np.frombuffer(pixels, np.uint8).reshape(shape)


def _numbers(values: memoryview, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    array = np.frombuffer(values, np.float32)
    if array.size != np.prod(shape):
        raise InvalidRequest(
            f"The {name} are {array.size} numbers, not {int(np.prod(shape))}.",
            f"Pass {' × '.join(map(str, shape))} in row-major order.",
        )
    return array.reshape(shape)
