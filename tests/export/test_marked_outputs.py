"""Marked copies return the module's tensors, and float64 is PyTorch's float64."""

import numpy as np
import onnx
import pytest

from fastface_trt.engines.files import describe_file, verify_files
from fastface_trt.verify.inputs import module_inputs
from fastface_trt.verify.marked_outputs import MarkableModule, evaluate_float64
from fastface_trt.verify.modules import run_reference
from tests.engines.tiny_models import WIDTH, expected, write_module


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_copy_returns_what_was_marked(tmp_path, external, dtype):
    module = write_module(tmp_path / "export", dtype=dtype, external=external)
    x = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(dtype)
    for inline, names in ((False, {"y"}), (True, {"p", "y"})):
        marked = MarkableModule(module, tmp_path / "export", inline=inline)
        assert set(marked.names) == names
        copy = marked.write(marked.names, tmp_path / f"copy{inline}")
        verify_files(tmp_path / f"copy{inline}", copy.files)
        assert {tensor.name for tensor in copy.outputs} == names
        values = run_reference(copy, tmp_path / f"copy{inline}", {"x": x})
        for name in names:
            truth = expected(x.astype("float64")) - (name == "p")
            np.testing.assert_allclose(
                values[name], truth, atol=5e-2 if dtype == "float16" else 1e-4
            )
        # The module itself is what it was, and can be marked again.
        again = marked.write([], tmp_path / f"again{inline}")
        assert [tensor.name for tensor in again.outputs] == ["y"]
        path = tmp_path / f"again{inline}" / again.files[0].path
        # Without the data: onnx refuses hard links, which ONNX Runtime and OnnxFile take.
        graph = onnx.load(path, load_external_data=False).graph
        assert [value.name for value in graph.output] == ["y"]
    assert marked.producers("y") == {"p"}
    assert marked.ancestors("p") == frozenset()


def test_float64_of_a_unet_is_pytorchs(tiny_export, tiny):
    import torch

    from fastface_trt.export.adapters import attach_adapter, read_adapter
    from fastface_trt.export.modules import UNetModule
    from tests.helpers.tiny_sdxl import tiny_unet

    folder, manifest = tiny_export
    module = manifest.modules["unet"]
    inputs = module_inputs(module, manifest, folder)
    ours = evaluate_float64(MarkableModule(module, folder, inline=True), "noise_prediction", inputs)
    unet = tiny_unet()
    attach_adapter(unet, read_adapter(tiny / "adapter.safetensors"), lora_scale=1.0)
    with torch.no_grad():
        wide = {k: torch.from_numpy(v).double() for k, v in inputs.items()}
        truth = UNetModule(unet.double()).eval()(**wide).numpy()
    assert ours.dtype == np.float64
    # diffusers makes its sinusoids in float32, and the quantile is exact to 1e-6.
    assert np.linalg.norm(ours - truth) / np.linalg.norm(truth) < 1e-6
    with pytest.raises(ValueError, match="inline=True"):
        evaluate_float64(MarkableModule(module, folder), "noise_prediction", inputs)


def test_scopes_are_those_of_pytorch(tiny_export):
    folder, manifest = tiny_export
    for inline in (False, True):
        marked = MarkableModule(manifest.modules["unet"], folder, inline=inline)
        assert marked.info("noise_prediction").scope == "unet.conv_out"
        attention = [marked.info(n) for n in marked.names if marked.info(n).calls]
        assert len(attention) == (0 if inline else 7)
        assert all(info.scope.endswith("attn2") for info in attention)
    # Inside the functions, counts are no values: a rounding error moves them by whole steps.
    counts = [n for n in marked.names if marked.info(n).op in ("Less", "Floor", "ReduceSum")]
    assert {marked.info(n).op for n in counts} == {"ReduceSum"}
    assert not any("count" in name or "rank" in name for name in marked.names)


def test_bfloat16_is_returned_as_float32(tmp_path):
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    module = write_module(tmp_path)
    path = tmp_path / module.files[0].path
    model = onnx.load(path)
    del model.graph.node[:]
    del model.graph.initializer[:]
    del model.functions[:]
    model.graph.node.extend(nodes)
    kind = helper.make_tensor_value_info("b", TensorProto.BFLOAT16, ["batch", WIDTH])
    model.graph.value_info.append(kind)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = WIDTH
    onnx.save(model, path)
    module = module.model_copy(update={"files": (describe_file(tmp_path, path),)})
    marked = MarkableModule(module, tmp_path)
    copy = marked.write(["b"], tmp_path / "copy")
    assert marked.output_name("b") == "b.float32"
    assert [(t.name, t.dtype) for t in copy.outputs[1:]] == [("b.float32", "float32")]
    x = np.float32([np.linspace(0.1, 3, WIDTH)])
    values = run_reference(copy, tmp_path / "copy", {"x": x})
    np.testing.assert_allclose(values["b.float32"], x, rtol=2**-8)
    assert (values["b.float32"] != x).any()
