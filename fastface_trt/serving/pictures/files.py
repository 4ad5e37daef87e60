"""From a stranger's picture file to pixels: every limit is checked before the step that it bounds.

PNG, JPEG and WebP are all lists of marked parts. They are walked here without decoding any, and the
file is put together again from those parts that pixels need. Comments, colour profiles, previews,
further frames, EXIF blocks and what hangs behind the end never meet a decompressor or a parser that
was made for files of friends. What the walk counts on the way (size, scans, parts) is bounded.

Of an EXIF block only the orientation is read. A general reader copies the values of all entries,
and entries may point at the same bytes, so that a block of 64 kB can ask for hundreds of megabytes;
here nothing is copied, and entries are counted.

Sources: PNG (W3C, third edition), chapter 5; JPEG (ITU T.81), annex B; WebP (RFC 9649); TIFF 6.0,
section 2, for the layout of EXIF blocks and EXIF 2.3, 4.6.4, for the tag and its values.
"""

import base64
import binascii
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastface_trt.errors import BadPicture
from fastface_trt.runtime.images import MIN_SIDE, BadPictureSize, boxed_format, load_picture
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import Pixels

_DATA_URL_HEADER = 200
"""Characters within which a data: URL must come to its data."""
_NOT_PICTURES = ("image/svg+xml",)
"""Media types of data: URLs that are refused by name; other pictures are known by their content."""
_PIECE = 1 << 20
_URL_SAFE, _LINE_BREAKS = bytes.maketrans(b"-_", b"+/"), b" \t\r\n"
MAX_PARTS = 20_000
"""Chunks or segments; a PNG of 20 MB in the usual 8 kB chunks has 2,500, and a walk takes time."""
MAX_SCANS = 40
"""Scans of a JPEG. Usual progressive files have about ten; each makes the decoder pass over the
whole picture, even where it holds no data."""
MAX_ENTRIES = 512
"""Entries looked at; cameras write some dozens, in rising order, and the tag is a low one."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256}
"""Chunks beside the pixels' own that change them, and the longest that PNG allows."""
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_SIZES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_JPEG_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
_ORIENTATION, _SHORT = 0x0112, 3


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
            raise _too_many_bytes(settings)
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

    The format is known by its content, the size by its header, before anything is decoded, and a
    decoder sees only what pixels need: see `read_picture_file`. Where the operator allows it, HEIC
    and AVIF are read too, whose decoders see the whole file. It takes up to some 35 bytes of
    memory per pixel while it runs, so a server calls it on few threads. Raises `BadPicture`, and
    nothing else, for whatever `data` holds; its sentence tells nothing about this machine or its
    libraries.
    """
    if len(data) > settings.max_body_bytes:
        raise _too_many_bytes(settings)
    limit = settings.max_picture_pixels
    boxed = boxed_format(data[:64])
    if settings.heif and boxed is not None:
        return _decoded(data, boxed, limit)
    file = read_picture_file(data)
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
    return upright(_decoded(file.data, file.format, limit), file.orientation)


def _decoded(data: bytes, form: str, max_pixels: int) -> Pixels:
    try:
        return load_picture(data, max_pixels=max_pixels, formats=(form,))
    except BadPictureSize:
        raise
    except BadPicture:  # its reason is what a library said
        raise broken() from None


def _too_many_bytes(settings: ServerSettings) -> BadPicture:
    return BadPicture(
        f"The picture has more than {settings.max_body_bytes:,} bytes.", "Scale it down first."
    )


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture file without anything that its pixels do not need.

    format: PIL's name. width, height: pixels as stored, read from the header. orientation: 1 to 8,
    see `upright`. data: the file put together again.
    """

    format: str
    width: int
    height: int
    orientation: int
    data: bytes


def read_picture_file(data: bytes) -> PictureFile:
    """Walk a PNG, JPEG or WebP file, known by its content; raises `BadPicture`."""
    boxed = boxed_format(data[:64])
    if boxed is not None:
        raise BadPicture(
            f"The picture is a {'HEIC' if boxed == 'HEIF' else boxed} file, and this server reads "
            "PNG, JPEG and WebP.",
            "Save it as JPEG, or start the server with --heif.",
        )
    if not data:
        raise BadPicture("The picture is empty.", "Save or download it again.")
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    raise BadPicture(
        "The picture is not a PNG, JPEG or WebP file.",
        "Open it in an image editor and save it as PNG or JPEG.",
    )


def broken() -> BadPicture:
    """The one error for all that is wrong inside a file; a stranger learns no more."""
    return BadPicture("The picture is truncated or broken.", "Save or download it again.")


