"""The ONNX Runtime backend: numbers, quiet fallbacks, and every refusal."""

import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import TensorSpec
from fastface_trt.engines.ort import session as onnxruntime_session
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.engines.ort.session import short_message
from fastface_trt.errors import (
    BackendUnavailable,
    BuildFailed,
    EngineFailed,
    EngineMismatch,
    ExportIncomplete,
    InvalidRequest,
)
from tests.engines.tiny_models import OUT, WIDTH, expected, tree, write_module

quiet = lambda line: None  # noqa: E731


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


def random_input(rows=3, dtype="float32"):
    return np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("optimization", ["all", "extended", "basic"])
def test_round_trip(tmp_path, cache, dtype, external, optimization):
    module = write_module(tmp_path / "export", dtype=dtype, external=external)
    builder = OnnxRuntimeBuilder(threads=1, optimization=optimization)
    manifest, folder = cache.get(module, tmp_path / "export", builder)
    assert manifest.backend == "onnxruntime"
    assert manifest.backend_version == onnxruntime.__version__
    # Weights beside the graph: inside it they would end at 2 GB and could not be mapped.
    assert [file.path for file in manifest.files] == [
        "engine.data",
        "engine.onnx",
        "weights.json",
    ]
    shutil.rmtree(tmp_path / "export")  # the engine needs nothing of the export
    with builder.open(manifest, folder) as engine:
        for rows in (1, 3):
            x = random_input(rows, dtype)
            y = engine(x=x)["y"]
            assert y.dtype == dtype
            np.testing.assert_allclose(
                y, expected(x.astype("float64")), rtol=1e-2 if dtype == "float16" else 1e-5
            )


def test_outputs_belong_to_the_caller_and_threads_may_share_an_engine(tmp_path, cache):
    module = write_module(tmp_path)
    with cache.open(module, tmp_path, OnnxRuntimeBuilder(threads=1)) as engine:
        first = engine(x=random_input())["y"]
        kept = first.copy()
        engine(x=random_input() + 1)
        np.testing.assert_array_equal(first, kept)
        inputs = [random_input() + index for index in range(20)]
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda x: engine(x=x)["y"], inputs))
        for x, y in zip(inputs, outputs, strict=True):
            np.testing.assert_allclose(y, expected(x), rtol=1e-4, atol=1e-4)


def test_a_closed_engine_says_so(tmp_path, cache):
    module = write_module(tmp_path)
    with cache.open(module, tmp_path, OnnxRuntimeBuilder()) as engine:
        pass
    engine.close()
    with pytest.raises(EngineFailed, match="engine of affine is closed"):
        engine(x=random_input())


def test_inputs_are_checked_and_floats_cast(tmp_path, cache):
    module = write_module(tmp_path)
    with cache.open(module, tmp_path, OnnxRuntimeBuilder()) as engine:
        for wrong in ({}, {"z": random_input()}, {"x": random_input(), "z": random_input()}):
            with pytest.raises(InvalidRequest, match="takes x"):
                engine(**wrong)
        with pytest.raises(InvalidRequest, match=r"shape \(3, 15\)"):
            engine(x=random_input()[:, 1:])
        with pytest.raises(InvalidRequest, match=r"shape \(16,\)"):
            engine(x=random_input()[0])
        with pytest.raises(InvalidRequest, match="is complex64, expected float32"):
            engine(x=random_input() + 1j)
        x = np.asfortranarray(random_input().astype("float64"))
        np.testing.assert_allclose(engine(x=x)["y"], expected(x), rtol=1e-4)


