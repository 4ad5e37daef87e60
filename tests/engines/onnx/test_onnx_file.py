"""The reader of ONNX files, compared with the onnx package."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastface_trt.engines.onnx.file import MODULE_KEY, OnnxFile
from fastface_trt.errors import ExportIncomplete
from tests.engines.tiny_models import write_module


def same_as_onnx(path):
    model = onnx.load(path)
    with OnnxFile(path) as read:
        assert list(read.initializers) == [t.name for t in model.graph.initializer]
        for tensor in model.graph.initializer:
            ours, theirs = read.initializers[tensor.name], numpy_helper.to_array(tensor)
            assert ours.shape == theirs.shape
            assert ours.dtype == str(theirs.dtype)
            assert bytes(ours.data) == theirs.tobytes()
        assert [(n.name, n.op_type, n.outputs) for n in read.nodes] == [
            (n.name, n.op_type, tuple(n.output)) for n in model.graph.node
        ]


@pytest.mark.parametrize("external", [False, True])
def test_weights_inside_and_beside_the_graph(tmp_path, external):
    write_module(tmp_path, external=external)
    same_as_onnx(tmp_path / "affine" / "model.onnx")


def test_every_module_of_an_export(tiny_export):
    folder, manifest = tiny_export
    for module in manifest.modules.values():
        same_as_onnx(folder / module.files[0].path)
    with OnnxFile(folder / "unet/model.onnx") as unet:
        scopes = {node.scope for node in unet.nodes if node.op_type == "Conv"}
        assert {"unet.conv_in", "unet.conv_out"} <= scopes


def test_the_address_is_where_the_bytes_are(tmp_path):
    import ctypes

    write_module(tmp_path, external=True)
    with OnnxFile(tmp_path / "affine" / "model.onnx") as read:
        weight = read.initializers["w"]
        there = ctypes.string_at(weight.address, len(weight.data))
        assert np.frombuffer(there, np.float32).tolist() == [2.0] * 512
        read.drop_pages()  # dropped pages come back from the file
        assert ctypes.string_at(weight.address, len(weight.data)) == there


def test_nodes_say_which_module_they_came_from(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"], name="n")
    entry = node.metadata_props.add()
    entry.key, entry.value = MODULE_KEY, "unet.mid_block"
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]))
    onnx.save(model, tmp_path / "model.onnx")
    with OnnxFile(tmp_path / "model.onnx") as read:
        assert read.nodes[0].scope == "unet.mid_block"


def test_bad_files_are_one_sentence(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportIncomplete, match="is missing"):
        OnnxFile(path)
    path.write_bytes(b"")
    with pytest.raises(ExportIncomplete, match="cannot be read"):
        OnnxFile(path)
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(ExportIncomplete, match="not an ONNX model"):
        OnnxFile(path)
    write_module(tmp_path, external=True)
    whole = (tmp_path / "affine/model.onnx").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportIncomplete):
        _ = OnnxFile(path).initializers


def test_data_beyond_its_file_or_folder_is_refused(tmp_path):
    write_module(tmp_path, external=True)
    path = tmp_path / "affine" / "model.onnx"
    data = path.with_name("model.data")
    data.write_bytes(data.read_bytes()[:100])
    with OnnxFile(path) as read, pytest.raises(ExportIncomplete, match="ends beyond"):
        _ = read.initializers
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = "../model.data"
    path.write_bytes(model.SerializeToString())
    with OnnxFile(path) as read, pytest.raises(ExportIncomplete, match="outside its folder"):
        _ = read.initializers
