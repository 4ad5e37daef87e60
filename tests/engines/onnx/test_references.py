"""Whatever a graph says it reads is in the manifest by hash, or is never opened.

Tensors are hidden wherever an ONNX model can hold one; the onnx package says where that is.
"""

import os
import socket

import onnx
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import _get_all_tensors, uses_external_data

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.onnx.file import OnnxFile, verify_module
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.engines.refit import refit
from fastface_trt.errors import EngineMismatch, ExportIncomplete
from tests.engines.tiny_models import ChunkBuilder, write_module

SECRET = "secret.bin"


def external(location=SECRET, name="hidden"):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key = "location"
    entry.value = location
    return tensor


def sparse(**parts):
    found = onnx.SparseTensorProto(dims=[4])
    for name, tensor in parts.items():
        getattr(found, name).CopyFrom(tensor)
    return found


def attribute(kind, **fields):
    found = onnx.AttributeProto(name="value", type=kind)
    for name, value in fields.items():
        held = getattr(found, name)
        held.extend(value) if isinstance(value, list) else held.CopyFrom(value)
    return found


def node(*attributes):
    found = helper.make_node("Constant", [], ["hidden"])
    found.attribute.extend(attributes)
    return found


def inner(tensor):
    return helper.make_graph([node(attribute(4, t=tensor))], "inner", [], [], [tensor])


KINDS = onnx.AttributeProto
HIDDEN = {
    "a weight": lambda m, t: m.graph.initializer.append(t),
    "a sparse weight": lambda m, t: m.graph.sparse_initializer.append(sparse(values=t)),
    "a sparse weight's places": lambda m, t: m.graph.sparse_initializer.append(sparse(indices=t)),
    "a constant": lambda m, t: m.graph.node.append(node(attribute(KINDS.TENSOR, t=t))),
    "constants": lambda m, t: m.graph.node.append(node(attribute(KINDS.TENSORS, tensors=[t]))),
    "a sparse constant": lambda m, t: m.graph.node.append(
        node(attribute(KINDS.SPARSE_TENSOR, sparse_tensor=sparse(values=t)))
    ),
    "sparse constants": lambda m, t: m.graph.node.append(
        node(attribute(KINDS.SPARSE_TENSORS, sparse_tensors=[sparse(indices=t)]))
    ),
    "a branch": lambda m, t: m.graph.node.append(node(attribute(KINDS.GRAPH, g=inner(t)))),
    "branches": lambda m, t: m.graph.node.append(node(attribute(KINDS.GRAPHS, graphs=[inner(t)]))),
    "a branch of a branch": lambda m, t: m.graph.node.append(
        node(
            attribute(
                KINDS.GRAPH,
                g=helper.make_graph([node(attribute(KINDS.GRAPH, g=inner(t)))], "outer", [], []),
            )
        )
    ),
    "a function": lambda m, t: m.functions[0].node.append(node(attribute(KINDS.TENSOR, t=t))),
    "a function's default": lambda m, t: m.functions[0].attribute_proto.append(
        attribute(KINDS.TENSOR, t=t)
    ),
    "training": lambda m, t: m.training_info.add().initialization.CopyFrom(inner(t)),
    "a kind of attribute that lies": lambda m, t: m.graph.node.append(
        node(attribute(KINDS.INT, t=t))
    ),
}


def hidden(folder, change, **options):
    """A module with a changed graph, which its manifest describes as it is."""
    module = write_module(folder, **options)
    path = folder / module.files[0].path
    content = path.read_bytes()
    if isinstance(change, bytes):
        path.write_bytes(content + change)
    else:
        model = onnx.ModelProto.FromString(content)
        change(model)
        path.write_bytes(model.SerializeToString())
    files = (describe_file(folder, path), *module.files[1:])
    return module.model_copy(update={"files": files})


def refused(folder, module, match):
    """Refused before any builder or reader sees it, with nothing left behind."""
    cache = EngineCache(folder / "cache")
    log = folder / "builds"
    for use in (
        lambda: cache.get(module, folder, ChunkBuilder(log)),
        lambda: refit(cache, module, folder, OnnxRuntimeBuilder()),
        lambda: verify_module(folder, module),
    ):
        with pytest.raises(ExportIncomplete, match=match) as caught:
            use()
        assert len(str(caught.value)) < 600 + len(str(folder))
    assert not log.exists()
    assert cache.entries() == []


@pytest.mark.parametrize("place", HIDDEN)
def test_a_file_that_a_graph_names_and_its_manifest_does_not_is_refused(tmp_path, place):
    module = hidden(tmp_path, lambda model: HIDDEN[place](model, external()))
    (tmp_path / "affine" / SECRET).write_bytes(bytes(4))
    with OnnxFile(tmp_path / module.files[0].path) as read:
        assert read.references() == {SECRET}
    refused(tmp_path, module, SECRET)


@pytest.mark.parametrize("weights", [False, True])
def test_the_files_that_the_onnx_package_would_read_are_found(tmp_path, weights):
    module = write_module(tmp_path, external=weights)
    path = tmp_path / module.files[0].path
    model = onnx.load(path, load_external_data=False)
    for number, change in enumerate(HIDDEN.values()):
        change(model, external(f"{number}.bin"))
    path.write_bytes(model.SerializeToString())
    theirs = {
        entry.value
        for tensor in _get_all_tensors(model)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    with OnnxFile(path) as read:
        assert theirs <= read.references()


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "../affine/model.data",
        "sub/../model.data",
        "/etc/hostname",
        "//etc/hostname",
        "~/secret.bin",
        "file:///etc/hostname",
        "C:\\secret.bin",
        "..\\secret.bin",
        "*/_ORT_MEM_ADDR_/*",  # ONNX Runtime's own word for: the offset is an address in memory
        "model.data\0.bin",
        "model.data/",
        "model.onnx",
        "",
        ".",
        "x" * 5000,
    ],
)
def test_a_roundabout_name_is_none_of_the_manifests(tmp_path, location):
    module = hidden(
        tmp_path, lambda model: model.graph.initializer.append(external(location)), external=True
    )
    if location == "model.data/":  # which is how pathlib spells the data file, too
        assert verify_module(tmp_path, module)
    else:
        refused(tmp_path, module, "which no manifest names")


