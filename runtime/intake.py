"""From anybody's picture file to a file of nothing but pixels: the one door for all pictures.

PNG, JPEG, WebP, TIFF and BMP are all lists of marked parts. They are walked here without decoding
any, and the file is put together again from those parts that pixels need. Comments, colour
profiles, previews, further frames, EXIF blocks and what hangs behind the end never meet a
decompressor or a parser that was made for files of friends. What the walk counts on the way (size,
scans, parts) is bounded, and with it what decoding takes: time and memory follow from the pixels
and the bytes of a file, not from what it says about itself.

Of an EXIF block one entry is read, mostly the orientation. A general reader copies the values of
all entries, and entries may point at the same bytes, so that a block of 64 kB can ask for hundreds
of megabytes; here nothing else is copied, and entries are counted.

HEIC and AVIF are not taken apart: their decoders see whole files, bounded by bytes and by the size
that is told before decoding.

Sources: PNG (W3C, third edition), chapter 5; JPEG (ITU T.81), annex B; WebP (RFC 9649); TIFF 6.0
and its supplements 1 and 2, BigTIFF (libtiff's design); EXIF 2.3, 4.6.4; BMP (Windows GDI,
BITMAPV5HEADER).
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_PARTS = 20_000
"""Chunks, segments or strips; a PNG of 20 MB in the usual 8 kB chunks has 2,500, and a walk takes
time. Files that are large for their many parts may have one for each 4 kB."""
MAX_SCANS = 40
"""Scans of a JPEG. Usual progressive files have about ten; each makes the decoder pass over the
whole picture, even where it holds no data."""
MAX_ENTRIES = 512
"""Entries of a directory looked at; cameras write some dozens, in rising order."""
_MAX_PADDING = 1_000_000
"""Pixels that the tiles of a TIFF may have beyond four times the picture's own."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256}
"""Chunks beside the pixels' own that change them, and the longest that PNG allows."""
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_SIZES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_JPEG_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
_DESCRIPTION, _ORIENTATION, _ASCII, _SHORT = 0x010E, 0x0112, 2, 3
_BRANDS: Mapping[str, tuple[bytes, ...]] = {
    "AVIF": (b"avif", b"avis"),
    "HEIF": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
}
_NO_END = "Save or download it again."
_CONVERT = "Open it in an image editor and save it as PNG or JPEG."


class Refused(Exception):
    """Why a file is not read: `message` goes on after the picture's name, `hint` is a sentence."""

    def __init__(self, message: str = "is truncated or broken", hint: str = _NO_END) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


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


def format_of(beginning: bytes) -> str | None:
    """PIL's name of the format of a file that begins so (64 bytes), None for those of no use."""
    if beginning.startswith(_PNG):
        return "PNG"
    if beginning.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP":
        return "WEBP"
    if beginning[:2] == b"BM":
        return "BMP"
    if beginning[:4] in _TIFF_KINDS:
        return "TIFF"
    return boxed_format(beginning)


def boxed_format(beginning: bytes) -> str | None:
    """PIL's name of the format of a file in ISO's boxes: HEIF (iPhones' HEIC), AVIF, or None.

    The first box names the file's brand and those it is compatible with (ISO/IEC 14496-12, 4.3).
    """
    if beginning[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(beginning[:4], "big"), len(beginning))
    brands = {beginning[8:12], *(beginning[at : at + 4] for at in range(16, end, 4))}
    return next((kind for kind, known in _BRANDS.items() if brands.intersection(known)), None)


def take_apart(data: bytes) -> PictureFile:
    """Walk a PNG, JPEG, WebP, TIFF or BMP file, known by its content; raises `Refused`."""
    walk = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "TIFF": _tiff, "BMP": _bmp}
    return walk[format_of(data[:64]) or ""](data)


