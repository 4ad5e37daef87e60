"""Every build option reaches TensorRT's own configuration, seen on the real binding."""

import pytest
from tiny_models import write_module

from fastface_trt.engines.onnx_file import OnnxFile
from fastface_trt.engines.tensorrt import plan
from fastface_trt.engines.tensorrt.flavour import FLAVOURS
from fastface_trt.engines.tensorrt.network import MessageLog, parse
from fastface_trt.engines.tensorrt.options import TensorRTOptions

trt = pytest.importorskip("tensorrt_rtx")
RTX = FLAVOURS["tensorrt-rtx"]


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


def test_one_profile_per_shape(configured):
    assert configured().num_optimization_profiles == 1
