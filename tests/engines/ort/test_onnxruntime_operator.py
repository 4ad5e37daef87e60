"""The custom operator in engines of the CUDA provider: placed, registered, or told why not.

The library is the real one and computes on the CPU here; the GPU and its provider are simulated.
"""

import gc
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.contract import (
    FUNCTION_NAME,
    IMAGE_TOKENS,
    IP_ADAPTER_SCALE,
    KERNEL_DOMAIN,
    MANIPULATION,
)
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.kernels import operator_library
from fastface_trt.engines.manifest import ModuleSpec, TensorSpec
from fastface_trt.engines.onnx import forms
from fastface_trt.engines.onnx.forms import Form
from fastface_trt.engines.ort import operator as onnxruntime_operator
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.errors import BuildFailed, EngineMismatch, MissingDependency
from tests.engines.gpu_double import Session, simulated_gpu, simulated_onnxruntime

pytestmark = pytest.mark.usefixtures("quick_collections")

HEADS, HEAD_SIZE, TOKENS, WIDTH = 2, 64, 4, 16
INPUTS = {
    "q": ("batch", "length", HEADS * HEAD_SIZE),
    IMAGE_TOKENS: ("batch", TOKENS, WIDTH),
    MANIPULATION: ("requests", 8),
    IP_ADAPTER_SCALE: ("requests",),
}


def model(operator=True, head_size=HEAD_SIZE, dtype=TensorProto.FLOAT):
    """y = λ f(A) V' by the operator, or y = q without it; k and v are products of image tokens."""
    weight = np.random.default_rng(1).standard_normal((WIDTH, HEADS * head_size)) / 4
    weight = weight.astype(helper.tensor_dtype_to_np_dtype(dtype))
    weights = [
        numpy_helper.from_array(weight, "k.weight"),
        numpy_helper.from_array(weight + 1, "v.weight"),
    ]
    nodes = [
        helper.make_node("MatMul", [IMAGE_TOKENS, "k.weight"], ["k"]),
        helper.make_node("MatMul", [IMAGE_TOKENS, "v.weight"], ["v"]),
        helper.make_node(
            FUNCTION_NAME,
            ["q", "k", "v", MANIPULATION, IP_ADAPTER_SCALE],
            ["y"],
            domain=KERNEL_DOMAIN,
            num_heads=HEADS,
        ),
    ]
    shapes = INPUTS | {"q": ("batch", "length", HEADS * head_size)}
    types = dict.fromkeys((MANIPULATION, IP_ADAPTER_SCALE), TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes if operator else [helper.make_node("Identity", ["q"], ["y"])],
        "attention",
        [
            helper.make_tensor_value_info(name, types.get(name, dtype), shape)
            for name, shape in shapes.items()
        ],
        [helper.make_tensor_value_info("y", dtype, shapes["q"])],
        weights if operator else [],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(KERNEL_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """An exported module, with a form for each kind of manipulation."""
    folder = tmp_path / "export" / "attention"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model())

    def cuda_form(path, tokens, manipulation):
        operator = manipulation == "operator"
        return Form(model(operator), {"decoupled_attention": int(operator)})

    monkeypatch.setattr(forms, "cuda_form", cuda_form)
    return ModuleSpec(
        name="attention",
        inputs=tuple(TensorSpec(name=n, dtype="float32", shape=s) for n, s in INPUTS.items()),
        outputs=(TensorSpec(name="y", dtype="float32", shape=INPUTS["q"]),),
        files=(describe_file(folder.parent, folder / "model.onnx"),),
    )


@pytest.fixture
def bench(module, tmp_path):
    with simulated_gpu() as (cuda, _), simulated_onnxruntime(cuda):
        builder = OnnxRuntimeBuilder("cuda")

        def opened(said=None):
            cache = EngineCache(tmp_path / "cache")
            progress = (lambda line: None) if said is None else said.append
            return cache.open(module, tmp_path / "export", builder, progress)

        yield opened, builder, EngineCache(tmp_path / "cache")
        gc.collect()
        builder.device().close()
        assert cuda.leaks() == []


def status(available):
    return lambda architecture=None: operator_library.LibraryStatus(available, "no compiler", "")


def arrays(seed=0, batch=3, length=5):
    """Inputs of two requests' kind `off`: what the text's attention would do with image tokens."""
    numbers = np.random.default_rng(seed)
    sizes = {"batch": batch, "length": length, "requests": 1}
    made = {
        name: numbers.standard_normal([sizes.get(d, d) for d in shape]).astype(np.float32)
        for name, shape in INPUTS.items()
    }
    made[MANIPULATION] = np.zeros((1, 8), np.float32)
    made[MANIPULATION][0, -1] = np.inf
    made[IP_ADAPTER_SCALE] = np.array([0.7], np.float32)
    return made


def reference(q, tokens, scale):
    """λ softmax(Q K'ᵀ / √D) V' per head, in float64."""
    weights = {
        one.name: numpy_helper.to_array(one).astype(np.float64)
        for one in onnx.load_model_from_string(model()).graph.initializer
    }

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, HEAD_SIZE).transpose(0, 2, 1, 3)

    q, k, v = (
        heads(x.astype(np.float64))
        for x in (q, tokens @ weights["k.weight"], tokens @ weights["v.weight"])
    )
    logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(HEAD_SIZE)
    maps = np.exp(logits - logits.max(-1, keepdims=True))
    out = (maps / maps.sum(-1, keepdims=True)) @ v
    return scale * out.transpose(0, 2, 1, 3).reshape(*out.shape[:1], -1, HEADS * HEAD_SIZE)


