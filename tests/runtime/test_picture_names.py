"""Names of pictures' files: what stays of text, what systems refuse, and templates."""

import io
import unicodedata
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
from PIL import Image

from fastface_trt.errors import InvalidRequest, UnknownName
from fastface_trt.runtime.picture_names import face_name, picture_hash, picture_name

FIELDS = {
    "face": "Ada",
    "prompt": "photo; person in a garden, smiling",
    "preset": "am1+dcg",
    "seed": 7,
    "index": 0,
    "steps": 4,
    "hash": "0123abcd",
}


def test_the_default_name_says_the_index_of_all_but_the_first():
    name = "Ada_photo-person-in-a-garden-smiling_am1+dcg_7"
    assert picture_name(FIELDS) == f"{name}-0123abcd"
    assert picture_name(FIELDS | {"index": 3}) == f"{name}-3-0123abcd"


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("фото; человек, в саду", "фото-человек-в-саду"),
        ("写真。庭の人", "写真-庭の人"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("a 👩\N{ZERO WIDTH JOINER}🚀!", "a-👩\N{ZERO WIDTH JOINER}🚀"),
        ("हिन्दी में", "हिन्दी-में"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\a\0b\n", "C-a-b"),
        ("half \ud83d pair", "half-pair"),
        ("\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe", "gnp-exe"),
        ("?!", "picture"),
        ("", "picture"),
    ],
)
def test_text_keeps_its_script_and_nothing_that_a_system_reads(text, stays):
    assert picture_name(FIELDS | {"prompt": text}, "{prompt}") == stays


@pytest.mark.parametrize(
    "name", ["con", "NUL", "com1", "lpt9.txt", "a. ", "...", " a", "a:b*", "-"]
)
def test_no_name_is_one_that_windows_refuses(name):
    made = picture_name(FIELDS, name) + ".png"
    assert not PureWindowsPath(made).is_reserved()
    assert PureWindowsPath(made).name == made
    assert not set(made) & set('<>:"|?*')
    assert made == made.strip(" .")


@pytest.mark.parametrize("character", ["x", "ж", "画", "👩"])
@pytest.mark.parametrize("template", [None, "{prompt}{face}" * 9 + "{hash}", "画" * 300])
def test_a_name_with_a_counter_fits_a_folder(tmp_path, character, template):
    fields = FIELDS | {"prompt": character * 300, "face": character * 300, "seed": 2**64 - 1}
    name = picture_name(fields, template)
    (tmp_path / f"{name}-999999.webp").touch()
    assert unicodedata.is_normalized("NFC", name)
    assert "\N{REPLACEMENT CHARACTER}" not in name
    if template is None:
        assert name.endswith(f"_{2**64 - 1}-0123abcd")


def test_numbers_take_a_format():
    assert picture_name(FIELDS, "{seed:06}-{index:02}_{steps}") == "000007-00_4"


@pytest.mark.parametrize(
    ("template", "kind", "says"),
    [
        ("{face}-{sed}", UnknownName, "Did you mean 'seed'?"),
        ("{}", UnknownName, "Known: face, hash"),
        ("{face.__class__}", UnknownName, "Known: face, hash"),
        ("{face", InvalidRequest, "no template"),
        ("{seed:x!}", InvalidRequest, "no template"),
        ("../{face}", InvalidRequest, "path separator"),
        ("a\\{face}", InvalidRequest, "path separator"),
    ],
)
def test_what_is_no_template_is_one_sentence(template, kind, says):
    with pytest.raises(kind, match=says.replace("?", r"\?")):
        picture_name(FIELDS, template)


def test_a_face_is_called_by_its_file(tmp_path):
    path = tmp_path / "Ада.v2.png"
    Image.new("RGB", (16, 16)).save(path)
    with Image.open(path) as image, path.open("rb") as file:
        assert {face_name(one) for one in (path, str(path), image, file)} == {"Ада.v2"}
    for nameless in (b"bytes", io.BytesIO(), np.zeros((16, 16, 3), np.uint8), None):
        assert face_name(nameless) == ""


def test_a_hash_is_of_everything_and_of_no_order():
    assert picture_hash({"a": 1, "b": 2}, b"face") == picture_hash({"b": 2, "a": 1}, b"face")
    others = [
        picture_hash(*what)
        for what in (({"a": 1, "b": 2}, b"face"), ({"a": 1, "b": 3}, b"face"), (b"ab", b"c"))
    ]
    assert len({*others, picture_hash(b"a", b"bc")}) == 4
    assert Path(others[0]).name == others[0]
    assert len(others[0]) == 8
