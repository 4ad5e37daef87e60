"""Every build option reaches TensorRT's own configuration, seen on the real binding."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.onnx.file import OnnxFile
from fastface_trt.engines.tensorrt import plan
from fastface_trt.engines.tensorrt.flavour import FLAVOURS
from fastface_trt.engines.tensorrt.network import MessageLog, parse
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.errors import BuildFailed, InvalidRequest
from tests.engines.tiny_models import write_module

trt = pytest.importorskip("tensorrt_rtx")
RTX = FLAVOURS["tensorrt-rtx"]
# TensorRT-RTX's values of a timing cache stand in for TensorRT's, and say that they are no-ops.
pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated")


@pytest.fixture
def configured(tmp_path):
    """The configuration that options make for a small module."""
    module = write_module(tmp_path)

    def run(**options):
        log = MessageLog(trt)
        builder = trt.Builder(log.logger)
        with OnnxFile(tmp_path / module.files[0].path) as onnx:
            network, parser = parse(RTX, trt, builder, log, module, onnx)
            chosen = TensorRTOptions(**options)
            config = plan._configure(RTX, trt, builder, network, chosen, module, log)
            del parser
        return config

    return run


FLAGS = {
    "weight_streaming": trt.BuilderFlag.WEIGHT_STREAMING,
    "refittable": trt.BuilderFlag.REFIT,
    "strip_weights": trt.BuilderFlag.STRIP_PLAN,
    "tf32": trt.BuilderFlag.TF32,
    "editable_timing_cache": trt.BuilderFlag.EDITABLE_TIMING_CACHE,
}


@pytest.mark.parametrize("option", FLAGS)
def test_each_flag_is_off_until_it_is_asked_for(configured, option):
    assert not configured().get_flag(FLAGS[option])
    flagged = configured(**{option: True})
    assert [name for name, flag in FLAGS.items() if flagged.get_flag(flag)] == [option]


def test_levels_memory_and_targets(configured):
    config = configured(
        optimization_level=2, tiling="moderate", workspace_gb=1.5, targets=("sm89", "sm120")
    )
    assert config.builder_optimization_level == 2
    assert config.tiling_optimization_level == trt.TilingOptimizationLevel.MODERATE
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1.5 * 2**30
    assert [config.get_compute_capability(index) for index in range(2)] == [
        trt.ComputeCapability.SM89,
        trt.ComputeCapability.SM120,
    ]
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


def test_tactics_streams_and_cache_for_tiling(configured):
    plain = configured()
    config = configured(max_tactics=7, max_aux_streams=0, tiling="fast", l2_limit_mb=1.5)
    assert (plain.max_num_tactics, config.max_num_tactics) == (-1, 7)
    assert (plain.max_aux_streams, config.max_aux_streams) == (-1, 0)
    assert (plain.l2_limit_for_tiling, config.l2_limit_for_tiling) == (0, 1.5 * 2**20)


def test_a_build_route_that_is_not_taken_is_an_error(configured):
    with pytest.raises(BuildFailed, match="does not take the build route '-a=b'"):
        configured(build_route="-a=b")  # TensorRT-RTX has none


def test_same_compute_capability_and_build_route_reach_the_configuration():
    """What TensorRT alone has: a configuration that takes it, with the names of the real one."""

    class Config:
        def __getattr__(self, name):
            getattr(trt.IBuilderConfig, name)
            return lambda *arguments: 0

    config = Config()
    builder = SimpleNamespace(create_builder_config=lambda: config)
    options = TensorRTOptions(same_compute_capability=True, build_route="-a=b -c=d")
    module = ModuleSpec.model_construct(name="m", inputs=(), outputs=(), files=())
    builder.create_optimization_profile = SimpleNamespace
    plan._configure(FLAVOURS["tensorrt"], trt, builder, None, options, module, None)
    level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert config.hardware_compatibility_level == level
    assert config.build_route == "-a=b -c=d"


KEY = f"0x{'a' * 32}"


class EditableCache:
    """A timing cache that measured one key; unknown ones answer as the real one does."""

    def __init__(self):
        self.entries = {KEY: trt.TimingCacheValue(3, 0.25)}

    def queryKeys(self):
        return [trt.TimingCacheKey.parse(key) for key in self.entries]

    def query(self, key):
        return self.entries.get(str(key), trt.TimingCacheValue(2**64 - 1, -1.0))

    def update(self, key, value):
        self.entries[str(key)] = value
        return True


def test_a_fixed_tactic_keeps_its_keys_time():
    cache = EditableCache()
    options = TensorRTOptions(tactics=(f"{KEY}=0x1f",))
    plan._fix_tactics(trt, cache, options, MessageLog(trt))
    assert (cache.entries[KEY].tacticHash, cache.entries[KEY].timingMSec) == (0x1F, 0.25)


def test_a_tactic_for_a_key_that_was_never_measured_is_an_error():
    cache = EditableCache()
    options = TensorRTOptions(tactics=(f"0x{'b' * 32}=0x1f",))
    with pytest.raises(BuildFailed, match="does not take the tactic 0x1f") as caught:
        plan._fix_tactics(trt, cache, options, MessageLog(trt))
    assert "--editable-timing-cache" in caught.value.hint
    assert list(cache.entries) == [KEY]
    with pytest.raises(BuildFailed, match="this build has none"):
        plan._fix_tactics(trt, None, options, MessageLog(trt))


def test_editable_measurements_lie_in_a_file_of_their_own(tmp_path):
    file = tmp_path / "tensorrt.cache"
    assert plan.measurements(file, TensorRTOptions()) == file
    for options in ({"editable_timing_cache": True}, {"tactics": (f"{KEY}=0x1",)}):
        chosen = plan.measurements(file, TensorRTOptions(**options))
        assert chosen == tmp_path / "tensorrt.editable.cache"


def test_measurements_are_listed_by_key(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "_load_timing_cache", lambda *arguments: EditableCache())
    flavour = replace(FLAVOURS["tensorrt"], module_name="tensorrt_rtx", oldest=(1, 0))
    assert plan.read_tactics(flavour, tmp_path / "x") == [(KEY, "0x3", 0.25)]
    with pytest.raises(InvalidRequest, match="a timing cache"):
        plan.read_tactics(RTX, tmp_path / "x")


def test_errors_of_a_builder_and_a_runtime_are_recorded_and_not_printed(capfd):
    log = MessageLog(trt)
    builder = log.attach(trt.Builder(log.logger))
    builder.create_builder_config().max_num_tactics = -2
    assert "setMaxNbTactics" in log.reason()
    runtime_log = MessageLog(trt)
    runtime = runtime_log.attach(trt.Runtime(runtime_log.logger))
    assert runtime.deserialize_cuda_engine(b"no plan" * 20) is None
    assert "deserializeCudaEngine" in runtime_log.reason()
    recorder = runtime_log.recorder
    assert recorder.num_errors() >= 1
    assert recorder.get_error_desc(0).startswith("IRuntime::deserializeCudaEngine")
    assert not recorder.has_overflowed()
    recorder.clear()
    assert recorder.num_errors() == 0
    assert capfd.readouterr() == ("", "")


def test_one_profile_per_shape(configured):
    assert configured().num_optimization_profiles == 1
