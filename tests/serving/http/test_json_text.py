import base64
import json
import random
import re

import pytest
from pydantic import ValidationError

from fastface_trt.errors import BadPicture
from fastface_trt.serving.http import json_text
from fastface_trt.serving.http.errors import InvalidField
from fastface_trt.serving.http.json_text import MAX_TEXT, read_json
from fastface_trt.serving.http.schemas import GenerationBody
from tests.serving.http.http_parts import ask, client_of, error_of
from tests.serving.loopback import longest_gap

SIZE = 19_000_000
LONG = "A" * (MAX_TEXT + 1)


def filled(head, unit, tail, size=SIZE):
    return head + unit * (size // len(unit)) + tail


HOSTILE = {
    "objects": lambda: filled(b'{"alpha": [', b"{},", b"{}]}"),
    "lists": lambda: filled(b'{"alpha": [', b"[],", b"[]]}"),
    "numbers": lambda: filled(b'{"alpha": [', b"1,", b"1]}"),
    "texts": lambda: filled(b'{"alpha": [', b'"",', b'""]}'),
    "names": lambda: b"{" + b",".join(b'"k%d":1' % i for i in range(1_500_000)) + b"}",
    "depth": lambda: b"[" * SIZE,
    "ends": lambda: b"]" * SIZE,
    "blanks": lambda: filled(b'{"prompt": "x"', b" ", b"}"),
    "digits": lambda: filled(b'{"alpha": ', b"1", b"}"),
    "a long name": lambda: filled(b'{"', b"x", b'": 1}'),
    "a long prompt": lambda: filled(b'{"prompt": "', b"x", b'"}'),
    "quotes in a prompt": lambda: filled(b'{"prompt": "', b'\\"', b'"}'),
    "backslashes in a prompt": lambda: filled(b'{"prompt": "', b"\\\\", b'"}'),
    "many pictures": lambda: b'{"images": [' + b",".join([f'"{LONG}"'.encode()] * 180) + b"]}",
    "a few more names": lambda: b"{" + b",".join(b'"k%d":1' % i for i in range(251)) + b"}",
    "a few more numbers": lambda: filled(b"[", b"1,", b"1]", 2 * 20_001),
    "a few more objects": lambda: filled(b"[", b"{},", b"{}]", 3 * 251),
    "a level more": lambda: b"[" * 9 + b"]" * 9,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_much_is_refused_while_other_threads_go_on(name):
    data = bytearray(HOSTILE[name]())

    def refused():
        with pytest.raises(InvalidField):
            read_json(data, ["images"])

    assert longest_gap(refused) < 1.5  # the parser alone took 10 s


def random_value(draw, depth=3):
    kind = draw.randrange(8 if depth else 6)
    if kind < 3:
        letters = 'ab"\\/\n\t\0é漢😀[]{},:'
        return "".join(draw.choice(letters) for _ in range(draw.randrange(12)))
    if kind < 6:
        return draw.choice([None, True, 0, -17, 2**70, 1.5e-7, draw.random()])
    if kind == 6:
        return [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    names = {f"{random_value(draw, 0)}{index}" for index in range(draw.randrange(4))}
    return {name: random_value(draw, depth - 1) for name in names}


@pytest.mark.parametrize("seed", range(50))
def test_values_are_those_that_python_reads(seed):
    draw = random.Random(seed)
    value = {"a": random_value(draw), "b": random_value(draw)}
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2]))
    assert read_json(text.encode()) == value


def test_whatever_is_no_json_to_python_is_none_here(monkeypatch):
    """A text whose long strings are cut out is broken where the whole one is, and nowhere else."""
    monkeypatch.setattr(json_text, "MAX_TEXT", 8)
    draw = random.Random(5)
    whole = bytearray(b'{"face":"QUJD\\/QUJD","n": [1, {"a": "b\\"c"}], "image": "RkdISUpL"}')
    read, refused = 0, []
    for _ in range(4000):
        data = whole.copy()
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.choice(b'"\\{}[],:a1 /u')
        try:
            expected = json.loads(data.decode())
        except ValueError:
            with pytest.raises((ValueError, InvalidField, BadPicture)):
                read_json(data, ["face", "image"])
            continue
        try:
            value = read_json(data, ["face", "image"])
        except InvalidField as error:
            refused.append(error.message)
            continue
        assert value == expected
        read += 1
    assert all(re.search("is given twice|longer than", message) for message in refused)
    assert read > 500


@pytest.mark.parametrize("name", ["face", "images"])
def test_a_long_picture_is_read_however_it_is_escaped(monkeypatch, name):
    monkeypatch.setattr(json_text, "MAX_TEXT", 20)
    monkeypatch.setattr(json_text, "_PIECE", 13)  # so that escapes lie on every border
    draw = random.Random(3)
    for _ in range(300):
        picture = base64.b64encode(draw.randbytes(draw.randrange(20, 90))).decode()
        escapes = {"/": ["/", "\\/", "\\u002f"], "+": ["+", "\\u002B"], "=": ["=", "\\u003d"]}
        written = "".join(draw.choice(escapes.get(letter, [letter])) for letter in picture)
        written = "data:image\\/png;base64," + written.replace("Q", "Q\\r\\n")
        text = f'{{"{name}": [{{"url": "{written}"}}], "n": "{LONG[:18]}"}}'
        assert read_json(text.encode(), [name]) == json.loads(text)


@pytest.mark.parametrize("inside", ["\\x", "\n", '\\u12"', "\\\\" + "x" * 2_000_000 + "\\"])
def test_a_long_picture_that_is_no_json_is_a_bad_one(inside):
    with pytest.raises((BadPicture, ValueError)):
        read_json(f'{{"face": "{LONG}{inside}{LONG}"}}'.encode(), ["face"])


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "a", "pr\\u006fmpt": "b"}',
        '{"prompt": "a", "manipulation": {"up": {"power": 1, "power": 2}}}',
        f'{{"prompt": "a", "face": "{LONG}", "face": "{LONG}"}}',
    ],
)
def test_a_name_that_stands_twice_is_refused(text):
    with client_of() as client:
        kind = {"Content-Type": "application/json"}
        answer = client.post("/v1/images/generations", content=text, headers=kind)
        assert "twice" in error_of(answer, 400, "invalid_request")["message"]


def test_a_long_text_is_refused_by_the_name_of_its_field():
    with client_of() as client:
        for fields, name in (
            ({"prompt": LONG}, "prompt"),
            ({"manipulation": {"up": {"kind": LONG}}}, "manipulation"),
            ({LONG: 1}, None),
        ):
            assert error_of(ask(client, **fields), 400, "invalid_request")["param"] == name


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), b'{"a": NaN}'])
def test_json_is_utf_8_with_numbers_that_are_numbers(content):
    with pytest.raises(ValueError, match=r"."):
        read_json(content)


def test_the_longest_prompt_passes_however_it_is_written():
    with client_of() as client:
        assert ask(client, prompt="\U0001f600" * 8000, negative_prompt='"' * 8000).is_success
        lists = {part: {"kind": "softmask", "scale": [1.123456] * 4} for part in ("down", "up")}
        assert ask(client, manipulation=lists).is_success


def test_a_list_of_nothing_but_errors_makes_a_few():
    with pytest.raises(ValidationError) as caught:
        GenerationBody.model_validate({"prompt": "x", "alpha": [{}] * 900})
    assert caught.value.error_count() < 5
