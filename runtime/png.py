"""PNG files that say how they were made: generation parameters, and an "AI-generated" mark.

The parameters are stored twice, as JSON under our own name for exact reading, and as the text
"parameters" that image browsers and other generators show. The mark is the IPTC's digital source
type in an XMP packet, which is what platforms look for. Nothing is written about the source
picture: whoever wants a path or a name in the metadata must put it into the parameters.
"""

import contextlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastface_trt import __version__
from fastface_trt.errors import BadPicture, StorageError

PARAMETERS_KEY = "fastface-trt"
SOFTWARE = f"FastFace-TRT {__version__}"
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<xmp:CreatorTool>{escape(SOFTWARE)}</xmp:CreatorTool>"
    f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)

_LABELS = {
    "steps": "Steps",
    "scheduler": "Sampler",
    "seed": "Seed",
    "size": "Size",
    "checkpoint": "Model",
}
"""Keys that other tools know under another name, in the order in which they expect them."""


def encode_png(
    picture: NDArray[np.uint8], *, parameters: Mapping[str, Any], ai_generated: bool = True
) -> bytes:
    """The bytes of a PNG file of `picture` (RGB, uint8 [H, W, 3]) with its metadata.

    `parameters` must be JSON (numpy scalars and arrays are converted); NaN is refused because no
    other JSON reader would take it. Raises ValueError or TypeError for a wrong picture or value.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture is {picture.dtype} {picture.shape}, not uint8 [H, W, 3]")
    plain = json.dumps(dict(parameters), allow_nan=False, default=_plain)
    info = PngInfo()
    info.add_itxt(PARAMETERS_KEY, plain)
    info.add_text("parameters", _readable(json.loads(plain), picture.shape[1], picture.shape[0]))
    info.add_text("Software", SOFTWARE)
    if ai_generated:
        info.add_itxt("XML:com.adobe.xmp", _XMP)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def write_png(
    path: str | Path,
    picture: NDArray[np.uint8],
    *,
    parameters: Mapping[str, Any],
    ai_generated: bool = True,
) -> None:
    """Write `picture` (RGB, uint8 [H, W, 3]) to `path`, whole or not at all; see `encode_png`.

    An existing file is replaced only once the new one is safely on the disk. Raises `StorageError`
    when the folder is missing, not writable or full; nothing half-written is left behind.
    """
    data = encode_png(picture, parameters=parameters, ai_generated=ai_generated)
    path = Path(path)
    # Not tempfile: its files are private to the user, and a picture should get the usual rights.
    # The name is short and our own, so that a long file name cannot make it too long.
    temporary = path.parent / f".fastface-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"The picture {path} cannot be written: {error.strerror or error}.",
            "Check that its folder exists, is writable and has space.",
        ) from None
    finally:
        # Gone already after the rename; still there after an error or an interrupt.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The generation parameters that `write_png` stored in the PNG file at `path`.

    Raises `BadPicture` when the file cannot be read, is no PNG, or carries no parameters.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            stored = image.info.get(PARAMETERS_KEY)
    except Exception as error:  # a missing file, a foreign one, a broken chunk: all end here
        raise BadPicture(
            f"The picture {path} cannot be read as PNG: {str(error).rstrip('.')}.",
            "Pass a PNG file written by fastface-trt.",
        ) from None
    if stored is None:
        raise BadPicture(
            f"The picture {path} carries no generation parameters.",
            "Pass a PNG file as fastface-trt wrote it; editors and messengers drop them.",
        )
    try:
        parameters = json.loads(stored)
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise BadPicture(
            f"The generation parameters in {path} are broken.",
            "Pass a PNG file as fastface-trt wrote it.",
        )
    return parameters


def _plain(value: object) -> Any:
    """What JSON can hold of a numpy value; everything else is a mistake of the caller's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be stored as a generation parameter")


def _readable(parameters: Mapping[str, Any], width: int, height: int) -> str:
    """The prompt, then one line "Name: value, …", as other generators write and parse it."""
    rest = {**parameters, "size": f"{width}x{height}"}
    lines = [str(rest.pop("prompt", ""))]
    if negative := rest.pop("negative_prompt", None):
        lines.append(f"Negative prompt: {negative}")
    known = [key for key in _LABELS if key in rest]
    others = [key for key in rest if key not in _LABELS]
    settings = [
        f"{_LABELS.get(key, key)}: {_quoted(rest[key])}"
        for key in (*known, *others)
        if rest[key] is not None
    ]
    text = "\n".join([*lines, ", ".join(settings)])
    # A chunk ends at a null character, and half a surrogate pair has no UTF-8.
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _quoted(value: Any) -> str:
    """A value that cannot be mistaken for the next setting; quoted where it could be."""
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text) if any(mark in text for mark in ",:\n") else text
