"""The plugins inside TensorRT's own plugin framework, without TensorRT's library."""

import re
import sys

import pytest

from fastface_trt.engines.kernels.compile import OUTPUT_KERNEL, STATISTICS_KERNEL
from fastface_trt.engines.tensorrt.flavour import find_flavour
from fastface_trt.engines.tensorrt.plugin import (
    OUTPUT_PLUGIN,
    STATISTICS_PLUGIN,
    register_plugins,
    require_kernel_tokens,
)
from fastface_trt.errors import BackendUnavailable, BuildFailed, InvalidRequest
from tests.engines.tensorrt import plugin_framework

# The sources have docstrings with stray backslashes.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")

SIZES = {"rows": 6, "heads": 10, "positions": 1025, "size": 64, "requests": 2}


def test_other_numbers_of_image_tokens_are_refused():
    from fastface_trt.engines.manifest import ModuleSpec, TensorSpec

    def unet(tokens):
        image = TensorSpec(name="image_tokens", dtype="float16", shape=("batch", tokens, 2048))
        return ModuleSpec.model_construct(name="unet", inputs=(image,), outputs=(), files=())

    require_kernel_tokens(unet(4))
    with pytest.raises(BuildFailed, match="takes 52"):
        require_kernel_tokens(unet(52))


@pytest.fixture
def binding(monkeypatch):
    if plugin_framework.sources() is None:
        pytest.skip("tensorrt-cu13-bindings is neither installed nor named by TENSORRT_BINDINGS")
    real = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return plugin_framework.tensorrt(monkeypatch, real)


def test_tensorrt_rtx_has_no_plugins():
    with pytest.raises(InvalidRequest, match="TensorRT-RTX does not offer plugins"):
        register_plugins(find_flavour("tensorrt-rtx"), "sm_89")


def test_a_tensorrt_without_ahead_of_time_plugins_is_named(monkeypatch, binding):
    monkeypatch.delattr(sys.modules["tensorrt.plugin"], "KernelLaunchParams")
    with pytest.raises(BackendUnavailable, match="cannot put a kernel into an engine"):
        register_plugins(find_flavour("tensorrt"), "sm_90")


def test_without_the_plugin_module(monkeypatch, binding):
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    with pytest.raises(BackendUnavailable, match="Update TensorRT"):
        register_plugins(find_flavour("tensorrt"), "sm_90")


def instance(binding, name, inputs, head_size_known=True):
    """A plugin as TensorRT makes and asks it: output types, output shapes, launch, kernel."""
    creator = binding.get_plugin_registry().get_creator(name, "1", "fastface")
    strict = binding.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, "fastface", [], binding.TensorRTPhase.BUILD, strict)
    plugin.set_tactic(0)
    types = plugin.get_output_data_types([t for _, t in inputs], [len(dims) for dims, _ in inputs])
    builder = plugin_framework.Expressions(binding.DimensionOperation)
    dims = [[plugin_framework.Expression(n, constant=False) for n in one] for one, _ in inputs]
    if head_size_known:
        dims[0][-1].constant = True
    shapes = [
        tuple(n.value for n in shape) for shape in plugin.get_output_shapes(dims, [], builder)
    ]
    descriptions = [
        plugin_framework.SimpleDesc(binding, dims, dtype)
        for dims, dtype in [*inputs, *zip(shapes, types, strict=True)]
    ]
    plugin.get_supported_format_combinations(descriptions, len(inputs))
    launch, scalars = plugin_framework.LaunchParameters(), plugin_framework.Scalars()
    plugin.get_launch_params(dims, descriptions, len(inputs), launch, scalars, builder)
    kernel, ptx = plugin.get_kernel(
        [d.desc for d in descriptions[: len(inputs)]], [d.desc for d in descriptions[len(inputs) :]]
    )
    grid = (launch.grid_x, launch.grid_y, launch.grid_z)
    block = (launch.block_x, launch.block_y, launch.block_z)
    assert launch.shared_mem == 0
    outputs = list(zip(shapes, types, strict=True))
    return outputs, kernel, ptx.decode(), grid, block, scalars.values_in_order()


def inputs_of(binding, dtype):
    b, h, n, d, r = SIZES.values()
    single = binding.DataType.FLOAT
    return {
        "q": ((b, h, n, d), dtype),
        "k": ((b, h, 4, d), dtype),
        "v": ((b, h, 4, d), dtype),
        "manipulation": ((r, 8), single),
        "ip_scale": ((r,), single),
        "maps": ((b, h, n, 4), single),
        "statistics": ((b, h, 3, 4), single),
    }


@pytest.mark.parametrize("dtype", ["HALF", "FLOAT"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_120"])
def test_two_plugins_launch_as_the_kernels_are_launched(binding, dtype, architecture):
    register_plugins(find_flavour("tensorrt"), architecture)
    dtype = getattr(binding.DataType, dtype)
    given = inputs_of(binding, dtype)
    counts = [SIZES[name] for name in ("requests", "rows", "heads", "positions")]

    first = instance(binding, STATISTICS_PLUGIN, [given[n] for n in ("q", "k", "manipulation")])
    outputs, kernel, ptx, grid, block, scalars = first
    assert outputs == [given["maps"], given["statistics"]]
    assert (kernel, grid, block) == (STATISTICS_KERNEL, (60, 1, 1), (512, 1, 1))
    assert scalars == counts
    assert re.search(rf"\.target {architecture}\b", ptx)
    # Pointers of the inputs, the scalars, pointers of the outputs: what TensorRT passes.
    assert parameters(ptx, kernel) == ["u64"] * 3 + ["u32"] * 4 + ["u64"] * 2

    outputs, kernel, ptx, grid, block, scalars = instance(
        binding, OUTPUT_PLUGIN, list(given.values())
    )
    assert outputs == [given["q"]]
    assert (kernel, grid, block) == (OUTPUT_KERNEL, (3, 60, 1), (256, 1, 1))
    assert scalars == counts
    assert parameters(ptx, kernel) == ["u64"] * 7 + ["u32"] * 4 + ["u64"]


def parameters(ptx, kernel):
    declared = re.search(rf"\.entry {kernel}\((.*?)\)", ptx, re.S).group(1)
    return re.findall(r"\.param \.(\w+)", declared)


def test_registering_again_changes_the_architecture(binding):
    for architecture in ("sm_80", "sm_90"):
        register_plugins(find_flavour("tensorrt"), architecture)
    given = inputs_of(binding, binding.DataType.HALF)
    ptx = instance(binding, STATISTICS_PLUGIN, [given[n] for n in ("q", "k", "manipulation")])[2]
    assert ".target sm_90" in ptx


def test_what_the_kernel_has_no_variant_for_is_refused(binding):
    register_plugins(find_flavour("tensorrt"), "sm_90")
    given = inputs_of(binding, binding.DataType.BF16)
    with pytest.raises(InvalidRequest, match="no variant for"):
        instance(binding, OUTPUT_PLUGIN, list(given.values()))
    given = inputs_of(binding, binding.DataType.HALF)
    with pytest.raises(InvalidRequest, match="not known at build time"):
        instance(binding, OUTPUT_PLUGIN, list(given.values()), head_size_known=False)
