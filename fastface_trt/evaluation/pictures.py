"""Pictures inside a page: files as data URIs, scaled down so that the page stays small."""

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image

_BYTES_PER_PIXEL: Final = 0.22  # of a photo-like picture as WebP at quality 82
_BUDGET_BYTES: Final = 3_600_000  # of all pictures of a page, before base64 makes 4/3 of it
_LARGEST, _SMALLEST = 448, 96


def side_for(count: int) -> int:
    """Side in pixels at which `count` pictures keep a page within its budget."""
    side = (_BUDGET_BYTES / _BYTES_PER_PIXEL / max(count, 1)) ** 0.5
    return int(min(_LARGEST, max(_SMALLEST, side)))


def picture_uri(path: Path, side: int) -> str | None:
    """The picture as a data URI, at most `side` pixels on a side; None when it cannot be read."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    # Artefacts show most in small pictures, which cost little anyway.
    picture.save(buffer, "webp", quality=92 if max(picture.size) <= 160 else 82, method=4)
    return data_uri(buffer.getvalue(), "image/webp")


def plot_uri(png: bytes) -> str:
    """A plot as a data URI: lossless WebP takes a third of a PNG's bytes."""
    buffer = BytesIO()
    with Image.open(BytesIO(png)) as picture:
        picture.convert("RGB").save(buffer, "webp", lossless=True, quality=50, method=2)
    return data_uri(buffer.getvalue(), "image/webp")


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes as a data URI."""
    return f"data:{media_type};base64,{b64encode(data).decode('ascii')}"