def _png(data: bytes) -> PictureFile:
    kept, size, orientation = [_PNG], (0, 0), None
    at = len(_PNG)
    for part in range(MAX_PARTS):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data) or (kind == b"IHDR") != (part == 0):
            raise broken()
        body = slice(at + 8, end - 4)
        if kind == b"IHDR":
            if length != 13:
                raise broken()
            header = data[body]
            size = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
        if kind in (b"IDAT", b"IEND") or length <= _PNG_KEPT.get(kind, -1):
            kept.append(data[at:end])
        if kind == b"eXIf" and orientation is None:
            orientation = orientation_of(data[body])
        if kind == b"IEND":
            return PictureFile("PNG", *size, orientation or 1, b"".join(kept))
        at = end
    raise broken()


def _jpeg(data: bytes) -> PictureFile:
    kept, size, orientation = [b"\xff\xd8"], (0, 0), None
    at, scans = 2, 0
    for _ in range(MAX_PARTS):
        if data[at : at + 1] != b"\xff":
            raise broken()
        while data[at + 1 : at + 2] == b"\xff":  # fill bytes before a marker
            at += 1
        marker = data[at + 1] if at + 1 < len(data) else 0
        if marker == 0xD9:
            return PictureFile("JPEG", *size, orientation or 1, b"".join([*kept, b"\xff\xd9"]))
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0x00, 0x01, *range(0xD0, 0xD9)) or end > len(data) or end < at + 4:
            raise broken()
        body = data[at + 4 : end]
        if marker in _JPEG_SIZES:
            if size != (0, 0) or len(body) < 6:
                raise broken()
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
        elif marker == 0xDA:
            scans += 1
            after = _MARKER_AFTER_SCAN.search(data, end)
            if scans > MAX_SCANS or after is None:
                raise broken()
            end = after.start()
        elif marker == 0xE1 and body.startswith(b"Exif\0\0") and orientation is None:
            orientation = orientation_of(body)
        # JFIF's and Adobe's segments tell which colours the components are.
        colours = (marker == 0xE0 and body[:5] == b"JFIF\0") or (
            marker == 0xEE and body[:5] == b"Adobe"
        )
        if marker in _JPEG_SIZES or marker in _JPEG_TABLES or marker == 0xDA or colours:
            kept.append(data[at:end])
        at = end
    raise broken()


def _webp(data: bytes) -> PictureFile:
    parts = dict[bytes, bytes]()
    orientation = 1
    for kind, body in _riff(data):
        # Of an animation, the first frame.
        parts.setdefault(kind, body)
        if kind in (b"VP8 ", b"VP8L") and b"VP8X" not in parts:
            break
    kept: dict[bytes, bytes]
    extended = parts.get(b"VP8X")
    if extended is None:
        kept = {kind: parts[kind] for kind in (b"VP8 ", b"VP8L") if kind in parts}
    else:
        if len(extended) != 10:
            raise broken()
        # Of its flags, those for what is kept: alpha and animation.
        kept = {b"VP8X": bytes([extended[0] & 0x12]) + extended[1:]}
        kept |= {
            kind: parts[kind]
            for kind in (b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
            if kind in parts
        }
        orientation = orientation_of(parts.get(b"EXIF", b""))
    if not kept:
        raise broken()
    chunks = b"".join(
        kind + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)
        for kind, body in kept.items()
    )
    file = b"RIFF" + (len(chunks) + 4).to_bytes(4, "little") + b"WEBP" + chunks
    return PictureFile("WEBP", *_webp_size(*next(iter(kept.items()))), orientation, file)


def _riff(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise broken()
    at = 12
    for _ in range(MAX_PARTS):
        if at + 8 > end:
            return
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + length > end:
            raise broken()
        yield data[at : at + 4], data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    raise broken()


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8 " and len(body) >= 10:
        return (
            int.from_bytes(body[6:8], "little") & 0x3FFF,
            int.from_bytes(body[8:10], "little") & 0x3FFF,
        )
    if kind == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise broken()


def orientation_of(block: bytes) -> int:
    """The orientation, 1 to 8, of an EXIF block (TIFF, with or without "Exif" before it).

    A block that is broken, or says nothing, is upright (1).
    """
    tiff = block[6:] if block.startswith(b"Exif\0\0") else block
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(min(count, MAX_ENTRIES)):
            tag, kind, _, value = struct.unpack_from(f"{order}HHLH", tiff, start + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and 1 <= value <= 8 else 1
    except struct.error:  # an offset beyond the end
        pass
    return 1


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """The stored picture (RGB, uint8 [H, W, 3]) turned as its orientation, 1 to 8, says."""
    if orientation >= 5:  # stored with rows and columns exchanged
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
