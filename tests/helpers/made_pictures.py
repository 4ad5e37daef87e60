"""Pictures for tests of what reads pictures."""

import io

import numpy as np

HEIC_BEGINNING = bytes.fromhex("00000018") + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 40
"""How the files of iPhones begin (ISO/IEC 23008-12, 10.2)."""


def gradient(height=40, width=60):
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], axis=-1).astype(np.uint8)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()