def _parts(data: bytes) -> Iterator[int]:
    """Numbers of parts, for as many as a file of this size may have."""
    most = max(MAX_PARTS, len(data) // 4096)
    yield from range(most)
    raise Refused(f"has more than {most:,} parts", _CONVERT)


def _png(data: bytes) -> PictureFile:
    whole = memoryview(data)
    kept, size, orientation = [whole[: len(_PNG)]], (0, 0), None
    at = len(_PNG)
    for part in _parts(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data) or (kind == b"IHDR") != (part == 0):
            raise Refused
        body = slice(at + 8, end - 4)
        if kind == b"IHDR":
            if length != 13:
                raise Refused
            header = data[body]
            size = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
        if kind in (b"IDAT", b"IEND") or length <= _PNG_KEPT.get(kind, -1):
            kept.append(whole[at:end])
        if kind == b"eXIf" and orientation is None:
            orientation = orientation_of(data[body])
        if kind == b"IEND":
            return PictureFile("PNG", *size, orientation or 1, b"".join(kept))
        at = end
    raise Refused


def _jpeg(data: bytes) -> PictureFile:
    whole = memoryview(data)
    kept, size, orientation = [whole[:2]], (0, 0), None
    at, scans = 2, 0
    for _ in _parts(data):
        if data[at : at + 1] != b"\xff":
            raise Refused
        while data[at + 1 : at + 2] == b"\xff":  # fill bytes before a marker
            at += 1
        marker = data[at + 1] if at + 1 < len(data) else 0
        if marker == 0xD9:
            return PictureFile("JPEG", *size, orientation or 1, b"".join([*kept, b"\xff\xd9"]))
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0x00, 0x01, *range(0xD0, 0xD9)) or end > len(data) or end < at + 4:
            raise Refused
        body = data[at + 4 : end]
        if marker in _JPEG_SIZES:
            if size != (0, 0) or len(body) < 6:
                raise Refused
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
        elif marker == 0xDA:
            scans += 1
            after = _MARKER_AFTER_SCAN.search(data, end)
            if scans > MAX_SCANS:
                raise Refused(f"has more than {MAX_SCANS} scans", _CONVERT)
            if after is None:
                raise Refused
            end = after.start()
        elif marker == 0xE1 and body.startswith(b"Exif\0\0") and orientation is None:
            orientation = orientation_of(body)
        # JFIF's and Adobe's segments tell which colours the components are.
        colours = (marker == 0xE0 and body[:5] == b"JFIF\0") or (
            marker == 0xEE and body[:5] == b"Adobe"
        )
        if marker in _JPEG_SIZES or marker in _JPEG_TABLES or marker == 0xDA or colours:
            kept.append(whole[at:end])
        at = end
    raise Refused


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
            raise Refused
        # Of its flags, those for what is kept: alpha and animation.
        kept = {b"VP8X": bytes([extended[0] & 0x12]) + extended[1:]}
        kept |= {
            kind: parts[kind]
            for kind in (b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
            if kind in parts
        }
        orientation = orientation_of(parts.get(b"EXIF", b""))
    if not kept:
        raise Refused
    chunks = b"".join(
        kind + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)
        for kind, body in kept.items()
    )
    file = b"RIFF" + (len(chunks) + 4).to_bytes(4, "little") + b"WEBP" + chunks
    return PictureFile("WEBP", *_webp_size(*next(iter(kept.items()))), orientation, file)


def _riff(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise Refused
    at = 12
    for _ in _parts(data):
        if at + 8 > end:
            return
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + length > end:
            raise Refused
        yield data[at : at + 4], data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


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
    raise Refused


_BMP_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})
_BMP_PLAIN = frozenset({0, 3})
"""Rows as they are, with or without masks for the colours."""


def _bmp(data: bytes) -> PictureFile:
    """A BMP of rows that are stored in full: what decodes it reads every byte once."""
    header = int.from_bytes(data[14:18], "little")
    if header not in _BMP_HEADERS or len(data) < 14 + header:
        raise Refused
    compression = 0
    if header == 12:
        width, height, _, depth = struct.unpack_from("<4H", data, 18)
    else:
        width, height, _, depth, compression = struct.unpack_from("<2l2HL", data, 18)
    if compression not in _BMP_PLAIN:
        raise Refused("is a BMP file of compressed rows, which are not read", _CONVERT)
    height = abs(height)  # a negative one: from top to bottom
    stride = (width * depth + 31) // 32 * 4
    if width <= 0 or int.from_bytes(data[10:14], "little") + stride * height > len(data):
        raise Refused
    return PictureFile("BMP", width, height, 1, data)


