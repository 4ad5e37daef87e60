"""From what a stranger sends to pixels: every limit is checked before the step that it bounds."""

import base64
import binascii

from fastface_trt.errors import BadPicture
from fastface_trt.runtime.images import MIN_SIDE, load_picture
from fastface_trt.serving.exif import upright
from fastface_trt.serving.picture_files import broken, read_picture_file
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import Pixels

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
_HEADER = 64
"""Characters within which a data: URL must come to its data."""


def decode_base64(text: str, settings: ServerSettings) -> bytes:
    """The bytes of a picture given as base64, or as a `data:` URL of one of `MEDIA_TYPES`.

    The standard alphabet with padding and without line breaks (RFC 4648, chapter 4). Raises
    `BadPicture` for anything else, and where it would be more than `max_body_bytes`.
    """
    if text[:5].lower() == "data:":
        header, comma, _ = text[:_HEADER].partition(",")
        media, mark, encoding = header[5:].lower().partition(";")
        if not comma or not mark or encoding != "base64" or media not in MEDIA_TYPES:
            raise BadPicture(
                "The data: URL of the picture is of no kind that is read here.",
                f"Begin it with data:TYPE;base64, where TYPE is {' or '.join(MEDIA_TYPES)}.",
            )
        text = text[len(header) + 1 :]
    size = len(text) // 4 * 3 - text[-2:].count("=")
    if size > settings.max_body_bytes:
        raise _too_many_bytes(settings)
    try:
        if len(text) % 4:
            raise ValueError
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise BadPicture(
            "The picture is not base64.",
            "Use the standard alphabet, with padding and without line breaks.",
        ) from None


def decode_picture(data: bytes, settings: ServerSettings) -> Pixels:
    """The pixels of a PNG, JPEG or WebP file: RGB, uint8 [H, W, 3], upright, owned by the caller.

    The format is known by its content, the size by its header, before anything is decoded, and a
    decoder sees only what pixels need: see `picture_files`. It takes up to some 35 bytes of memory
    per pixel while it runs, so a server calls it on few threads. Raises `BadPicture`, and nothing
    else, for whatever `data` holds; its sentence tells nothing about this machine or its libraries.
    """
    if len(data) > settings.max_body_bytes:
        raise _too_many_bytes(settings)
    file = read_picture_file(data)
    limit = settings.max_picture_pixels
    if file.width * file.height > limit:
        raise BadPicture(
            f"The picture has {file.width} × {file.height} pixels; at most {limit:,} are taken.",
            "Scale it down first.",
        )
    if min(file.width, file.height) < MIN_SIDE:
        raise BadPicture(
            f"The picture has {file.width} × {file.height} pixels, "
            f"fewer than {MIN_SIDE} on a side.",
            "Use a larger picture of the face.",
        )
    try:
        pixels = load_picture(file.data, max_pixels=limit, formats=(file.format,))
    except BadPicture:  # its reason is what a library said
        raise broken() from None
    return upright(pixels, file.orientation)


def _too_many_bytes(settings: ServerSettings) -> BadPicture:
    return BadPicture(
        f"The picture has more than {settings.max_body_bytes:,} bytes.", "Scale it down first."
    )
