"""The model repository: its config against the real protobuf, and that it is whole or not there."""

import json

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fastface_trt.cli.main import cli
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.manifest import EngineManifest, FileEntry, ModuleSpec, TensorSpec
from fastface_trt.errors import EngineMismatch, InvalidRequest, StorageError
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.triton.model_config import (
    DynamicBatching,
    InstanceGroup,
    InstanceKind,
    ModelConfig,
    TimeoutAction,
)
from fastface_trt.serving.triton.repository import (
    REPOSITORY_FILE,
    RepositoryOptions,
    TritonSettings,
    model_config,
    write_repository,
)
from fastface_trt.serving.triton.tensors import DataType, TensorConfig
from tests.serving.triton.triton_server import read_config


def parse(text):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def unet_engine(**options):
    entry = FileEntry(path="f", bytes=0, sha256="0" * 64)
    latents = TensorSpec(name="latents", dtype="float32", shape=("requests", 4, "height", "width"))
    module = ModuleSpec(name="unet", inputs=(latents,), outputs=(), files=(entry,))
    return EngineManifest(
        key="0" * 64,
        backend="tensorrt",
        backend_version="11",
        module=module,
        options=options,
        files=(entry,),
        build_seconds=0,
    )


def profile(*requests):
    smallest, largest = min(requests), max(requests)
    ends = [{"latents": (count, 4, 8, 8)} for count in (smallest, largest, largest)]
    return dict(zip(("smallest", "best", "largest"), ends, strict=True))


def test_every_enum_has_the_number_of_the_proto():
    for ours, theirs in (
        (DataType, model_config_pb2.DataType),
        (InstanceKind, model_config_pb2.ModelInstanceGroup.Kind),
        (TimeoutAction, model_config_pb2.ModelQueuePolicy.TimeoutAction),
    ):
        assert {one.name: one.value for one in ours}.items() <= dict(theirs.items()).items()


def test_text_is_what_the_protobuf_reads_back():
    nasty = 'a "quoted" \\ back\nslash\t, ümlaut {}'
    config = ModelConfig(
        name="m",
        max_batch_size=4,
        input=(TensorConfig("I", DataType.TYPE_UINT8, (-1, 3), True, True),),
        output=(),
        instance_group=(InstanceGroup(InstanceKind.KIND_GPU, 2, (0, 3)),),
        dynamic_batching=DynamicBatching(preferred_batch_size=(2, 4)),
        parameters={"k": nasty, "b": ""},
    )
    read = parse(config.to_text())
    assert read.backend == "python"
    assert read.input[0].dims == [-1, 3]
    assert read.input[0].allow_ragged_batch
    assert read.input[0].optional
    assert (read.instance_group[0].count, list(read.instance_group[0].gpus)) == (2, [0, 3])
    assert list(read.dynamic_batching.preferred_batch_size) == [2, 4]
    assert {k: v.string_value for k, v in read.parameters.items()} == {"k": nasty, "b": ""}


def test_dynamic_batching_is_on_although_all_of_it_is_default():
    read = parse(model_config(WorkerSettings(), RepositoryOptions(), unet_engine()).to_text())
    assert read.HasField("dynamic_batching")


def test_preferred_batches_are_the_engines_profiles():
    engine = unet_engine(profiles=[profile(1), profile(2, 4)])
    worker = WorkerSettings(backend="tensorrt")
    read = parse(model_config(worker, RepositoryOptions(gpus=(1,)), engine).to_text())
    assert list(read.dynamic_batching.preferred_batch_size) == [1, 2, 3, 4]
    assert read.max_batch_size == 4
    assert read.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(read.instance_group[0].gpus) == [1]
    smaller = parse(model_config(worker, RepositoryOptions(max_batch=2), engine).to_text())
    assert list(smaller.dynamic_batching.preferred_batch_size) == [1, 2]