_TIFF_KINDS: Mapping[bytes, tuple[str, str, str, int]] = {
    b"II*\0": ("<", "L", "H", 8),
    b"MM\0*": (">", "L", "H", 8),
    b"II+\0": ("<", "Q", "Q", 16),
    b"MM\0+": (">", "Q", "Q", 16),
}
"""By their beginnings: byte order, what an offset and what the number of entries is, and where the
header ends. The last two are BigTIFF."""
_TIFF_SIZES = {1: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}
"""Bytes of a value by its type; other types are in no field that is kept."""
_LONG, _LONG8 = 4, 16
_NUMBERS = {1: "B", 3: "H", _LONG: "L", _LONG8: "Q"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION = 256, 257, 258, 259
_STRIPS, _SAMPLES, _ROWS, _STRIP_SIZES, _PLANES = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 322, 323, 324, 325
_TIFF_KEPT = frozenset(
    {
        *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS, _PLANES),
        *(_STRIPS, _STRIP_SIZES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES, _ORIENTATION),
        262,  # what the samples mean
        266,  # the order of bits
        317,  # differences in place of values
        320,  # the palette
        338,  # what further samples mean
        339,  # whole or floating-point numbers
        347,  # tables of JPEG strips
        *(529, 530, 531, 532),  # YCbCr
    }
)
_TIFF_JPEG = 7
_TIFF_COMPRESSIONS = frozenset({1, 5, _TIFF_JPEG, 8, 32773, 32946})
"""None, LZW, JPEG, deflate, PackBits: those that pictures come in, whose work is bounded here."""
_MAX_FIELD = 1_000_000
"""Bytes of one field; the longest are the lists of strips."""


