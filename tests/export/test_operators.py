"""Attention and group norms as ONNX's own operators: the same numbers as spelled out."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.numpy import load_file

from fastface_trt.export.attention import SelfAttentionProcessor
from fastface_trt.export.modules import ModuleExport
from fastface_trt.export.onnx_writer import write_module
from fastface_trt.export.operators import Operators
from fastface_trt.export.precision import keep_group_norms_in_float32
from tests.conftest import GOLDEN

SPELLINGS = ("spelled", "onnx")
PIPELINE = GOLDEN / "pipeline"


class Block(torch.nn.Module):
    """x [B,32,h,w] through a group norm and self-attention of two heads of 16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.GroupNorm(8, 32)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)
        self.attn = Attention(32, heads=2, dim_head=16, processor=SelfAttentionProcessor())
        self.attn_processors = {"attn.processor": self.attn.processor}

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return self.attn(3 * tokens).transpose(1, 2).reshape(x.shape)


def export(folder, operators, dtype=torch.float32):
    block = Block().to(dtype).eval()
    keep_group_norms_in_float32(block)
    operators.apply(block)
    shape = ("batch", 32, "height", "width")
    module = ModuleExport(
        "block",
        block,
        {"x": torch.zeros(2, 32, 8, 6, dtype=dtype)},
        ("y",),
        dict.fromkeys("xy", shape),
    )
    spec = write_module(module, folder)
    return spec, folder / spec.files[0].path, block


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def distance(x, reference):
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("attention", SPELLINGS)
@pytest.mark.parametrize("group_norm", SPELLINGS)
def test_numbers_operators_and_opset(tmp_path, attention, group_norm):
    _, path, block = export(tmp_path, Operators(attention, group_norm))
    model = onnx.load(path)
    onnx.checker.check_model(model)
    opset = 23 if attention == "onnx" else 21 if group_norm == "onnx" else 20
    assert {o.domain: o.version for o in model.opset_import} == {"": opset}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Attention") == (attention == "onnx") == 1 - kinds.count("Softmax")
    assert kinds.count("GroupNormalization") == (group_norm == "onnx")
    assert kinds.count("InstanceNormalization") == (group_norm == "spelled")
    x = np.random.default_rng(0).standard_normal((3, 32, 10, 7)).astype(np.float32) * 2 + 1
    with torch.no_grad():
        exact = copy.deepcopy(block).double()
        exact.norm.__class__ = torch.nn.GroupNorm
        expected = exact(torch.from_numpy(x).double()).numpy()
    assert distance(run(path, x), expected) < 2e-6


def test_fp16_statistics_are_float32(tmp_path):
    """A group whose values are far from zero, where float16 sums would be off by percents."""
    _, path, block = export(tmp_path / "onnx", Operators("spelled", "onnx"), torch.float16)
    _, spelled, _ = export(tmp_path / "spelled", Operators(), torch.float16)
    x = np.random.default_rng(0).standard_normal((2, 32, 48, 40)) + 100
    x = x.astype(np.float16)
    with torch.no_grad():
        exact = copy.deepcopy(block).double()
        exact.norm.__class__ = torch.nn.GroupNorm
        expected = exact(torch.from_numpy(x).double()).numpy()
    error, usual = (distance(run(file, x).astype(np.float64), expected) for file in (path, spelled))
    assert usual < 2e-3
    # ONNX Runtime's operator loses digits to E[x²] − E[x]²; float16 sums would overflow.
    assert error < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensorrt_rtx_builds_them(tmp_path, dtype):
    """Fused where it has a kernel (float16), several kernels elsewhere; without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    from fastface_trt.engines.cache import EngineCache
    from fastface_trt.engines.tensorrt.builder import TensorRTBuilder
    from fastface_trt.engines.tensorrt.options import TensorRTOptions

    spec, _, _ = export(tmp_path, Operators("onnx", "onnx"), dtype)
    options = TensorRTOptions(latent_sizes=((8, 8),), optimization_level=0)
    builder = TensorRTBuilder("tensorrt-rtx", options)
    engine, _ = EngineCache(tmp_path / "cache").get(spec, tmp_path, builder)
    assert engine.report.layers > 0


@pytest.mark.engines
def test_the_golden_cases_with_both(tmp_path, monkeypatch):
    """The authors' recorded steps, and the default graph's numbers within 1e-5."""
    from fastface_trt.export.modules import unet_export
    from fastface_trt.verify import replay as module

    def written(operators):
        monkeypatch.setattr(
            "fastface_trt.export.oracle.unet_export",
            lambda *arguments, **options: unet_export(
                *arguments, **(options | {"operators": operators})
            ),
        )
        monkeypatch.setenv("FASTFACE_CACHE", str(tmp_path / operators.attention))
        file = tmp_path / f"{operators.attention}.safetensors"
        module.replay(
            model=PIPELINE / "model",
            cases=PIPELINE / "cases.json",
            tensors=PIPELINE / "tensors.safetensors",
            out=file,
            backend="onnxruntime",
            names=["hyper_plain", "hyper_am1", "hyper_dcg"],
        )
        return load_file(file)

    spelled, onnx_form = written(Operators()), written(Operators("onnx", "onnx"))
    recorded = load_file(PIPELINE / "tensors.safetensors")
    for name, tensor in onnx_form.items():
        assert distance(tensor, spelled[name]) < 1e-5, name
        assert distance(tensor, recorded[name]) < 1e-3, name
