"""From whatever a user hands over to RGB pixels, with every limit checked before the costly step.

The order matters: existence, bytes, format and size in pixels are all known before a single pixel
is decoded, and decoders see only what `intake` kept of a file. The command line, Python, C, Triton
and the server all read pictures here.

Contact sheets: pictures in rows and columns with labels, for looking at many at once.
"""

import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    ExifTags,
    Image,
    ImageDraw,
    ImageFile,
    ImageFont,
    ImageOps,
    features,
)

from fastface_trt.errors import BadPicture, install_hint
from fastface_trt.runtime.intake import Refused, format_of, take_apart, upright

PictureSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "HEIF", "AVIF")
MIN_SIDE = 16
"""Pixels; no detector finds a face in less, and it catches icons and tracking pixels."""

MAX_BYTES = 400_000_000
"""64 megapixels of 16-bit colours as they are, with room for the rest of the file."""
MAX_PIXELS = 64_000_000

_NAMES = {"WEBP": "WebP", "HEIF": "HEIC"}
_BAND = 1_000_000
"""Pixels that are brought to RGB at a time, so that it takes no more memory for large pictures."""
_BLOCK = 1_000_000


class BrokenPicture(BadPicture):
    """A picture that a decoder gave up; its sentence quotes the decoder."""


def load_picture(
    source: PictureSource,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] = FORMATS,
) -> NDArray[np.uint8]:
    """Read a picture as RGB, uint8 [H, W, 3], owned by the caller.

    `source` is a path, the bytes of a file, an open binary file, a PIL image, or RGB pixels (uint8
    [H, W, 3]). Files may be of `formats` (PIL's names); readers of others never see them. The EXIF
    orientation is applied, transparency is laid on white, 16 bits are scaled to 8, and of an
    animation the first frame is taken. Raises `BadPicture`, naming the file, for anything that
    gives no such picture, that has more than `max_bytes` bytes or `max_pixels` pixels, or fewer
    than `MIN_SIDE` on a side, for what `intake` refuses, and for HEIC and AVIF where nothing is
    installed that reads them. PIL's own bomb limit, about 179 million pixels, holds whatever
    `max_pixels` says.
    """
    name = _name_of(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise BadPicture(
                f"{name} has dtype {source.dtype} and shape {list(source.shape)}.",
                "Pass RGB pixels as uint8 with shape [height, width, 3].",
            )
        _check_size(name, source.shape[1], source.shape[0], max_pixels)
        return np.array(source, order="C")
    if isinstance(source, Image.Image):
        _check_opened(name, source, max_bytes)
        return _pixels(name, source, max_pixels)
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, (str, os.PathLike)):
        data = read_file(source, max_bytes=max_bytes)
    elif hasattr(source, "read"):
        data = _content(name, source, max_bytes)
    else:
        raise BadPicture(
            f"A picture cannot be read from {source!r:.40} ({type(source).__name__}).",
            "Pass a path, bytes, an open binary file, a PIL image or RGB pixels.",
        )
    if len(data) > max_bytes:
        raise _too_many_bytes(name, max_bytes)
    if not data:
        raise BadPicture(f"{name} is empty (0 bytes).", "Save or download it again.")
    form = format_of(data[:64])
    if form not in formats:
        raise BadPicture(
            f"{name} is not a {_choice(formats)} picture, or its beginning is broken.",
            "Open it in an image editor and save it as PNG or JPEG.",
        )
    if form in ("HEIF", "AVIF"):
        _open_reader(name, form)
        return _pixels(name, _opened(name, data, form), max_pixels)
    try:
        file = take_apart(data)
    except Refused as refused:
        raise BadPicture(f"{name} {refused.message}.", refused.hint) from None
    _check_size(name, file.width, file.height, max_pixels)
    del data  # of which the file is a copy
    return upright(
        _pixels(name, _opened(name, file.data, file.format), max_pixels), file.orientation
    )


