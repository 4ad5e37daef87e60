"""From a stranger's picture, as a request holds it, to pixels.

What is bounded, and how a file is taken apart before a decoder sees it, is `runtime.intake`'s.
"""

import base64
import binascii

from fastface_trt.errors import BadPicture
from fastface_trt.runtime.images import BrokenPicture, load_picture
from fastface_trt.runtime.intake import boxed_format
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import Pixels

_DATA_URL_HEADER = 200
"""Characters within which a data: URL must come to its data."""
_NOT_PICTURES = ("image/svg+xml",)
"""Media types of data: URLs that are refused by name; other pictures are known by their content."""
_PIECE = 1 << 20
_URL_SAFE, _LINE_BREAKS = bytes.maketrans(b"-_", b"+/"), b" \t\r\n"
_READ = ("PNG", "JPEG", "WEBP")
_READ_WHOLE = ("HEIF", "AVIF")
"""Where the operator allows it; their decoders see files that nobody took apart."""


def decode_base64(text: str, settings: ServerSettings) -> bytes:
    """The bytes of a picture given as base64, or as a `data:` URL (RFC 2397) of a picture.

    Either alphabet of RFC 4648 (`+/` or `-_`), with or without padding and line breaks. Raises
    `BadPicture` for anything else, and where it would be more than `max_body_bytes`.
    """
    text = text.lstrip()
    if text[:5].lower() == "data:":
        header, comma, _ = text[:_DATA_URL_HEADER].partition(",")
        media, *parameters = (part.strip() for part in header[5:].lower().split(";"))
        picture = media.startswith("image/") and media not in _NOT_PICTURES
        # Without a type, or with that of any bytes, it may be one.
        picture = picture or media in ("", "application/octet-stream")
        if not comma or parameters[-1:] != ["base64"] or not picture:
            raise BadPicture(
                "The data: URL of the picture is of no kind that is read here.",
                "Begin it with data:image/png;base64, or the type that it has.",
            )
        text = text[len(header) + 1 :]
    elif text[:8].lower().startswith(("http://", "https://")):
        raise BadPicture(
            "The picture is given as an address where base64 belongs.",
            "Send the picture itself, or for a picture to be made its address as face_url.",
        )
    try:
        padded = text.encode("ascii").translate(_URL_SAFE, _LINE_BREAKS)
        digits = padded.rstrip(b"=")
        if len(digits) * 3 // 4 > settings.max_body_bytes:
            raise BadPicture(
                f"The picture has more than {settings.max_body_bytes:,} bytes.",
                "Scale it down first.",
            )
        if len(padded) - len(digits) > 2:
            raise ValueError("more padding than there can be")
        digits += b"=" * (-len(digits) % 4)
        # Piece by piece, since no other thread runs while one is decoded.
        pieces = (digits[at : at + _PIECE] for at in range(0, len(digits), _PIECE))
        return b"".join(base64.b64decode(piece, validate=True) for piece in pieces)
    except (binascii.Error, ValueError):
        raise BadPicture(
            "The picture is not base64.", "Send its bytes in base64 (RFC 4648), or a data: URL."
        ) from None


def decode_picture(data: bytes, settings: ServerSettings) -> Pixels:
    """The pixels of a PNG, JPEG or WebP file: RGB, uint8 [H, W, 3], upright, owned by the caller.

    Where the operator allows it, HEIC and AVIF are read too. It takes up to some 20 bytes of
    memory per pixel while it runs, so a server calls it on few threads. Raises `BadPicture`, and
    nothing else, for whatever `data` holds; its sentence tells nothing about this machine or its
    libraries.
    """
    boxed = boxed_format(data[:64])
    if boxed is not None and not settings.heif:
        raise BadPicture(
            f"The picture is a {'HEIC' if boxed == 'HEIF' else boxed} file, and this server reads "
            "PNG, JPEG and WebP.",
            "Save it as JPEG, or start the server with --heif.",
        )
    try:
        return load_picture(
            data,
            max_bytes=settings.max_body_bytes,
            max_pixels=settings.max_picture_pixels,
            formats=_READ + (_READ_WHOLE if boxed else ()),
        )
    except BrokenPicture:  # its reason is what a library said
        raise BadPicture(
            "The picture is truncated or broken.", "Save or download it again."
        ) from None