def test_queue_policy_and_transactions_are_what_was_asked():
    options = RepositoryOptions(
        max_queue=5, queue_delay=0.25, queue_timeout=1.5, decoupled=True, execution_env="e.tar.gz"
    )
    read = parse(model_config(WorkerSettings(), options, unet_engine()).to_text())
    policy = read.dynamic_batching.default_queue_policy
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.max_queue_size == 5
    assert policy.default_timeout_microseconds == 1_500_000
    assert policy.allow_timeout_override
    assert read.dynamic_batching.max_queue_delay_microseconds == 250_000
    assert read.model_transaction_policy.decoupled
    assert [one.name for one in read.output] == ["IMAGE", "IMAGE_PARAMETERS", "STEP", "PREVIEW"]
    assert read.parameters["EXECUTION_ENV_PATH"].string_value == "e.tar.gz"


def test_gpus_of_a_cpu_backend_are_refused():
    with pytest.raises(InvalidRequest):
        model_config(WorkerSettings(), RepositoryOptions(gpus=(0,)), unet_engine())


def test_settings_survive_the_config(tmp_path):
    settings = TritonSettings(
        export="export",
        cache="engines",
        backend="tensorrt",
        threads=3,
        engine_options={"requests": [1, 2]},
        licence_acknowledged=True,
        latency_budget=2.5,
        drain_seconds=7,
    )
    back = TritonSettings.from_parameters(
        settings.to_parameters() | {"FORCE_CPU_ONLY_INPUT_TENSORS": "yes"}, tmp_path
    )
    moved = {"export": str(tmp_path / "export"), "cache": tmp_path / "engines"}
    assert back == settings.model_copy(update=moved)


@pytest.mark.parametrize(
    "parameters", [{"no_such": "1"}, {"threads": "many"}, {"engine_options": "{"}]
)
def test_parameters_that_are_not_ours_or_not_valid_are_refused(parameters, tmp_path):
    with pytest.raises(InvalidRequest):
        TritonSettings.from_parameters(parameters, tmp_path)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A cache with the mini model's engines."""
    cache = tmp_path_factory.mktemp("engines")
    with FastFace.load("mini", cache=cache) as fastface:
        fastface.warm_up()
    return cache


def test_command_writes_a_whole_repository_and_replaces_only_when_told(engines, tmp_path):
    out = tmp_path / "repository"
    arguments = ["export-triton", str(out), "--cache", str(engines)]
    first = CliRunner().invoke(cli, arguments)
    assert first.exit_code == 0, first.output
    read_config(out / "fastface")
    made = json.loads((out / REPOSITORY_FILE).read_text())
    assert sorted(made["engines"]) == sorted(p.stem for p in _modules())
    store = EngineCache(out / "fastface" / "1" / "engines")
    for key in made["engines"].values():
        assert store.verify(key).key == key
    assert not list(out.rglob("model.onnx"))
    assert "${" not in (out / "README.md").read_text()
    (out / "fastface" / "mark").touch()
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 2
    assert "--replace" in again.output
    assert (out / "fastface" / "mark").exists()
    replaced = CliRunner().invoke(cli, [*arguments, "--replace"])
    assert replaced.exit_code == 0, replaced.output
    assert not (out / "fastface" / "mark").exists()


def _modules():
    from fastface_trt.mini.folders import EXPORT

    return [path.parent for path in EXPORT.glob("*/model.onnx")]


def test_a_folder_that_is_not_ours_is_never_replaced(engines, tmp_path):
    (tmp_path / "letters.txt").touch()
    worker = WorkerSettings(cache=engines)
    with pytest.raises(InvalidRequest):
        write_repository(tmp_path, worker, RepositoryOptions(), replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


def test_a_missing_engine_is_an_error_and_leaves_nothing(tmp_path):
    out = tmp_path / "repository"
    with pytest.raises(EngineMismatch, match="text_encoder"):
        write_repository(out, WorkerSettings(cache=tmp_path / "empty"), RepositoryOptions())
    assert not list(tmp_path.glob("*repository*"))


def test_a_full_disk_leaves_nothing(engines, tmp_path, monkeypatch):
    import errno
    import shutil

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(StorageError):
        write_repository(tmp_path / "out", WorkerSettings(cache=engines), RepositoryOptions())
    assert not list(tmp_path.iterdir())
