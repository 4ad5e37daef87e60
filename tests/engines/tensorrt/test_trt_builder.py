"""Building with TensorRT-RTX on any machine, and what an engine may run on."""

import errno
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from fastface_trt.engines import children
from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import EngineManifest, ModuleSpec, TensorSpec
from fastface_trt.engines.onnx.file import MODULE_KEY
from fastface_trt.engines.tensorrt import builder as builder_module
from fastface_trt.engines.tensorrt import plan as worker
from fastface_trt.engines.tensorrt.builder import TensorRTBuilder
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.engines.tensorrt.plan import Job
from fastface_trt.errors import BackendUnavailable, BuildFailed, EngineMismatch, StorageError
from tests.engines.tiny_models import tree, write_module

pytest.importorskip("tensorrt_rtx")

NOWHERE = {"gpu": "unknown", "compute_capability": "unknown"}
ADA = {"gpu": "NVIDIA RTX 4090", "compute_capability": "8.9"}
HOPPER = {"gpu": "NVIDIA H100", "compute_capability": "9.0"}


@pytest.fixture
def store(tmp_path):
    return EngineCache(tmp_path / "cache")


def small(**options):
    return TensorRTBuilder("tensorrt-rtx", TensorRTOptions(**options))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_plan_is_built_once_with_its_report(store, tmp_path, dtype):
    module = write_module(tmp_path / "export", dtype=dtype, external=True)
    events, lines = [], []
    builder = TensorRTBuilder("tensorrt-rtx", on_event=events.append)
    manifest, folder = store.get(module, tmp_path / "export", builder, lines.append)
    assert [file.path for file in manifest.files] == ["engine.plan"]
    assert manifest.report.layers >= 2
    assert manifest.report.peak_resident_bytes > 0
    assert manifest.hardware == {"targets": "any"}
    assert manifest.options["profiles"][0]["best"] == {"x": [1, 16]}
    kinds = [event["event"] for event in events]
    assert {"parsed", "phase", "end"} <= set(kinds)
    assert {event["module"] for event in events} == {"affine"}
    assert any(" layers in " in line for line in lines)
    assert store.get(module, tmp_path / "export", builder)[1] == folder


def test_the_parsers_error_names_the_node_and_the_pytorch_module(store, tmp_path):
    folder = tmp_path / "export" / "broken"
    folder.mkdir(parents=True)
    node = helper.make_node("Concat", ["a", "b"], ["y"], name="node_cat_7", axis=1)
    entry = node.metadata_props.add()
    entry.key, entry.value = MODULE_KEY, "unet.add_embedding"
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT16, [1, 4]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 4]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, folder / "model.onnx")
    module = ModuleSpec(
        name="broken",
        inputs=(
            TensorSpec(name="a", dtype="float16", shape=(1, 4)),
            TensorSpec(name="b", dtype="float32", shape=(1, 4)),
        ),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 8)),),
        files=(describe_file(tmp_path / "export", folder / "model.onnx"),),
    )
    with pytest.raises(BuildFailed, match="same type") as caught:
        store.get(module, tmp_path / "export", small())
    assert "node_cat_7 (Concat) of module unet.add_embedding" in caught.value.message
    assert tree(store.root) == []


def test_a_graph_that_does_not_fit_its_manifest(store, tmp_path):
    module = write_module(tmp_path / "export")
    wrong = module.model_copy(
        update={"outputs": (TensorSpec(name="z", dtype="float32", shape=(1,)),)}
    )
    with pytest.raises(BuildFailed, match="its outputs are y"):
        store.get(wrong, tmp_path / "export", small())


def test_what_needs_a_gpu_says_so(store, tmp_path, monkeypatch):
    module = write_module(tmp_path / "export")
    if builder_module.cuda_hardware()["gpu"] == "unknown":
        with pytest.raises(BuildFailed, match="cannot build affine") as caught:
            store.get(module, tmp_path / "export", small(refittable=True))
        assert "needs a GPU" in caught.value.hint
    monkeypatch.setattr(builder_module, "cuda_hardware", lambda: NOWHERE)
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU"):
        small().check_runs_here()
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU"):
        store.open(module, tmp_path / "export", small())


