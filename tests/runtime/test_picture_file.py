import errno
import io
import itertools
import json
import os
import struct
import threading
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PARAMETERS = {
    "prompt": "watercolor; woman in a café, reading",
    "negative_prompt": "blurry, dark",
    "steps": 4,
    "seed": 2**63,
    "alpha": [1, 1.5, 1.5, 1],
    "checkpoint": "hyper",
    "am": {"kind": "scale_power", "scale": 1.55},
    "lora": None,
}


def chunks(data):
    """Name and content of each chunk; an own parser, so that PIL does not check itself."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, []
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            name + body
        )
        found.append((name, body))
        at += 12 + size
    return found


def itxt(data, key):
    start = key.encode() + b"\0\0\0\0\0"  # no compression, no language, no translated key
    return [
        b[len(start) :].decode()
        for n, b in chunks(data)
        if n == b"iTXt" and b[:99].startswith(start)
    ]


def test_pixels_and_parameters_come_back(tmp_path):
    path = tmp_path / "out.png"
    write_picture(path, PICTURE, parameters=PARAMETERS)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), PICTURE)
    assert read_parameters(path) == PARAMETERS
    assert path.read_bytes() == encode_picture(PICTURE, parameters=PARAMETERS)
    assert json.loads(itxt(path.read_bytes(), "fastface-trt")[0]) == PARAMETERS


def test_text_that_other_tools_read():
    with Image.open(io.BytesIO(encode_picture(PICTURE, parameters=PARAMETERS))) as image:
        text = image.info["parameters"]
        assert image.info["Software"].startswith("FastFace-TRT ")
    prompt, negative, settings_line = text.split("\n")
    assert prompt == PARAMETERS["prompt"]
    assert negative == "Negative prompt: blurry, dark"
    assert settings_line.startswith(f"Steps: 4, Seed: {2**63}, Size: 30x20, Model: hyper, ")
    assert 'alpha: "[1, 1.5, 1.5, 1]"' in settings_line  # quoted, for it holds commas
    assert "lora" not in settings_line


def test_mark_of_provenance_is_well_formed_xmp():
    (packet,) = itxt(encode_picture(PICTURE, parameters={}), "XML:com.adobe.xmp")
    namespace = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    (mark,) = ET.fromstring(packet).iter(f"{namespace}DigitalSourceType")
    expected = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert mark.text == expected


def test_mark_can_be_left_out():
    assert (
        itxt(encode_picture(PICTURE, parameters={}, ai_generated=False), "XML:com.adobe.xmp") == []
    )


def test_nothing_but_the_parameters_is_stored():
    names = [n for n, _ in chunks(encode_picture(PICTURE, parameters={"seed": 1}))]
    assert sorted(set(names)) == [b"IDAT", b"IEND", b"IHDR", b"iTXt", b"tEXt"]
    assert names.count(b"iTXt") == 2
    assert names.count(b"tEXt") == 2


@settings(max_examples=50, deadline=None)
@given(
    parameters=st.dictionaries(
        st.text(),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters()),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_any_json_survives(tmp_path_factory, parameters):
    path = tmp_path_factory.mktemp("any") / "a.png"
    write_picture(path, PICTURE, parameters=parameters)
    assert read_parameters(path) == parameters


def test_prompt_with_half_a_surrogate_pair_and_null_is_written(tmp_path):
    parameters = {"prompt": "a\ud800b\0c"}
    write_picture(tmp_path / "a.png", PICTURE, parameters=parameters)
    assert read_parameters(tmp_path / "a.png") == parameters
    assert Image.open(tmp_path / "a.png").info["parameters"].startswith("a?bc\n")


def test_numpy_values_become_plain_and_others_are_refused():
    data = encode_picture(
        PICTURE, parameters={"s": np.float32(1.5), "d": np.arange(3), "n": np.int64(4), "t": (1, 2)}
    )
    assert json.loads(itxt(data, "fastface-trt")[0]) == {
        "s": 1.5,
        "d": [0, 1, 2],
        "n": 4,
        "t": [1, 2],
    }
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_picture(PICTURE, parameters={"s": float("nan")})
    with pytest.raises(TypeError, match="cannot be stored"):
        encode_picture(PICTURE, parameters={"s": object()})


@pytest.mark.parametrize("wrong", [PICTURE.astype(np.float32), PICTURE[:, :, 0], PICTURE[:, :, :2]])
def test_other_arrays_are_refused(wrong):
    with pytest.raises(ValueError, match="not uint8"):
        encode_picture(wrong, parameters={})


def test_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be written") as caught:
        write_picture(tmp_path / "none" / "a.png", PICTURE, parameters={})
    assert caught.value.mend


@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment, error):
    path = tmp_path / "a.png"
    write_picture(path, PICTURE, parameters={"seed": 1})

    def fail(*_args, **_kwargs):
        raise error

    if moment == "rename":
        monkeypatch.setattr(type(path), "replace", fail)
        monkeypatch.setattr(os, "replace", fail)
    elif moment == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        opened = type(path).open

        def open_full(self, mode="r", *args, **kwargs):
            file = opened(self, mode, *args, **kwargs)
            if "x" in mode:
                file.close()
                file = _Full(self, error)
            return file

        monkeypatch.setattr(type(path), "open", open_full)
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_picture(path, PICTURE, parameters={"seed": 2})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert read_parameters(path) == {"seed": 1}


class _Full:
    """A file on a full disk."""

    def __init__(self, path, error):
        self.path, self.error = path, error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, data):
        self.path.write_bytes(data[:10])
        raise self.error


def test_file_has_the_usual_rights(tmp_path):
    write_picture(tmp_path / "a.png", PICTURE, parameters={})
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("a" * 251 + ".png")
    write_picture(path, PICTURE, parameters={"seed": 1})
    assert read_parameters(path)["seed"] == 1


def test_files_without_parameters(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "bare.png")
    with pytest.raises(BadPicture, match="no generation parameters"):
        read_parameters(tmp_path / "bare.png")
    for name in ["other.jpg", "other.webp"]:
        Image.fromarray(PICTURE).save(tmp_path / name)
        with pytest.raises(BadPicture, match="no generation parameters"):
            read_parameters(tmp_path / name)
    Image.fromarray(PICTURE).save(tmp_path / "other.bmp")
    for name in ["other.bmp", "none.png", "."]:
        with pytest.raises(BadPicture, match="cannot be read") as caught:
            read_parameters(tmp_path / name)
        assert caught.value.mend


@pytest.mark.parametrize("stored", ["[1]", "{", "", "[" * 100_000])
def test_broken_parameters(tmp_path, stored):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("fastface-trt", stored)
    Image.fromarray(PICTURE).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(BadPicture, match="are broken"):
        read_parameters(tmp_path / "a.png")


def test_truncated_png(tmp_path):
    data = encode_picture(PICTURE, parameters=PARAMETERS)
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadPicture):
        read_parameters(tmp_path / "a.png")


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 7), (127, 3), (128, 2), (129, 5), (300, 31)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
@pytest.mark.parametrize("cores", [1, 3])
def test_two_other_decoders_find_the_pixels_of_a_png(monkeypatch, size, cores):
    """Noise, one colour, steep and slow changes: each takes another filter, across strips."""
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(picture_file, "usable_cores", lambda: cores)
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (*size, 3))
    for values in (noise, noise * 0 + 200, np.cumsum(noise, 0), np.cumsum(noise % 3, 1)):
        picture = values.astype(np.uint8)
        data = encode_picture(picture, parameters={})
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), picture)
        again = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(again[:, :, ::-1], picture)
        compressed = b"".join(body for name, body in chunks(data) if name == b"IDAT")
        assert len(zlib.decompress(compressed)) == size[0] * (1 + 3 * size[1])


def test_a_png_is_the_same_on_machines_with_other_cores(monkeypatch):
    picture = np.random.default_rng(2).integers(0, 256, (500, 20, 3), dtype=np.uint8)
    files = set()
    for cores in (1, 2, 16):
        monkeypatch.setattr(picture_file, "usable_cores", lambda cores=cores: cores)
        files.add(encode_picture(picture, parameters=PARAMETERS))
    assert len(files) == 1


def test_a_view_with_strides_is_a_picture_too():
    turned = PICTURE[::-1, ::-1]
    with Image.open(io.BytesIO(encode_picture(turned, parameters={}))) as image:
        np.testing.assert_array_equal(np.asarray(image), turned)


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
    assert caught.value.mend
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
