"""The one thing that is read of a picture's EXIF block: which way up it is.

A general reader copies the values of all entries. Entries may point at the same bytes, so that a
block of 64 kB can ask for hundreds of megabytes; here nothing is copied, and entries are counted.
The layout is that of TIFF 6.0, section 2; the tag and its values are those of EXIF 2.3, 4.6.4.
"""

import struct

import numpy as np

from fastface_trt.serving.work import Pixels

MAX_ENTRIES = 512
"""Entries looked at; cameras write some dozens, in rising order, and the tag is a low one."""

_ORIENTATION, _SHORT = 0x0112, 3


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
