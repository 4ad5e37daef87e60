"""JPEG and WebP beside PNG: the same metadata, names and formats, and the thread that writes."""

import io
import itertools
import struct
import threading
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from fastface_trt.errors import BadPicture, InvalidRequest, StorageError
from fastface_trt.runtime import picture_file
from fastface_trt.runtime.picture_file import (
    DIGITAL_SOURCE_TYPE,
    PictureWriter,
    encode_picture,
    picture_format,
    read_parameters,
    write_picture,
)
from tests.runtime.test_picture_file import PARAMETERS, PICTURE


def segments(data):
    """Marker and content of a JPEG's segments before its first scan, by an own walk."""
    at, found = 2, []
    while data[at + 1] != 0xDA:
        (size,) = struct.unpack(">H", data[at + 2 : at + 4])
        found.append((data[at + 1], data[at + 4 : at + 2 + size]))
        at += 2 + size
    return found


def riff(data):
    """Name and content of a WebP file's chunks."""
    at, found = 12, []
    while at < len(data):
        (size,) = struct.unpack("<I", data[at + 4 : at + 8])
        found.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return found


def metadata(data, format):
    """The EXIF block and the XMP packets of a JPEG or WebP file."""
    if format == "jpeg":
        blocks = [body for marker, body in segments(data) if marker == 0xE1]
        exif, xmp = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
        return (
            *(b.removeprefix(exif) for b in blocks if b.startswith(exif)),
            [b.removeprefix(xmp) for b in blocks if b.startswith(xmp)],
        )
    parts = riff(data)
    (exif,) = [body.removeprefix(b"Exif\0\0") for name, body in parts if name == b"EXIF"]
    return exif, [body for name, body in parts if name == b"XMP "]


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_jpeg_and_webp_carry_what_a_png_carries(tmp_path, format):
    path = tmp_path / f"out.{format}"
    write_picture(path, PICTURE, parameters=PARAMETERS)
    data = path.read_bytes()
    assert data == encode_picture(PICTURE, parameters=PARAMETERS, format=format)
    assert read_parameters(path) == PARAMETERS
    exif, (packet,) = metadata(data, format)
    (mark,) = ET.fromstring(packet).iter(
        "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    )
    assert mark.text == DIGITAL_SOURCE_TYPE
    with Image.open(io.BytesIO(encode_picture(PICTURE, parameters=PARAMETERS))) as png:
        text = png.info["parameters"]
    # As in the EXIF standard: a name of eight bytes, then the text in the block's byte order.
    assert exif[:2] == b"MM"
    assert b"UNICODE\0" + text.encode("utf-16-be") in exif
    with Image.open(path) as image:
        assert image.format == format.upper()
        assert image.getexif()[0x0131].startswith("FastFace-TRT ")
    unmarked = encode_picture(PICTURE, parameters={}, format=format, ai_generated=False)
    assert metadata(unmarked, format)[1] == []
    assert b"trainedAlgorithmicMedia" not in unmarked


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_prompts_of_any_script_survive_jpeg_and_webp(tmp_path, format):
    for prompt in ("女の人、水彩画", "a\ud800b\0c", "😀" * 700, ""):
        write_picture(tmp_path / "a", PICTURE, parameters={"prompt": prompt}, format=format)
        assert read_parameters(tmp_path / "a") == {"prompt": prompt}


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_trades_size_for_likeness(format):
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3)
    noisy = (smooth + np.random.default_rng(3).normal(0, 8, smooth.shape)).clip(0, 255)
    picture = noisy.astype(np.uint8)

    def off(data):
        with Image.open(io.BytesIO(data)) as image:
            return np.abs(np.asarray(image).astype(int) - picture).mean()

    files = {
        quality: encode_picture(picture, parameters={}, format=format, quality=quality)
        for quality in (0, 50, 90, 100)
    }
    assert [len(one) for one in files.values()] == sorted(len(one) for one in files.values())
    errors = [off(one) for one in files.values()]
    assert errors == sorted(errors, reverse=True)
    assert files[90] == encode_picture(picture, parameters={}, format=format)


