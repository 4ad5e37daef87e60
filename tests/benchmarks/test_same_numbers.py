"""What `same_numbers` takes for the same; the measuring itself takes minutes and is run by hand."""

import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, PngImagePlugin

from benchmarks import same_numbers

ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "other",
    [ONES.T, ONES.astype(np.float64), ONES + np.float32(1e-6), -ONES],
    ids=["shape", "type", "a little", "sign"],
)
def test_a_digest_tells_numbers_type_and_shape(other):
    assert same_numbers.digest(ONES) == same_numbers.digest(ONES.T.copy().T)
    assert same_numbers.digest(ONES) != same_numbers.digest(other)


def test_of_a_picture_only_the_pixels_count():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", "other words")
    files = io.BytesIO(), io.BytesIO()
    image.save(files[0], "png")
    image.save(files[1], "png", pnginfo=told, compress_level=1)
    first, second = (file.getvalue() for file in files)
    assert first != second
    assert same_numbers.pixels(first) == same_numbers.pixels(second)


@pytest.mark.parametrize(
    ("before", "after", "status", "said"),
    [
        ({"pictures": {"dcg": "a"}}, {"pictures": {"dcg": "a"}}, 0, "are the same"),
        ({"pictures": {"dcg": "a"}}, {"pictures": {"dcg": "b"}}, 1, "/pictures/dcg: a → b"),
        ({"pictures": {"dcg": "a"}}, {"pictures": {}}, 1, "/pictures/dcg: a → None"),
    ],
)
def test_differences_are_named(monkeypatch, tmp_path, before, after, status, said):
    monkeypatch.setattr(same_numbers, "stay_on_one_core", lambda: None)
    monkeypatch.setattr(same_numbers, "measure", lambda tree: after)
    expected = {"machine": same_numbers.describe_machine(), **before}
    (tmp_path / "before.json").write_text(json.dumps(expected))
    words = [str(tmp_path / "after.json"), "--against", str(tmp_path / "before.json")]
    result = CliRunner().invoke(same_numbers.main, words)
    assert result.exit_code == status
    assert said in result.output