def test_a_gpu_that_tensorrt_rtx_refuses_is_told_before_a_build(tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "cuda_hardware", lambda: HOPPER)
    monkeypatch.setattr(builder_module, "run_in_child", lambda job, tell: {})
    module = write_module(tmp_path / "export")

    def build(builder):
        builder.build(module, tmp_path / "export", tmp_path, print)

    for act in (lambda: build(small()), small().check_runs_here):
        with pytest.raises(BackendUnavailable, match=r"does not take NVIDIA H100 .*9\.0") as caught:
            act()
        assert "--target" in caught.value.hint
    build(small(targets=("sm89",)))  # for another machine
    monkeypatch.setattr(builder_module, "cuda_hardware", lambda: NOWHERE)
    build(small())
    old = {"gpu": "NVIDIA V100", "compute_capability": "7.0"}
    monkeypatch.setattr(builder_module, "cuda_hardware", lambda: old)
    tensorrt = TensorRTBuilder("tensorrt")
    monkeypatch.setattr(type(tensorrt.flavour), "module", lambda self: FakeBinding)
    with pytest.raises(BackendUnavailable, match=r"TensorRT 11\.4 does not take NVIDIA V100"):
        build(tensorrt)


class FakeBinding:
    __version__ = "11.4"


def test_bfloat16_at_the_boundary_is_refused(tmp_path):
    module = write_module(tmp_path / "export")
    odd = module.model_copy(
        update={"inputs": (TensorSpec(name="x", dtype="bfloat16", shape=(1,)),)}
    )
    with pytest.raises(BuildFailed, match="bfloat16"):
        small().build(odd, tmp_path, tmp_path, print)


def manifest_of(module, builder, **fields):
    values = {
        "key": "0" * 64,
        "module": module,
        "files": module.files,
        "build_seconds": 1,
        **builder.identity(module),
    }
    return EngineManifest(**(values | fields))


@pytest.mark.parametrize(
    ("options", "fields", "gpu", "field"),
    [
        ({}, {"backend": "onnxruntime"}, ADA, "backend"),
        ({}, {"backend_version": "1.0.0"}, ADA, "backend_version"),
        ({"targets": ("sm86", "sm120")}, {}, ADA, "targets"),
        ({}, {"hardware": HOPPER}, ADA, "gpu"),
        ({}, {"hardware": {"compute_capability": "9.0"}}, ADA, "compute_capability"),
    ],
)
def test_an_engine_for_something_else_names_the_field(
    tmp_path, monkeypatch, options, fields, gpu, field
):
    monkeypatch.setattr(builder_module, "cuda_hardware", lambda: gpu)
    module = write_module(tmp_path)
    builder = small(**options)
    manifest = manifest_of(module, builder, **fields)
    with pytest.raises(EngineMismatch, match=f"built with {field} .*, here it is") as caught:
        builder.open(manifest, tmp_path)
    assert "uild it" in caught.value.hint


def test_targets_and_compatible_engines_fit_other_gpus(tmp_path, monkeypatch):
    module = write_module(tmp_path)
    for options in ({}, {"targets": ("sm89",)}):
        builder = small(**options)
        assert builder._misfit(manifest_of(module, builder), ADA) is None
    built = {"hardware": {}, "options": {"hardware_compatible": True, "profiles": []}}
    assert builder._misfit(manifest_of(module, builder, **built), HOPPER) is None
    turing = {"gpu": "T4", "compute_capability": "7.5"}
    assert builder._misfit(manifest_of(module, builder, **built), turing)[0] == "compute_capability"
    monkeypatch.setattr(builder_module.Flavour, "version", lambda flavour: "11.4")
    monkeypatch.setattr(builder_module, "cuda_hardware", lambda: ADA)
    same = TensorRTBuilder("tensorrt", TensorRTOptions(same_compute_capability=True))
    mine = manifest_of(module, same)
    assert mine.hardware == {"compute_capability": "8.9"}
    assert same._misfit(mine, ADA | {"gpu": "NVIDIA L4"}) is None
    assert same._misfit(mine, HOPPER)[0] == "compute_capability"
    monkeypatch.undo()
    older = {"backend_version": "1.0", "options": {"version_compatible": True, "profiles": []}}
    assert builder._misfit(manifest_of(module, builder, **older), ADA) is None
    newer = older | {"backend_version": "99.0"}
    assert builder._misfit(manifest_of(module, builder, **newer), ADA)[0] == "backend_version"


def test_an_engine_with_more_profiles_serves_where_none_were_asked_for(store, tmp_path):
    module = write_module(tmp_path / "export")
    _, folder = store.get(module, tmp_path / "export", small(optimization_level=0))
    default = TensorRTBuilder("tensorrt-rtx", TensorRTOptions(), exact=False)
    assert store.get(module, tmp_path / "export", default, build=False)[1] == folder
    with pytest.raises(EngineMismatch, match="optimization_level 0, here none"):
        store.get(module, tmp_path / "export", small(), build=False)


