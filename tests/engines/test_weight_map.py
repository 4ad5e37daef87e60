"""The weight map covers all that a LoRA changes, and the topology sees all that it does not."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fastface_trt.engines.onnx.file import OnnxFile
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.engines.ort.weights import (
    arrange,
    cast,
    find_weights,
    possible_layouts,
    same_layout,
)
from fastface_trt.engines.weight_map import (
    WeightMap,
    digest_weights,
    find_change,
    first_difference,
    make_map,
    topology,
)
from fastface_trt.errors import EngineMismatch
from tests.engines.tiny_models import write_module


def quiet(line):
    pass


def lora_dependent(folders):
    """Initialisers whose bytes differ between two exports, read with the onnx package."""
    one, other = (
        {
            tensor.name: numpy_helper.to_array(tensor).tobytes()
            for tensor in onnx.load(folder / "unet" / "model.onnx").graph.initializer
        }
        for folder in folders
    )
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


@pytest.mark.parametrize("optimization", ["all", "extended", "basic"])
def test_every_weight_that_depends_on_a_lora_is_in_the_map(
    tiny_export, half_scale_export, tmp_path, optimization
):
    folder, manifest = tiny_export
    changed = lora_dependent((folder, half_scale_export[0]))
    assert len(changed) == 56
    builder = OnnxRuntimeBuilder(threads=1, optimization=optimization)
    builder.build(manifest.modules["unet"], folder, tmp_path, quiet)
    built = WeightMap.model_validate_json((tmp_path / "weights.json").read_text())
    found = {source for one in built.engine for source in one.sources}
    assert changed <= found
    # And every other weight, so that another checkpoint can be put in as well.
    assert built.uncovered() == []
    with OnnxFile(half_scale_export[0] / "unet" / "model.onnx") as half:
        assert set(find_change(manifest.modules["unet"], built, half).changed) == changed


@pytest.mark.parametrize("optimization", ["all", "extended"])
def test_half_precision_weights_are_found_cast_or_not(tmp_path, optimization):
    """On the CPU `all` folds the casts to float32 into the weights."""
    module = write_convolutions(tmp_path, np.float16)
    builder = OnnxRuntimeBuilder(threads=1, optimization=optimization)
    builder.build(module, tmp_path, tmp_path / "engine", quiet)
    built = WeightMap.model_validate_json((tmp_path / "engine" / "weights.json").read_text())
    assert built.uncovered() == []


def write_convolutions(root, dtype):
    """Convolutions of 4 → 24 → 32 channels, with and without bias: padded and blocked weights."""
    from fastface_trt.engines.files import describe_file
    from fastface_trt.engines.manifest import ModuleSpec, TensorSpec

    (root / "convolutions").mkdir()
    (root / "engine").mkdir()
    values = np.random.default_rng(3)
    weights = {
        "first": values.standard_normal((24, 4, 3, 3)),
        "bias": values.standard_normal(24),
        "second": values.standard_normal((32, 24, 1, 1)),
        "third": values.standard_normal((32, 32, 3, 3)),
    }
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "first", "bias"], ["a"], pads=[1] * 4),
            helper.make_node("Conv", ["a", "second"], ["b"]),
            helper.make_node("Conv", ["b", "third"], ["y"], pads=[1] * 4),
        ],
        "convolutions",
        [helper.make_tensor_value_info("x", kind, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("y", kind, ["batch", 32, 8, 8])],
        [numpy_helper.from_array(v.astype(dtype), name) for name, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = root / "convolutions" / "model.onnx"
    onnx.save(model, path)
    name = np.dtype(dtype).name
    return ModuleSpec(
        name="convolutions",
        inputs=(TensorSpec(name="x", dtype=name, shape=("batch", 4, 8, 8)),),
        outputs=(TensorSpec(name="y", dtype=name, shape=("batch", 32, 8, 8)),),
        files=(describe_file(root, path),),
    )


def test_layouts_against_their_definition():
    """Element by element, as ONNX Runtime's documentation of NCHWc defines the blocks."""
    shape = (20, 16, 2, 3)
    weight = np.random.default_rng(0).standard_normal(shape)
    block = 8
    target = (24, 16, 2, 3)
    flat = arrange(weight, f"blocked:{block}", target).reshape(3, 2, 2, 3, block, block)
    out_only = arrange(weight, f"blocked-out:{block}", target).reshape(3, 16, 2, 3, block)
    for o, i, h, w in np.ndindex(24, 16, 2, 3):
        expected = weight[o, i, h, w] if o < 20 else 0
        assert flat[o // block, i // block, h, w, i % block, o % block] == expected
        assert out_only[o // block, i, h, w, o % block] == expected
    assert set(possible_layouts(shape, target)) == {"blocked:8", "blocked-out:8"}
    np.testing.assert_array_equal(
        arrange(weight, "permute:1,0,3,2", (16, 20, 3, 2)), weight.transpose(1, 0, 3, 2)
    )
    np.testing.assert_array_equal(arrange(weight[:, 0, 0, 0], "pad", (24,))[20:], np.zeros(4))


def test_layouts_that_are_one_and_the_same_are_known():
    assert same_layout((16, 16, 1, 1), "blocked:16", "permute:1,0,2,3", (16, 16, 1, 1))
    assert not same_layout((16, 16, 2, 2), "blocked:16", "permute:1,0,2,3", (16, 16, 2, 2))
    assert list(possible_layouts((5, 1), (1, 5))) == []  # the bytes stay where they are


def test_bfloat16_becomes_float32_exactly():
    torch = pytest.importorskip("torch")
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = values.view(torch.uint16).numpy()
    np.testing.assert_array_equal(cast(bits, "bfloat16", "float32"), values.float().numpy())


def graph_file(path, change=lambda model: None):
    weights = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "ones": np.ones(3, np.float32),
        "also": np.ones(3, np.float32),
        "axes": np.array([0, 1], np.int64),
        "half": np.array(0.5, np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="n1"),
            helper.make_node("Mul", ["a", "half"], ["b"], name="n2"),
            helper.make_node("Add", ["b", "ones"], ["y"], name="n3"),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    change(model)
    onnx.save(model, path)
    return OnnxFile(path)


def set_weight(name, value):
    def change(model):
        one = next(t for t in model.graph.initializer if t.name == name)
        one.CopyFrom(numpy_helper.from_array(value, name))

    return change


def rename_a_node(model):
    model.graph.node[0].name = "another"


SAME = {
    "a weight": set_weight("w", np.full((2, 3), 7, np.float32)),
    "a node's name": rename_a_node,
    "documentation": lambda model: setattr(model.graph.node[0], "doc_string", "words"),
}
OTHER = {
    "initialiser w": set_weight("w", np.zeros((2, 4), np.float32)),
    "initialiser axes": set_weight("axes", np.array([0, 2], np.int64)),
    "initialiser half": set_weight("half", np.array(0.25, np.float32)),
    "node Add": lambda model: setattr(model.graph.node[2], "op_type", "Sub"),
    "node MatMul": lambda model: model.graph.node[0].attribute.append(
        helper.make_attribute("extra", 1)
    ),
    "node Mul": lambda model: model.graph.node[1].input.__setitem__(0, "x"),
    "the inputs": lambda model: (
        model.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 3)
    ),
    "the operator sets": lambda model: setattr(model.opset_import[0], "version", 19),
}


@pytest.mark.parametrize("what", SAME)
def test_what_is_no_part_of_the_topology(tmp_path, what):
    one = topology(graph_file(tmp_path / "a.onnx"))
    assert one == topology(graph_file(tmp_path / "b.onnx", SAME[what]))


@pytest.mark.parametrize("what", OTHER)
def test_the_first_difference_has_a_name(tmp_path, what):
    one = topology(graph_file(tmp_path / "a.onnx"))
    assert first_difference(one, topology(graph_file(tmp_path / "b.onnx", OTHER[what]))) == what


def test_a_longer_graph_differs(tmp_path):
    def longer(model):
        model.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))

    one = topology(graph_file(tmp_path / "a.onnx"))
    other = topology(graph_file(tmp_path / "b.onnx", longer))
    assert first_difference(one, other) is not None
    assert first_difference(other, one) is not None


