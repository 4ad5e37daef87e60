"""The parts that hostile PNG, JPEG and WebP files are made of."""

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
