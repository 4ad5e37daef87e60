"""TensorRT-RTX's runtime cache: kept beside the entry, taken in again, dropped when it is wrong."""

import pytest

from tests.engines.gpu_double import simulated_gpu
from tests.engines.tensorrt.trt_bench import Bench, rows, run


@pytest.fixture
def rtx(tmp_path):
    with simulated_gpu("tensorrt-rtx") as (cuda, trt):
        yield Bench(tmp_path, "tensorrt-rtx", cuda, trt)


def runtime_files(bench):
    return sorted((bench.cache.root / "runtime").glob("*"))


def test_compiled_kernels_are_kept_beside_the_entry_and_taken_in_again(rtx):
    rtx.trt.kernels = b"for this GPU"
    with rtx.open() as engine:
        run(engine, rows())
    (file,) = runtime_files(rtx)
    manifest, folder = rtx.cache.get(rtx.module, rtx.folder / "export", rtx.builder)
    assert file.name.startswith(manifest.key)
    assert file.parent != folder
    assert file.read_bytes()[32:] == b"kernels for this GPU"
    written = file.stat().st_mtime_ns
    with rtx.open() as engine:
        run(engine, rows())
    assert file.stat().st_mtime_ns == written  # nothing new, nothing written
    assert rtx.trt.counts()["IRuntimeCache.deserialize"] == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "refused", "empty"])
def test_a_runtime_cache_that_does_not_fit_is_dropped(rtx, damage):
    rtx.trt.kernels = b"for this GPU"
    with rtx.open() as engine:
        run(engine, rows())
    (file,) = runtime_files(rtx)
    content = file.read_bytes()
    if damage == "refused":
        rtx.trt.kernels = b"for a newer driver"
    else:
        file.write_bytes(
            {"cut": content[:-1], "changed": content[:-1] + b"x", "empty": b""}[damage]
        )
    with rtx.open() as engine:
        assert runtime_files(rtx) == []
        run(engine, rows())
    tried = rtx.trt.counts()["IRuntimeCache.deserialize"]
    assert tried == (1 if damage == "refused" else 0)  # a damaged file never reaches TensorRT
    assert len(runtime_files(rtx)) == 1


def test_a_runtime_cache_that_cannot_be_written_costs_nothing(rtx):
    rtx.trt.kernels = b"for this GPU"
    rtx.cache.root.mkdir(parents=True)
    (rtx.cache.root / "runtime").write_text("in the way")
    with rtx.open() as engine:
        run(engine, rows())
    rtx.builder.device().close()
    assert rtx.cuda.leaks() == []