def _tiff(data: bytes) -> PictureFile:
    """The first picture of a TIFF: its fields and strips are copied into a file of their own."""
    order, *_ = _TIFF_KINDS[data[:4]]
    try:
        fields = _tiff_fields(data)
        width, height = _one(order, fields, _WIDTH), _one(order, fields, _HEIGHT)
        orientation = _one(order, fields, _ORIENTATION, 1)
        strips = _tiff_strips(data, order, fields, width, height)
    except (struct.error, OverflowError, LookupError):  # beyond the end, a field that is not there
        raise Refused from None
    mark = b"II*\0" if order == "<" else b"MM\0*"
    kept: list[bytes | memoryview] = []
    offsets, at = [], 8
    for strip in strips:
        offsets.append(at)
        kept += [strip, bytes(len(strip) % 2)]
        at += len(strip) + len(strip) % 2
    of_tiles, of_strips = (_TILES, _TILE_SIZES), (_STRIPS, _STRIP_SIZES)
    kind_of_parts, others = (of_tiles, of_strips) if _TILES in fields else (of_strips, of_tiles)
    for tag, values in zip(kind_of_parts, (offsets, map(len, strips)), strict=True):
        fields[tag] = _LONG, struct.pack(f"{order}{len(strips)}L", *values)
    for tag in (*others, _ORIENTATION):  # of both kinds readers choose as they like
        fields.pop(tag, None)
    beyond = at + 2 + 12 * len(fields) + 4
    directory, values_beyond = [struct.pack(f"{order}H", len(fields))], []
    for tag, (kind, value) in sorted(fields.items()):
        directory.append(struct.pack(f"{order}HHL", tag, kind, len(value) // _TIFF_SIZES[kind]))
        if len(value) <= 4:
            directory.append(value.ljust(4, b"\0"))
            continue
        directory.append(struct.pack(f"{order}L", beyond))
        values_beyond.append(value + bytes(len(value) % 2))
        beyond += len(values_beyond[-1])
    file = b"".join(
        [mark, struct.pack(f"{order}L", at), *kept, *directory, bytes(4), *values_beyond]
    )
    return PictureFile("TIFF", width, height, orientation if 1 <= orientation <= 8 else 1, file)


def _tiff_fields(data: bytes) -> dict[int, tuple[int, bytes]]:
    """Type and value of the fields of the first directory that pixels need, by tag."""
    order, word, count_word, end = _TIFF_KINDS[data[:4]]
    inline = struct.calcsize(f"={word}")
    (at,) = struct.unpack_from(f"{order}{word}", data, end - inline)
    (count,) = struct.unpack_from(f"{order}{count_word}", data, at)
    if count > MAX_ENTRIES:
        raise Refused(f"has more than {MAX_ENTRIES} entries in its directory", _CONVERT)
    at += struct.calcsize(f"={count_word}")
    fields = {}
    for entry in range(at, at + count * (4 + 2 * inline), 4 + 2 * inline):
        tag, kind, number = struct.unpack_from(f"{order}HH{word}", data, entry)
        if tag not in _TIFF_KEPT or tag in fields:
            continue
        length = number * _TIFF_SIZES[kind]
        where = entry + 4 + inline
        if length > inline:
            (where,) = struct.unpack_from(f"{order}{word}", data, where)
        value = data[where : where + length]
        if not 0 < len(value) == length <= _MAX_FIELD:
            raise Refused
        if kind == _LONG8:
            longs = struct.unpack(f"{order}{number}Q", value)
            kind, value = _LONG, struct.pack(f"{order}{number}L", *longs)
        fields[tag] = kind, value
    return fields


def _numbers(order: str, fields: Mapping[int, tuple[int, bytes]], tag: int) -> tuple[int, ...]:
    kind, value = fields[tag]
    return struct.unpack(f"{order}{len(value) // _TIFF_SIZES[kind]}{_NUMBERS[kind]}", value)


def _one(
    order: str, fields: Mapping[int, tuple[int, bytes]], tag: int, default: int | None = None
) -> int:
    if tag not in fields and default is not None:
        return default
    return _numbers(order, fields, tag)[0]


def _tiff_strips(
    data: bytes, order: str, fields: Mapping[int, tuple[int, bytes]], width: int, height: int
) -> list[memoryview]:
    """The strips or tiles: as many as the size asks for, and no more bytes than the file has."""
    compression = _one(order, fields, _COMPRESSION, 1)
    if compression not in _TIFF_COMPRESSIONS:
        raise Refused("is a TIFF file in a compression that is not read", _CONVERT)
    tiled = _TILES in fields
    if tiled:
        across, down = _one(order, fields, _TILE_WIDTH), _one(order, fields, _TILE_HEIGHT)
    else:
        across, down = width, min(_one(order, fields, _ROWS, height), height)
    if min(width, height, across, down) == 0:
        raise Refused
    columns, rows = -(-width // across), -(-height // down)
    if columns * rows * across * down > 4 * width * height + _MAX_PADDING:
        raise Refused
    planes = _one(order, fields, _SAMPLES, 1) if _one(order, fields, _PLANES, 1) == 2 else 1
    number = columns * rows * planes
    offsets = _numbers(order, fields, _TILES if tiled else _STRIPS)[:number]
    sizes = _numbers(order, fields, _TILE_SIZES if tiled else _STRIP_SIZES)[:number]
    if number > MAX_PARTS:
        raise Refused(f"has more than {MAX_PARTS:,} strips", _CONVERT)
    if not len(offsets) == len(sizes) == number or sum(sizes) > len(data):
        raise Refused
    whole = memoryview(data)
    strips = [whole[at : at + size] for at, size in zip(offsets, sizes, strict=True)]
    if any(len(strip) != size for strip, size in zip(strips, sizes, strict=True)):
        raise Refused
    if compression == _TIFF_JPEG:
        for strip in strips:
            picture = _jpeg(bytes(strip))
            if picture.width > across or picture.height > down:
                raise Refused
    return strips


def orientation_of(block: bytes) -> int:
    """The orientation, 1 to 8, of an EXIF block (TIFF, with or without "Exif" before it).

    A block that is broken, or says nothing, is upright (1).
    """
    kind, number, value = _exif_entry(block, _ORIENTATION)
    orientation = int.from_bytes(value, "big")
    return orientation if kind == _SHORT and number > 0 and 1 <= orientation <= 8 else 1


def description_of(block: bytes) -> str | None:
    """The description of the picture in an EXIF block, None where there is none."""
    kind, _, value = _exif_entry(block, _DESCRIPTION)
    return value.rstrip(b"\0").decode("latin-1") if kind == _ASCII else None


def _exif_entry(block: bytes, wanted: int) -> tuple[int, int, bytes]:
    """Type, number and value of an entry of the first directory; type 0 where there is none.

    Of text the value is all of it, of whole numbers the first one's bytes, highest first.
    """
    tiff = block[6:] if block.startswith(b"Exif\0\0") else block
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 0, 0, b""
    try:
        (start,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * min(count, MAX_ENTRIES), 12):
            tag, kind, number, where = struct.unpack_from(f"{order}HHLL", tiff, at)
            if tag == wanted and kind == _ASCII:
                where = where if number > 4 else at + 8
                return kind, number, tiff[where : where + number]
            if tag == wanted:
                (first,) = struct.unpack_from(f"{order}H", tiff, at + 8)
                return kind, number, first.to_bytes(2, "big")
    except struct.error:  # an offset beyond the end
        pass
    return 0, 0, b""


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The stored picture (RGB, uint8 [H, W, 3]) turned as its orientation, 1 to 8, says."""
    if orientation >= 5:  # stored with rows and columns exchanged
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