def test_a_failing_run_is_an_engine_failure(tmp_path, cache):
    module = write_module(tmp_path)
    with cache.open(module, tmp_path, OnnxRuntimeBuilder()) as engine:
        # The manifest admits what the graph does not.
        loose = TensorSpec(name="x", dtype="float32", shape=("batch", "any"))
        engine.spec = module.model_copy(update={"inputs": (loose,)})
        with pytest.raises(EngineFailed, match="ONNX Runtime failed in affine") as caught:
            engine(x=random_input()[:, 1:])
    assert "[ONNXRuntimeError]" not in caught.value.message
    assert short_message(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : one\n two")) == "one two"


def test_cuda_without_cuda_is_refused_before_anything_is_built(tmp_path, cache):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the CUDA provider")
    module = write_module(tmp_path / "export")
    with pytest.raises(BackendUnavailable, match="has no CUDAExecutionProvider") as caught:
        cache.open(module, tmp_path / "export", OnnxRuntimeBuilder("cuda"))
    assert "onnxruntime-gpu" in caught.value.hint
    assert tree(cache.root) == []


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_onnxruntime_falling_back_to_the_cpu_is_noticed(tmp_path, monkeypatch):
    """The provider is listed, but its libraries do not load: ONNX Runtime goes on, on the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the CUDA provider")
    module = write_module(tmp_path)
    builder = OnnxRuntimeBuilder("cuda")
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    gpu = {"gpu": "NVIDIA H100", "compute_capability": "9.0"}
    monkeypatch.setattr(onnxruntime_session, "cuda_hardware", lambda: gpu)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(BackendUnavailable, match=r"asked for CUDA.* and took CPU") as caught:
        builder.build(module, tmp_path, target, quiet)
    assert "onnxruntime-gpu" in caught.value.hint


def test_onnxruntimes_own_fallback_in_the_middle_of_a_run_is_off(tmp_path, cache):
    engine = cache.open(write_module(tmp_path), tmp_path, OnnxRuntimeBuilder())
    assert engine._session._enable_fallback is False


@pytest.mark.parametrize("field", ["backend", "backend_version", "options", "hardware"])
def test_an_engine_for_something_else_is_not_opened(tmp_path, cache, field):
    builder = OnnxRuntimeBuilder()
    manifest, folder = cache.get(write_module(tmp_path), tmp_path, builder)
    other = {"which": "another"} if field in ("options", "hardware") else "another"
    with pytest.raises(EngineMismatch, match=f"built with {field} .*another"):
        builder.open(manifest.model_copy(update={field: other}), folder)


def test_a_graph_that_does_not_fit_its_manifest_is_not_built(tmp_path, cache):
    module = write_module(tmp_path)
    wrong = TensorSpec(name="z", dtype="float16", shape=("batch", OUT))
    module = module.model_copy(update={"outputs": (wrong,)})
    with pytest.raises(BuildFailed, match=r"its outputs are \{'y': 'float32'\}, expected .*z"):
        cache.get(module, tmp_path, OnnxRuntimeBuilder())
    assert tree(cache.root) == []


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ExportIncomplete, "cannot be read"),
        (b"not a graph" * 100, ExportIncomplete, "is not an ONNX model"),
        # An operator that there is not.
        (b"\x3a\x06\x0a\x04\x22\x02No", BuildFailed, "ONNX Runtime cannot build affine"),
    ],
)
def test_a_file_that_is_no_graph_fails_with_one_sentence(tmp_path, cache, content, error, message):
    module = write_module(tmp_path)
    path = tmp_path / module.files[0].path
    path.write_bytes(content)
    module = module.model_copy(update={"files": (describe_file(tmp_path, path),)})
    with pytest.raises(error, match=message) as caught:
        cache.get(module, tmp_path, OnnxRuntimeBuilder())
    assert "\n" not in str(caught.value)
    assert tree(cache.root) == []


def test_threads_change_no_engine(tmp_path, cache):
    module = write_module(tmp_path)
    assert cache.key(module, OnnxRuntimeBuilder(threads=1)) == cache.key(
        module, OnnxRuntimeBuilder(threads=2)
    )
    assert cache.key(module, OnnxRuntimeBuilder(optimization="basic")) != cache.key(
        module, OnnxRuntimeBuilder()
    )


def limited_build(module, source, target, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        OnnxRuntimeBuilder().build(module, source, target, quiet)
    except BuildFailed:
        sys.exit(7)


LIMITED_BUILD = """
import sys
from pathlib import Path
from tests.engines import tiny_models
from tests.engines.ort import test_engine_onnxruntime as tests
root = Path(sys.argv[1])
module = tiny_models.write_module(root)
(root / "target").mkdir()
tests.limited_build(module, root, root / "target", int(sys.argv[2]))
"""


def test_a_write_that_fails_inside_onnxruntime_is_noticed(tmp_path):
    """Its writer is C++ and buffers; the limit on file sizes stands in for a full disk."""
    command = [sys.executable, "-c", LIMITED_BUILD, str(tmp_path), "1500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr


def test_no_torch(tmp_path):
    code = (
        "import sys, fastface_trt.engines.backends, fastface_trt.engines.cache;"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
