"""An example client: KServe's v2 inference protocol over HTTP, with binary tensors, and no more.

    python -m fastface_trt.serving.triton.client --face me.png --prompt "…" --out out.png

Source of the wire format: Triton's binary tensor data extension. A body is a JSON head, then the
tensors' bytes in the head's order; BYTES elements have their length before them, 4 bytes little
endian. `tritonclient` speaks the same, and gRPC, where it is installed.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import (
    FastFaceError,
    InvalidRequest,
    MissingDependency,
    Unavailable,
    install_hint,
)
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.picture_file import write_picture
from fastface_trt.serving.triton import tensors
from fastface_trt.serving.work import Pixels

HEAD_BYTES = "Inference-Header-Content-Length"
TYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype(np.uint8),
    "UINT64": np.dtype("<u8"),
    "INT32": np.dtype("<i4"),
    "FP32": np.dtype("<f4"),
    "BYTES": np.dtype(np.object_),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class TritonClient:
    """Asks a Triton server for pictures; a context manager that closes its connections."""

    def __init__(self, url: str = "http://127.0.0.1:8000", *, timeout: float = 120.0) -> None:
        """`timeout` in seconds. Raises `MissingDependency` without httpx."""
        try:
            import httpx
        except ImportError:
            raise MissingDependency("This client needs httpx.", install_hint("triton")) from None
        self._httpx = httpx
        self._http = httpx.Client(base_url=url, timeout=timeout)

    def ready(self, model: str = "fastface") -> bool:
        """Whether the server answers and the model takes requests."""
        try:
            return self._http.get(f"/v2/models/{model}/ready").is_success
        except self._httpx.HTTPError:
            return False

    def generate(
        self,
        prompt: str,
        face: str | Path | bytes | Pixels | Face,
        *,
        seed: int = 0,
        model: str = "fastface",
        **parameters: Any,
    ) -> tuple[Pixels, dict[str, Any]]:
        """One picture: RGB, uint8 [H,W,3], and the server's `parameters`, `warnings`, `seconds`.

        `face`: a file's path or bytes, RGB pixels, or an analysed face. `parameters` are the fields
        of PARAMETERS (preset, steps, …). Raises `InvalidRequest` for what the server refuses and
        `Unavailable` where it has no room or does not answer.
        """
        arrays = {
            tensors.PROMPT: _bytes(prompt.encode()),
            tensors.PARAMETERS: _bytes(json.dumps(parameters).encode()),
            tensors.SEED: np.array([[seed]], TYPES["UINT64"]),
        } | _face(face)
        head, body = encode(arrays, [tensors.IMAGE, tensors.IMAGE_PARAMETERS])
        headers = {"Content-Type": "application/octet-stream", HEAD_BYTES: str(head)}
        try:
            answer = self._http.post(f"/v2/models/{model}/infer", content=body, headers=headers)
        except self._httpx.HTTPError as error:
            raise Unavailable(f"The server does not answer: {error}.", "Is it running?") from None
        if not answer.is_success:
            raise _refused(answer.status_code, answer.content)
        outputs = decode(answer.content, answer.headers.get(HEAD_BYTES))
        facts: dict[str, Any] = json.loads(outputs[tensors.IMAGE_PARAMETERS][0, 0])
        return outputs[tensors.IMAGE][0], facts

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "TritonClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def encode(arrays: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> tuple[int, bytes]:
    """A request's body, and how many of its bytes are the JSON head."""
    blocks = {name: _pack(array) for name, array in arrays.items()}
    head = {
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": NAMES[array.dtype],
                "parameters": {"binary_data_size": len(blocks[name])},
            }
            for name, array in arrays.items()
        ],
        "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
    }
    text = json.dumps(head).encode()
    return len(text), b"".join((text, *blocks.values()))


def decode(body: bytes, head_bytes: str | None) -> dict[str, NDArray[Any]]:
    """Outputs by name, of a body with a JSON head of `head_bytes` bytes (None: all of it)."""
    length = len(body) if head_bytes is None else int(head_bytes)
    arrays, place = {}, length
    for output in json.loads(body[:length])["outputs"]:
        dtype, shape = TYPES[output["datatype"]], output["shape"]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            arrays[output["name"]] = np.array(output["data"], dtype).reshape(shape)
            continue
        block, place = body[place : place + size], place + size
        arrays[output["name"]] = _unpack(block, dtype).reshape(shape)
    return arrays


def _pack(array: NDArray[Any]) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(item)) + item for item in array.ravel())


def _unpack(block: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype != np.object_:
        return np.frombuffer(block, dtype).copy()
    items, place = [], 0
    while place < len(block):
        (size,) = struct.unpack_from("<I", block, place)
        items.append(block[place + 4 : place + 4 + size])
        place += 4 + size
    return np.array(items, np.object_)


def _bytes(value: bytes) -> NDArray[np.object_]:
    return np.array([[value]], np.object_)


def _face(face: str | Path | bytes | Pixels | Face) -> dict[str, NDArray[Any]]:
    if isinstance(face, Face):
        return {
            tensors.FACE_EMBEDDING: (face.embedding * face.embedding_norm)[None],
            tensors.FACE_CROP_BGR: face.crop_bgr[None],
        }
    if isinstance(face, np.ndarray):
        return {tensors.FACE: face[None]}
    return {tensors.FACE_FILE: _bytes(face if isinstance(face, bytes) else Path(face).read_bytes())}


def _refused(status: int, body: bytes) -> FastFaceError:
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = f"The server answered {status}."
    if status in (429, 503):
        return Unavailable(message, "Try again later.")
    return InvalidRequest(message)


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--face", required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--prompt", required=True)
@click.option("--preset", default="am1+dcg", show_default=True)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--out", default="out.png", show_default=True, type=click.Path(path_type=Path))
def main(url: str, face: str, prompt: str, preset: str, seed: int, out: Path) -> None:
    """Ask a Triton server for one picture and save it with its parameters and the AI mark."""
    try:
        with TritonClient(url) as client:
            pixels, facts = client.generate(prompt, face, seed=seed, preset=preset)
        write_picture(out, pixels, parameters=facts["parameters"])
    except FastFaceError as error:
        raise click.ClickException(str(error)) from None
    click.echo(str(out))


if __name__ == "__main__":
    main()
