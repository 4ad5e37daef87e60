"""Safetensors files whose headers lie: refused in one sentence, as weights and as a probe."""

import json
import re
import struct

import numpy as np
import pytest
from safetensors.numpy import save

from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import Probe
from fastface_trt.engines.probe import read_probe
from fastface_trt.errors import ExportIncomplete, WeightsError
from fastface_trt.export.weight_files import open_weights
from tests.engines.tiny_models import OUT, WIDTH, write_module

EIGHT = bytes(8)


def packed(header, data=EIGHT, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one(**fields):
    return {"input.x": entry(**fields)}


BROKEN = {
    "nothing": b"",
    "a length without a header": struct.pack("<Q", 1 << 63),
    "a header beyond the end": packed(one(), length=10**6),
    "no text": packed(b"\xff" * 20),
    "lists in lists": packed(b"[" * 100_000),
    "a list": packed(b"[]"),
    "a number": packed(b"5"),
    "not a number": packed(b'{"a":NaN}'),
    "a number of thousands of digits": packed(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"),
    "a shape below zero": packed(one(shape=(-1,))),
    "a shape of fractions": packed(one(shape=(1.5,))),
    "more elements than numbers": packed(one(shape=(2**40, 2**40))),
    "more elements than bytes": packed(one(shape=(2**30,))),
    "fewer elements than bytes": packed(one(shape=(1,))),
    "a place before the start": packed(one(offsets=(-8, 0))),
    "a place that ends before it begins": packed(one(offsets=(8, 0))),
    "a place beyond the end": packed(one(offsets=(0, 80))),
    "a place of words": packed(one(offsets=("0", "8"))),
    "a place of three": packed(one(offsets=(0, 8, 9))),
    "one place for two": packed({"input.x": entry(), "input.y": entry()}),
    "bytes between": packed(one(offsets=(8, 16)), EIGHT * 2),
    "bytes behind": packed(one(), EIGHT * 9),
    "a type that there is not": packed(one(dtype="X99")),
    "no type": packed({"input.x": {"shape": [2], "data_offsets": [0, 8]}}),
    "an entry that is a list": packed({"input.x": [1]}),
    "metadata that is a list": packed({"__metadata__": [1], **one()}),
    "metadata of numbers": packed({"__metadata__": {"a": 1}, **one()}),
    "half a character": packed(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}"),
    "a header without end": packed(b"", b" " * 100_000_001, length=100_000_001),
}


def probed(tmp_path, content):
    """A module whose probe these bytes are, and where it lies."""
    path = tmp_path / "probe.safetensors"
    path.write_bytes(content)
    module = write_module(tmp_path)
    probe = Probe(file=describe_file(tmp_path, path), sizes={"batch": 1}, tolerance=1.0)
    return module.model_copy(update={"probe": probe})


def one_sentence(caught):
    assert len(str(caught.value)) < 500
    assert re.fullmatch(r"[^\n]+", str(caught.value))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_header_that_lies_is_refused(tmp_path, kind):
    module = probed(tmp_path, BROKEN[kind])
    with pytest.raises(WeightsError) as caught:
        open_weights(tmp_path / "probe.safetensors")
    one_sentence(caught)
    with pytest.raises(ExportIncomplete) as caught:
        read_probe(module, tmp_path)
    one_sentence(caught)


GOOD = {"input.x": np.ones((1, WIDTH), np.float32), "output.y": np.ones((1, OUT), np.float32)}
STRANGE = {
    "a type that numpy lacks": packed({"input.x": entry("BF16", (1, WIDTH), (0, 32))}, bytes(32)),
    "a type that numpy has under no name": packed(
        {"input.x": entry("F8_E4M3", (1, WIDTH), (0, 16))}, bytes(16)
    ),
    "no tensors": packed({}, b""),
    "another input": save(GOOD | {"input.z": GOOD["input.x"]}),
    "no input": save({"output.y": GOOD["output.y"]}),
    "an input of another size": save(GOOD | {"input.x": np.ones((1, 3), np.float32)}),
    "more axes than arrays have": packed(one(shape=(1,) * 5000, offsets=(0, 4)), bytes(4)),
    "another output": save(GOOD | {"output.z": GOOD["output.y"]}),
    "no output": save({"input.x": GOOD["input.x"]}),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_probe_of_something_else_is_refused(tmp_path, kind):
    with pytest.raises(ExportIncomplete, match="The probe of affine") as caught:
        read_probe(probed(tmp_path, STRANGE[kind]), tmp_path)
    one_sentence(caught)


def test_a_good_probe_is_read(tmp_path):
    inputs, outputs = read_probe(probed(tmp_path, save(GOOD)), tmp_path)
    assert inputs["x"].shape == (1, WIDTH)
    assert list(outputs) == ["y"]
