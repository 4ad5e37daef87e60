"""The parts that hostile picture files are made of."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIDE = 24


def encoded(form, image=None, **options):
    """A small good picture as a file."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([y * 10, x * 10, x + y], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    (image or Image.fromarray(pixels)).save(buffer, form, **options)
    return buffer.getvalue()


# PNG


def chunk(kind, body=b"", crc=None):
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def ihdr(width=SIDE, height=SIDE, depth=8, colour=2, compression=0, filtering=0, interlace=0):
    fields = width, height, depth, colour, compression, filtering, interlace
    return chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))


def rows(width=SIDE, height=SIDE, bits=24, filter_type=0):
    """The compressed rows of a black picture."""
    packer = zlib.compressobj(9)
    row = bytes([filter_type]) + bytes((width * bits + 7) // 8)
    return b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def good_png(*extra, data=None):
    """A good picture with further chunks before its pixels."""
    return png(ihdr(), *extra, chunk(b"IDAT", data or rows()), chunk(b"IEND"))


# JPEG


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def sof(width, height, marker=0xC0, precision=8, components=((1, 0x11), (2, 0x11), (3, 0x11))):
    body = struct.pack(">BHHB", precision, height, width, len(components))
    return segment(
        marker, body + b"".join(bytes([name, factors, 0]) for name, factors in components)
    )


def jpeg_tables(data):
    """The quantisation and Huffman tables of a file that PIL wrote."""
    at, found = 2, []
    while data[at + 1] != 0xDA:
        length = struct.unpack(">H", data[at + 2 : at + 4])[0]
        if data[at + 1] in (0xDB, 0xC4):
            found.append(data[at : at + 2 + length])
        at += 2 + length
    return b"".join(found)


def jpeg(*segments):
    return b"\xff\xd8" + b"".join(segments) + b"\xff\xd9"


def sos(names=(1, 2, 3), start=0, end=63, bits=0, data=b"\0" * 8):
    body = bytes([len(names)]) + b"".join(bytes([name, 0]) for name in names)
    return segment(0xDA, body + bytes([start, end, bits])) + data


def after_start(data, *segments):
    """A file with further segments after its beginning."""
    return data[:2] + b"".join(segments) + data[2:]


# EXIF


def exif_tiff(entries, order="<"):
    """A TIFF block of (tag, type, count, value or offset)."""
    packed = b"".join(struct.pack(f"{order}HHLL", *entry) for entry in entries)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}LH", 8, len(entries)) + packed + bytes(4)


def exif_bomb(entries=200, block=4096):
    """Every entry says that its value is the whole block."""
    listed = [(1000 + at, 7, block - 8, 8) for at in range(entries)]
    return exif_tiff(listed).ljust(block, b"x")


# WebP


def riff(*chunks, size=None):
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def webp_chunk(kind, body=b"", size=None):
    size = len(body) if size is None else size
    return kind + struct.pack("<I", size) + body + b"\0" * (len(body) % 2)


def three(value):
    return struct.pack("<I", value)[:3]


def vp8x(width, height, flags=0):
    return webp_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + three(width - 1) + three(height - 1))


def webp_frame(data):
    """The chunk with the pixels of a simple WebP file."""
    return data[12:]


def anmf(frame, x=0, y=0, width=SIDE, height=SIDE):
    sizes = three(x) + three(y) + three(width - 1) + three(height - 1)
    return webp_chunk(b"ANMF", sizes + three(100) + b"\0" + frame)


# TIFF and BMP


def tiff(fields, *strips, order="<", big=False, count=None):
    """A file of fields, {tag: (type, values) or (type, number of values, where they are)}.

    The offsets and sizes of strips are added, unless a field says otherwise.
    """
    word, start = ("Q", 16) if big else ("L", 8)
    at, offsets = start, []
    for strip in strips:
        offsets.append(at)
        at += len(strip)
    fields = {273: (4, offsets), 279: (4, [len(strip) for strip in strips])} | fields
    width = struct.calcsize(f"={word}")
    entries, beyond = [], b""
    after = at + (8 if big else 2) + (4 + 2 * width) * len(fields) + width
    for tag, (kind, *told) in sorted(fields.items()):
        if len(told) == 2:
            number, value = told[0], struct.pack(f"{order}{word}", told[1])
        else:
            number = len(told[0])
            letter = {1: "B", 3: "H", 4: "L", 16: "Q"}[kind]
            value = struct.pack(f"{order}{number}{letter}", *told[0])
            if len(value) > width:
                place, beyond = after + len(beyond), beyond + value
                value = struct.pack(f"{order}{word}", place)
        entries.append(
            struct.pack(f"{order}HH{word}", tag, kind, number) + value.ljust(width, b"\0")
        )
    mark = {"<": b"II", ">": b"MM"}[order]
    mark += struct.pack(f"{order}HHH", 43, 8, 0) if big else struct.pack(f"{order}H", 42)
    number = struct.pack(f"{order}{'Q' if big else 'H'}", len(fields) if count is None else count)
    directory = number + b"".join(entries) + bytes(width) + beyond
    return mark + struct.pack(f"{order}{word}", at) + b"".join(strips) + directory


def grey(width=SIDE, height=SIDE, **more):
    """The fields of an 8-bit grey picture in one strip; `more` by names such as tag259."""
    fields = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: height}
    fields |= {int(name[3:]): value for name, value in more.items()}
    return {
        tag: value if isinstance(value, tuple) else (4, [value]) for tag, value in fields.items()
    }


def bmp(width=SIDE, height=SIDE, depth=24, compression=0, data=None, header=40):
    data = bytes((width * depth + 31) // 32 * 4 * abs(height)) if data is None else data
    fields = struct.pack("<LllHHLLllLL", header, width, height, 1, depth, compression, *[0] * 5)
    return b"BM" + struct.pack("<LHHL", 54 + len(data), 0, 0, 54) + fields + data