def test_the_library_lies_in_the_engine_and_runs_are_recorded(bench, recwarn):
    opened, _, cache = bench
    with opened() as engine:
        given = arrays()
        for _ in range(2):
            y = engine.device.download(engine(**given)["y"])
            expected = reference(given["q"], given[IMAGE_TOKENS], 0.7)
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        assert engine.captures
        assert len(Session.made[-1].graphs) == 1
    (entry,) = cache.entries()
    assert operator_library.library_in(entry.folder) is not None
    assert entry.manifest.options["manipulation"] == "operator"
    assert entry.manifest.options["operator"] == operator_library.LIBRARY_VERSION
    assert not [w for w in recwarn if "CUDA graph" in str(w.message)]


def test_without_a_library_the_graph_has_branches_and_that_is_told(bench, monkeypatch):
    opened, _, cache = bench
    monkeypatch.setattr(operator_library, "library_status", status(False))
    with pytest.warns(RuntimeWarning, match=r"No CUDA graph of attention.*no compiler"):
        engine = opened()
    with engine:
        given = arrays()
        np.testing.assert_array_equal(engine.device.download(engine(**given)["y"]), given["q"])
        assert not engine.captures
        assert "enable_cuda_graph" not in Session.made[-1].options
    (entry,) = cache.entries()
    assert entry.manifest.options["manipulation"] == "branches"


@pytest.mark.parametrize("why", ["compiler", "heads"])
def test_a_library_that_cannot_be_placed_is_told_and_done_without(bench, monkeypatch, why):
    opened, _, cache = bench

    def fails(*_, **__):
        raise MissingDependency("There is no C++ compiler.", "Install g++.")

    if why == "compiler":
        monkeypatch.setattr(operator_library, "place_library", fails)
        message = "There is no C++ compiler. Install g++."
    else:
        monkeypatch.setattr(operator_library, "supports", lambda *_: False)
        message = "The attention kernels take no heads of 64 in float32 with 4 image tokens."
    said = []
    with pytest.warns(RuntimeWarning, match=re.escape(f"a branch of the graph. {message}")):
        opened(said).close()
    assert [line for line in said if message in line]
    (entry,) = cache.entries()
    (warning,) = entry.manifest.report.warnings
    assert warning.startswith(message)
    assert operator_library.library_in(entry.folder) is None


def test_an_engine_with_its_library_serves_where_none_can_be_made(bench, monkeypatch):
    opened, builder, cache = bench
    opened().close()
    (built,) = cache.entries()
    monkeypatch.setattr(operator_library, "library_status", status(False))
    with opened() as engine:
        assert engine.captures
    assert [entry.key for entry in cache.entries()] == [built.key]
    monkeypatch.setattr(operator_library, "LIBRARY_VERSION", "another")
    assert not builder.takes(built.manifest)
    with pytest.raises(EngineMismatch, match="was built with options"):
        builder.open(built.manifest, built.folder)


def test_heads_are_read_from_the_graph(tmp_path):
    assert onnxruntime_operator._heads(model()) == {(64, "float32")}
    assert onnxruntime_operator._heads(model(head_size=32, dtype=TensorProto.FLOAT16)) == {
        (32, "float16")
    }
    unknown = onnx.load_model_from_string(model())
    unknown.graph.node[0].op_type = "SomethingElse"
    with pytest.raises(BuildFailed, match="width of k is not known"):
        onnxruntime_operator.place_operator(unknown.SerializeToString(), TOKENS, tmp_path)
    assert list(tmp_path.iterdir()) == []