def read_file(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """What a picture's file holds; raises `BadPicture` for what is no file, or a longer one."""
    with _open_file(Path(path)) as stream:
        return _content(_name_of(path), stream, max_bytes)


def _name_of(source: PictureSource) -> str:
    """What to call the picture in an error: its file name where it has one."""
    if isinstance(source, (str, os.PathLike)):
        return f"The picture {os.fspath(source)}"
    name = getattr(source, "name", None) or getattr(source, "filename", None)
    return f"The picture {name}" if isinstance(name, str) else "The picture"


def _open_file(path: Path) -> BinaryIO:
    name = _name_of(path)
    try:
        # is_file() before open(): opening a pipe would wait for a writer that may never come.
        if not path.exists():
            # Path() has already made one slash of the two.
            address = re.match(r"https?:/", str(path))
            raise BadPicture(
                f"{name} does not exist.",
                "Download it and pass the path of the file." if address else "Check its path.",
            )
        if not path.is_file():
            raise BadPicture(f"{name} is not a file.", "Pass the path of one picture.")
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise BadPicture(
            f"{name} cannot be opened: {reason}.", "Check its path and permissions."
        ) from None


def _content(name: str, stream: BinaryIO, max_bytes: int) -> bytes:
    """All that a file holds, from its beginning where it can be sought."""
    parts, size = [], 0
    try:
        if stream.seekable():
            stream.seek(0)
        while part := stream.read(_BLOCK):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                raise _too_many_bytes(name, max_bytes)
        return b"".join(parts)
    # AttributeError: it cannot seek; TypeError: text; ValueError: the stream is closed
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadPicture(f"{name} cannot be read: {error}.", "Pass an open binary file.") from None


def _too_many_bytes(name: str, max_bytes: int) -> BadPicture:
    return BadPicture(f"{name} has more than {max_bytes:,} bytes.", "Scale it down first.")


def _check_opened(name: str, image: Image.Image, max_bytes: int) -> None:
    """Refuse what `intake` refuses of a file that PIL has open and has not decoded yet."""
    stream = getattr(image, "fp", None)
    if not isinstance(image, ImageFile.ImageFile) or stream is None or not image.tile:
        return
    try:
        at = stream.tell()
        data = _content(name, stream, max_bytes)
        stream.seek(at)
        if format_of(data[:64]) not in (None, "HEIF", "AVIF"):
            take_apart(data)
    except Refused as refused:
        raise BadPicture(f"{name} {refused.message}.", refused.hint) from None


def _opened(name: str, data: bytes, form: str) -> Image.Image:
    """Read the header only; PIL decodes nothing before `load()`."""
    try:
        with warnings.catch_warnings():
            # Our own limit is checked before; PIL's warning would only be noise.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=(form,))
    except Image.DecompressionBombError:
        raise BadPicture(
            f"{name} has more pixels than can be decoded safely.", "Scale it down first."
        ) from None
    except Exception as error:  # each of PIL's readers fails in its own way on hostile headers
        raise _broken(name, error) from None


def _open_reader(name: str, boxed: str) -> None:
    """Make PIL read HEIC or AVIF; raises `BadPicture` where it cannot."""
    if boxed == "AVIF" and not features.check("avif"):
        raise BadPicture(
            f"{name} is an AVIF file, which this build of Pillow does not read.",
            "Install Pillow's own wheel (pip install --force-reinstall pillow), or save the "
            "picture as JPEG.",
        )
    if boxed == "HEIF":
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise BadPicture(
                f"{name} is a HEIC file, which is read only with pillow-heif.",
                f"Run {install_hint('heif')}, or save the picture as JPEG.",
            ) from None
        register_heif_opener(thumbnails=False)


def _choice(formats: Sequence[str]) -> str:
    *others, last = (_NAMES.get(name, name) for name in formats)
    return f"{', '.join(others)} or {last}" if others else last


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadPicture(
            f"{name} has {width} × {height} pixels; at most {max_pixels:,} are taken.",
            "Scale it down first.",
        )
    if min(width, height) < MIN_SIDE:
        raise BadPicture(
            f"{name} has {width} × {height} pixels, fewer than {MIN_SIDE} on a side.",
            "Use a larger picture of the face.",
        )


def _pixels(name: str, image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
    _check_size(name, image.width, image.height, max_pixels)
    try:
        image.load()
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, … by format
        raise _broken(name, error) from None
    try:
        return _to_rgb(_upright(image))
    except Exception as error:
        raise BrokenPicture(
            f"{name} has colours (mode {image.mode}) that cannot be read: {_sentence(error)}.",
            "Open it in an image editor and save it as PNG or JPEG.",
        ) from None


def _broken(name: str, error: Exception) -> BadPicture:
    return BrokenPicture(
        f"{name} is truncated or broken: {_sentence(error)}.", "Save or download it again."
    )


def _sentence(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a broken EXIF block is no reason to refuse good pixels."""
    try:
        # Asked first, because the other makes a copy of the pixels in any case.
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """RGB, uint8 [H, W, 3], of a decoded image in any mode; raises ValueError for those without."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _band_to_rgb(image.crop((0, top, width, bottom)))
    return pixels


def _band_to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(np.asarray(image))[:, :, None]
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scale 16-bit grey [H, W] to 8 bits, rounding to nearest.

    PIL's own conversion clips at 255, which turns a 16-bit picture white. Wider numbers (32-bit
    integers beyond 16 bits, floats) say nothing about what white is, so they are refused.
    """
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError("floating-point pixels have no defined white")
    wide = values.astype(np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > 65535):
        raise ValueError("32-bit pixels have no defined white")
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
MARGIN = 6
INK, PAPER = (40, 40, 40), (255, 255, 255)


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    column_labels: Sequence[str],
    cell: int,
    first_column: Sequence[Image.Image] = (),
    first_label: str = "face",
) -> Image.Image:
    """Arrange pictures with a label over each column, scaled to `cell` pixels square.

    `first_column` (one per row) is set apart at the left: the faces that the rows show.
    """
    font = ImageFont.load_default(size=max(11, cell // 13))
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [first_label, *column_labels] if first_column else list(column_labels)
    wrapped = [_wrap(probe, text, font, cell) for text in labels]
    header = max(int(probe.multiline_textbbox((0, 0), text, font=font)[3]) for text in wrapped)
    header += 2 * MARGIN
    step = cell + MARGIN
    gap = MARGIN * 2 if first_column else 0
    sheet = Image.new("RGB", (MARGIN + step * len(labels) + gap, header + step * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)

    def left(column: int) -> int:
        return MARGIN + step * column + (gap if column > 0 else 0)

    for column, text in enumerate(wrapped):
        draw.multiline_text((left(column), MARGIN), text, fill=INK, font=font)
    for index, row in enumerate(rows):
        pictures = [first_column[index], *row] if first_column else row
        for column, picture in enumerate(pictures):
            # Small pictures are enlarged without smoothing twice: bicubic keeps them honest.
            scaled = picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(scaled, (left(column), header + step * index))
    return sheet