def test_what_no_file_can_be():
    for quality in (-1, 101):
        with pytest.raises(InvalidRequest, match=f"quality is {quality}"):
            encode_picture(PICTURE, parameters={}, format="jpeg", quality=quality)
    with pytest.raises(InvalidRequest, match="no quality"):
        encode_picture(PICTURE, parameters={}, quality=90)
    with pytest.raises(ValueError, match="not uint8"):
        encode_picture(PICTURE[:0], parameters={})
    long = {"prompt": "x" * 40_000}
    with pytest.raises(InvalidRequest, match="too long for a JPEG"):
        encode_picture(PICTURE, parameters=long, format="jpeg")
    for format in ("png", "webp"):
        assert encode_picture(PICTURE, parameters=long, format=format)


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("a.png", None, "png"),
        ("a.JPG", None, "jpeg"),
        ("a.jpeg", "jpeg", "jpeg"),
        ("a.webp", None, "webp"),
        ("a", None, "png"),
        ("v1.5", None, "png"),
        ("v1.5", "webp", "webp"),
        ("a.png", "jpeg", "a.png says png, and the format asked for is jpeg"),
        ("a.jpg", "webp", "a.jpg says jpeg, and the format asked for is webp"),
        ("a", "gif", "no format 'gif'"),
    ],
)
def test_format_of_a_name(tmp_path, name, wanted, expected):
    if " " not in expected:
        assert picture_format(tmp_path / name, wanted) == expected
        return
    with pytest.raises(InvalidRequest, match=expected) as caught:
        write_picture(tmp_path / name, PICTURE, parameters={}, format=wanted)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def _hostile(format):
    """Files that Pillow opens, whose metadata is wrong: none of them may do anything but fail."""
    good = encode_picture(PICTURE, parameters=PARAMETERS, format=format)
    for end in (len(good) // 3, len(good) - 40):
        yield "truncated", good[:end]
    block = metadata(good, format)[0]
    for at in (4, 8, 10, 12, 14, 18):
        broken = block[:at] + b"\xff\xff\xff\xff" + block[at + 4 :]
        yield f"block broken at {at}", good.replace(block, broken)
    texts = [
        "{",
        "[" * 30_000,
        "1",
        '{"prompt": "a"}',
        '{"fastface-trt": 3}',
        '{"fastface-trt": []}',
        b"\xff\0\xfe",
    ]
    for text in texts:
        exif = Image.Exif()
        exif[0x010E] = text
        buffer = io.BytesIO()
        Image.fromarray(PICTURE).save(buffer, format=format.upper(), exif=exif)
        yield str(text[:20]), buffer.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_hostile_metadata_is_a_bad_picture(tmp_path, format):
    path = tmp_path / "a"
    for what, data in _hostile(format):
        path.write_bytes(data)
        try:
            found = read_parameters(path)
        except BadPicture:
            continue
        # A broken byte may lie in what nobody reads.
        assert what.startswith("block broken"), (what, found)
        assert found == PARAMETERS


def test_a_writer_works_beside_its_caller_and_in_order(tmp_path, monkeypatch):
    began, may_end, order = threading.Event(), threading.Event(), []
    write = picture_file.write_picture

    def slow(path, picture, **options):
        began.set()
        assert may_end.wait(30)
        order.append((path.name, threading.get_ident()))
        write(path, picture, **options)

    monkeypatch.setattr(picture_file, "write_picture", slow)
    with PictureWriter() as writer:
        for number in range(3):
            writer.write(tmp_path / f"{number}.png", PICTURE, parameters={"seed": number})
        assert began.wait(30)
        assert order == []  # all three calls came back, and nothing is written yet
        may_end.set()
    assert [name for name, _ in order] == ["0.png", "1.png", "2.png"]
    assert threading.get_ident() not in {thread for _, thread in order}
    assert [read_parameters(tmp_path / f"{n}.png")["seed"] for n in range(3)] == [0, 1, 2]


def test_a_writer_tells_the_first_failure(tmp_path):
    def write(folders):
        with PictureWriter() as writer:
            for number, folder in enumerate(folders):
                writer.write(tmp_path / folder / f"{number}.png", PICTURE, parameters={})

    with pytest.raises(StorageError, match=r"1\.png"):
        write([".", "none", "none", "."])
    # A later call tells it too, so that nobody goes on for an hour with a full disk.
    with pytest.raises(StorageError, match=r"0\.png"):
        write(itertools.chain(["none"], itertools.repeat(".")))


def test_a_block_that_fails_keeps_its_own_error(tmp_path):
    def fail():
        with PictureWriter() as writer:
            writer.write(tmp_path / "none" / "a.png", PICTURE, parameters={})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
