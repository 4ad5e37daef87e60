"""Number formats: what is read, by its scales where it has them, and what is refused by name."""

import pytest
import torch
from safetensors.torch import save_file

from fastface_trt.errors import WeightsError
from fastface_trt.export.weight_files import open_weights

WEIGHT = torch.linspace(-2, 3, 48, dtype=torch.float64).reshape(8, 6)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def write(path, **tensors):
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, E4M3, E5M2])
def test_a_plain_type_is_read_as_it_is(tmp_path, dtype):
    file = open_weights(write(tmp_path / "x.safetensors", **{"a.weight": WEIGHT.to(dtype)}))
    assert torch.equal(file.read()["a.weight"].double(), WEIGHT.to(dtype).double())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (8,), (8, 1), (4, 3)])
def test_scaled_fp8_is_its_scale_times_its_number(tmp_path, dtype, name, shape):
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    eighths = WEIGHT.to(dtype)
    path = write(
        tmp_path / "x.safetensors",
        **{
            "a.weight": eighths,
            f"a.{name}": scale,
            "a.scale_input": torch.tensor(0.25),
            "a.bias": torch.ones(8, dtype=torch.float16),
            "scaled_fp8": torch.zeros(2, dtype=dtype),
        },
    )
    file = open_weights(path)
    assert set(file.tensors) == {"a.weight", "a.bias"}
    assert file.tensors["a.weight"].shape == (8, 6)
    # The formula in float64, the scale spread over the rows or the blocks that share it.
    spread = scale.double().reshape(8, 1) if shape == (8,) else scale.double()
    if shape == (4, 3):
        spread = torch.kron(spread, torch.ones(2, 2, dtype=torch.float64))
    expected = eighths.double() * spread
    torch.testing.assert_close(file.read()["a.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(file.read()["a.bias"], torch.ones(8, dtype=torch.float16))


def test_a_convolution_has_a_scale_for_each_output_channel(tmp_path):
    weight = torch.randn(4, 3, 3, 3).to(E4M3)
    scale = torch.tensor([1.0, 2.0, 4.0, 0.5])
    path = write(tmp_path / "x.safetensors", **{"a.weight": weight, "a.scale_weight": scale})
    read = open_weights(path).read()["a.weight"]
    assert torch.equal(read, weight.float() * scale[:, None, None, None])


def test_scales_that_do_not_fit_are_refused(tmp_path):
    path = write(
        tmp_path / "x.safetensors",
        **{"a.weight": WEIGHT.to(E4M3), "a.scale_weight": torch.ones(5)},
    )
    with pytest.raises(WeightsError, match=r"scales of shape \[5\] for a.weight"):
        open_weights(path)


_BYTES, _INTS = torch.zeros(8, 3, dtype=torch.uint8), torch.zeros(8, 6, dtype=torch.int8)
FOREIGN = {
    "NF4 of bitsandbytes": {
        "a.weight": _BYTES,
        "a.weight.absmax": torch.ones(2),
        "a.weight.quant_map": torch.ones(16),
        "a.weight.quant_state.bitsandbytes__nf4": _BYTES,
    },
    "FP4 of bitsandbytes": {
        "a.weight": _BYTES,
        "a.weight.absmax": torch.ones(2),
        "a.weight.quant_state.bitsandbytes__fp4": _BYTES,
    },
    "LLM.int8": {"a.weight": _INTS, "a.SCB": torch.ones(8)},
    "quanto": {"a.weight._data": _INTS, "a.weight._scale": torch.ones(8, 1)},
    "torchao": {"a._weight_qdata": _INTS, "a._weight_scale": torch.ones(8)},
    "Nunchaku": {"a.qweight": _INTS, "a.wscales": torch.ones(8), "a.smooth_factor": torch.ones(6)},
    "GPTQ": {"a.qweight": _INTS, "a.qzeros": _INTS, "a.scales": torch.ones(8)},
    "int8": {"a.weight": _INTS, "a.weight_scale": torch.ones(8, 1)},
    "NVFP4": {
        "a.weight": _BYTES,
        "a.weight_scale": torch.ones(8, 1).to(E4M3),
        "a.weight_scale_2": torch.ones(()),
    },
    "MXFP8": {"a.weight": WEIGHT.to(E4M3), "a.weight_scale": _BYTES},
    "packed bytes": {"a.weight": _BYTES},
}


@pytest.mark.parametrize("form", FOREIGN)
def test_a_format_that_nobody_reads_is_refused_by_name(tmp_path, form):
    path = write(tmp_path / "x.safetensors", **FOREIGN[form])
    with pytest.raises(WeightsError, match=form) as caught:
        open_weights(path)
    assert caught.value.message.startswith("x.safetensors holds weights in ")
    assert "fp16" in caught.value.hint


def test_a_gguf_file_is_refused_by_its_first_bytes(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    with pytest.raises(WeightsError, match="is a GGUF file"):
        open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of git-lfs"),
        (b"", "not a"),
        (b"\x10\0\0\0\0\0\0\0{}", "not a complete"),
    ],
)
def test_what_is_saved_under_the_name_of_weights_is_told(tmp_path, content, said):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        open_weights(tmp_path / "x.safetensors")


class Foreign:
    """A class that no unpickler of weights knows."""


def test_a_pickle_that_would_run_code_is_refused_as_unsafe(tmp_path):
    torch.save({"state_dict": {"a": WEIGHT}, "callbacks": Foreign()}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=r"unsafe pickle: opening it would run .*Foreign"):
        open_weights(tmp_path / "x.ckpt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.0"},
        lambda state: {"module": state, "optimizer": {"state": {0: {"exp_avg": WEIGHT}}}},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    ],
)
def test_the_wrapping_of_a_training_checkpoint_is_taken_off(tmp_path, wrap, legacy):
    wrapped = wrap({"a.weight": WEIGHT, "b.weight": WEIGHT.half()})
    torch.save(wrapped, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    read = open_weights(tmp_path / "x.pt").read()
    assert read.keys() == {"a.weight", "b.weight"}
    assert torch.equal(read["a.weight"], WEIGHT)