FIELD = {
    "a second graph": (b"\x3a\x00", "two graphs"),
    "a field number whose high bits others drop": (b"\xba\x80\x80\x80\x10\x00", "32 bits"),
    "a group": (b"\x3b\x3c", "wire type"),
    "a length beyond the end": (b"\x3a\xff\xff\xff\xff\x0f", "cut"),
}


@pytest.mark.parametrize("kind", FIELD)
def test_what_readers_of_protobuf_read_differently_is_refused(tmp_path, kind):
    content, match = FIELD[kind]
    refused(tmp_path, hidden(tmp_path, content), match)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    module = hidden(tmp_path, lambda model: model.graph.initializer.append(external("?secret.bin")))
    path = tmp_path / module.files[0].path
    path.write_bytes(path.read_bytes().replace(b"?secret", b"\xffsecret"))
    module = module.model_copy(update={"files": (describe_file(tmp_path, path),)})
    refused(tmp_path, module, "UTF-8")


def test_a_compiled_graph_is_refused(tmp_path):
    """It names a file of its own in an attribute, which ONNX Runtime gives to a driver."""
    compiled = helper.make_node(
        "EPContext", [], ["y2"], domain="com.microsoft", ep_cache_context="/etc/hostname"
    )
    module = hidden(tmp_path, lambda model: model.graph.node.append(compiled))
    refused(tmp_path, module, "compiled for one machine")


def fifo(path, outside):
    os.mkfifo(path)


def device(path, outside):
    path.symlink_to("/dev/zero")


def unix_socket(path, outside):
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


def link_out(path, outside):
    path.symlink_to(outside)


def link_of_a_folder(path, outside):
    path.parent.rename(outside.parent / "moved")
    path.parent.symlink_to(outside.parent / "moved")
    (path.parent / path.name).write_bytes(outside.read_bytes())


def folder(path, outside):
    path.mkdir()


STRANGE = [fifo, device, unix_socket, folder, link_out, link_of_a_folder]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_no_file_of_the_export_is_never_opened(tmp_path, monkeypatch, strange, index):
    """Opening a pipe would wait for ever, and a device has no end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "export").mkdir()
    module = write_module(tmp_path / "export", external=True)
    path = tmp_path / "export" / module.files[index].path
    outside = tmp_path / "outside"
    path.rename(outside)
    strange(path, outside)
    with pytest.raises(ExportIncomplete, match=r"not an ordinary file|link out of its folder"):
        verify_module(tmp_path / "export", module)


def test_links_inside_an_export_and_to_it_are_followed(tmp_path):
    (tmp_path / "export").mkdir()
    module = write_module(tmp_path / "export", external=True)
    data = tmp_path / "export" / module.files[1].path
    data.rename(tmp_path / "export" / "weights")
    data.symlink_to("../weights")
    (tmp_path / "link").symlink_to("export")
    assert verify_module(tmp_path / "link", module) == tmp_path / "link" / module.files[0].path


def test_two_data_files_that_change_places_are_another_engine(tmp_path):
    module = write_module(tmp_path, external=True)
    graph, data = module.files

    def key(*hashes):
        files = [
            data.model_copy(update={"path": f"affine/{name}", "sha256": sha256})
            for name, sha256 in hashes
        ]
        same = module.model_copy(update={"files": (graph, *files)})
        return EngineCache(tmp_path).key(same, ChunkBuilder())

    first = key(("a", "0" * 64), ("b", "1" * 64))
    assert key(("b", "1" * 64), ("a", "0" * 64)) == first
    assert key(("a", "1" * 64), ("b", "0" * 64)) != first


@pytest.mark.parametrize("name", ["libfastface_attention.so", "engine.data2", "sub/x"])
def test_a_file_beside_an_engine_is_not_of_it(tmp_path, name):
    cache, builder = EngineCache(tmp_path / "cache"), ChunkBuilder(tmp_path / "builds")
    module = write_module(tmp_path)
    engine, folder = cache.get(module, tmp_path, builder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"code")
    with pytest.raises(EngineMismatch, match=f"holds {name}, which is not of it"):
        cache.verify(engine.key)
    cache.get(module, tmp_path, builder)
    assert not (folder / name).exists()
    assert builder.builds() == 2


@pytest.mark.parametrize("location", ["/etc/hostname", "../../secret.bin", "*/_ORT_MEM_ADDR_/*"])
def test_an_engine_that_reads_elsewhere_is_not_opened(tmp_path, location):
    """As a release could bring it: its own files are what its manifest says."""
    module, builder = write_module(tmp_path / "export"), OnnxRuntimeBuilder(threads=1)
    cache = EngineCache(tmp_path / "cache")
    manifest, folder = cache.get(module, tmp_path / "export", builder)
    model = onnx.load(folder / "engine.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    content = model.SerializeToString()
    (folder / "engine.onnx").write_bytes(content)
    files = tuple(describe_file(folder, folder / file.path) for file in manifest.files)
    manifest = manifest.model_copy(update={"files": files})
    (folder / "engine.json").write_text(manifest.model_dump_json())
    cache.verify(manifest.key)
    with pytest.raises(EngineMismatch, match="which no manifest names"):
        cache.open(module, tmp_path / "export", builder)