def test_an_option_of_the_run_builds_nothing_anew(store, tmp_path):
    from types import SimpleNamespace

    module = write_module(tmp_path / "export")
    _, folder = store.get(module, tmp_path / "export", small())
    export = SimpleNamespace(latent_shape=lambda: (4, 128, 128))
    for strategy in ("lazy", "eager", "none"):
        options = {"kernel_specialization": strategy}
        builder = make_builder(export, "tensorrt-rtx", options=options)
        assert store.get(module, tmp_path / "export", builder, build=False)[1] == folder


def test_a_changed_onnx_says_so(store, tmp_path):
    module = write_module(tmp_path / "export")
    store.get(module, tmp_path / "export", small())
    other = write_module(tmp_path / "export", factor=3.0)
    with pytest.raises(EngineMismatch, match="another ONNX file"):
        store.get(other, tmp_path / "export", small(), build=False)


def test_a_truncated_plan_is_never_opened(store, tmp_path):
    module = write_module(tmp_path / "export")
    manifest, folder = store.get(module, tmp_path / "export", small())
    plan = folder / "engine.plan"
    plan.write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(EngineMismatch, match="truncated"):
        store.verify(manifest.key)
    lines = []
    again, _ = store.get(module, tmp_path / "export", small(), lines.append)
    assert any("set aside" in line for line in lines)
    store.verify(again.key)


def test_a_full_disk_is_a_storage_error(store, tmp_path, monkeypatch):
    module = write_module(tmp_path / "export")
    event = {
        "event": "failed",
        "errno": errno.ENOSPC,
        "message": "No space left on device",
        "file": "engine.plan",
    }
    monkeypatch.setattr(
        builder_module,
        "run_in_child",
        lambda job, tell: (_ for _ in ()).throw(worker._error(event)),
    )
    with pytest.raises(StorageError, match="is full"):
        store.get(module, tmp_path / "export", small())
    assert tree(store.root) == []


def test_a_plan_that_cannot_be_written_reaches_the_parent(tmp_path):
    module = write_module(tmp_path / "export")
    missing = tmp_path / "gone"
    job = Job(
        flavour="tensorrt-rtx",
        options=TensorRTOptions(),
        module=module,
        source=str(tmp_path / "export"),
        target=str(missing),
    )
    with pytest.raises(FileNotFoundError):
        worker.run_in_child(job, lambda event: None)


def children_of(pid):
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(line) for line in listed.stdout.split()]


def test_a_cancelled_build_ends_its_child_and_leaves_nothing(store, tmp_path):
    module = write_module(tmp_path / "export")

    def stop(event):
        raise KeyboardInterrupt

    builder = TensorRTBuilder("tensorrt-rtx", on_event=stop)
    with pytest.raises(KeyboardInterrupt):
        store.get(module, tmp_path / "export", builder)
    assert tree(store.root) == []


def test_a_killed_child_is_one_sentence(store, tmp_path):
    module = write_module(tmp_path / "export")

    def kill(event):
        for pid in children_of(os.getpid()):
            command = Path(f"/proc/{pid}/cmdline")
            if command.exists() and b"tensorrt.plan" in command.read_bytes():
                os.kill(pid, signal.SIGKILL)

    builder = TensorRTBuilder("tensorrt-rtx", on_event=kill)
    with pytest.raises(BuildFailed, match="memory ran out"):
        store.get(module, tmp_path / "export", builder)
    assert tree(store.root) == []


def test_a_crash_keeps_its_last_words(tmp_path, monkeypatch):
    module = write_module(tmp_path / "export")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'Internal Error: boom' >&2\nexit 134\n")
    broken.chmod(0o755)
    monkeypatch.setattr(children, "get_executable", lambda: os.fsencode(broken))
    with pytest.raises(BuildFailed, match=r"crashed .*affine \(status 134\): Internal Error: boom"):
        small().build(module, tmp_path / "export", tmp_path, print)


def test_events_are_json_and_the_log_can_be_read_while_building(tmp_path):
    module = write_module(tmp_path / "export")
    seen = []
    TensorRTBuilder("tensorrt-rtx", on_event=lambda e: seen.append(json.dumps(e))).build(
        module, tmp_path / "export", tmp_path, lambda line: None
    )
    assert (tmp_path / "engine.plan").stat().st_size > 0
    assert all(json.loads(line)["event"] in ("parsed", "phase", "step", "end") for line in seen)


def test_two_builders_build_once(store, tmp_path):
    module = write_module(tmp_path / "export")
    builds = []

    def run():
        builder = TensorRTBuilder(
            "tensorrt-rtx",
            on_event=lambda e: builds.append(e) if e["event"] == "parsed" else time.sleep(0),
        )
        store.get(module, tmp_path / "export", builder)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