def test_weights_of_equal_content_are_told_apart_by_name_only_if_all_are_there(tmp_path):
    onnx_file = graph_file(tmp_path / "a.onnx")
    weights = digest_weights(onnx_file)
    both = {one.name: one.sources for one in find_weights(onnx_file, weights, onnx_file)}
    assert both == {"w": ("w",), "ones": ("ones",), "also": ("also",)}

    def merge(model):
        also = next(t for t in model.graph.initializer if t.name == "also")
        model.graph.initializer.remove(also)

    merged = graph_file(tmp_path / "merged.onnx", merge)
    found = {one.name: one.sources for one in find_weights(onnx_file, weights, merged)}
    assert found == {"w": ("w",), "ones": ("also", "ones")}


def test_a_weight_that_was_merged_cannot_change_alone(unet_like, tmp_path):
    module, built = unet_like
    one = np.array([1, 1, 2], np.float32)
    apart = graph_file(tmp_path / "apart.onnx", set_weight("ones", one))
    with pytest.raises(EngineMismatch, match="does not tell also and ones apart"):
        find_change(module, built, apart)
    together = graph_file(
        tmp_path / "together.onnx",
        lambda model: [set_weight(name, one)(model) for name in ("ones", "also")],
    )
    assert set(find_change(module, built, together).changed) == {"ones", "also"}


def test_a_weight_that_was_folded_cannot_change_at_all(unet_like, tmp_path):
    module, built = unet_like
    built = built.model_copy(update={"engine": built.engine[1:]})
    changed = graph_file(tmp_path / "b.onnx", set_weight("w", np.zeros((2, 3), np.float32)))
    with pytest.raises(EngineMismatch, match="merged w into other values") as caught:
        find_change(module, built, changed)
    assert "build" in caught.value.hint


@pytest.fixture
def unet_like(tmp_path):
    """A module, and the map of an engine in which its two weights of ones are one."""
    module = write_module(tmp_path / "any")
    onnx_file = graph_file(tmp_path / "a.onnx")

    def merge(model):
        also = next(t for t in model.graph.initializer if t.name == "also")
        model.graph.initializer.remove(also)

    merged = graph_file(tmp_path / "merged.onnx", merge)
    weights = digest_weights(onnx_file)
    return module, make_map(onnx_file, weights, find_weights(onnx_file, weights, merged))
