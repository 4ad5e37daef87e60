import errno
import io
import json
import os
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastface_trt.errors import BadPicture, StorageError
from fastface_trt.runtime.picture_file import (
    encode_picture,
    read_parameters,
    write_picture,
)
from tests.fuzz.make_hostile import FOLDER

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
    assert caught.value.hint


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
        with pytest.raises(BadPicture, match=r"cannot be read|not exist|not a file") as caught:
            read_parameters(tmp_path / name)
        assert caught.value.hint


def test_parameters_are_looked_for_in_bounded_time_and_memory(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadPicture, match="not a file"):
        read_parameters(tmp_path / "pipe.png")
    for name, message in (("jpg-many-scans", "more than 40 scans"), ("webp-exif-bomb", "carries")):
        with pytest.raises(BadPicture, match=message):
            read_parameters(FOLDER / name)
    write_picture(tmp_path / "a.webp", PICTURE, parameters={"seed": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Exif, "load", None)  # the general reader of such blocks
        assert read_parameters(tmp_path / "a.webp")["seed"] == 1


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
def test_another_decoder_finds_the_pixels_of_a_png(size):
    """Noise, one colour, steep and slow changes."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (*size, 3))
    for values in (noise, noise * 0 + 200, np.cumsum(noise, 0), np.cumsum(noise % 3, 1)):
        picture = values.astype(np.uint8)
        data = encode_picture(picture, parameters={})
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), picture)
        compressed = b"".join(body for name, body in chunks(data) if name == b"IDAT")
        assert len(zlib.decompress(compressed)) == size[0] * (1 + 3 * size[1])


def test_a_view_with_strides_is_a_picture_too():
    turned = PICTURE[::-1, ::-1]
    with Image.open(io.BytesIO(encode_picture(turned, parameters={}))) as image:
        np.testing.assert_array_equal(np.asarray(image), turned)
