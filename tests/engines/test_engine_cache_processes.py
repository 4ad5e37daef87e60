"""The engine cache among processes: built once, and killed at any moment without harm."""

import multiprocessing
import random
import time
from threading import Thread

import numpy as np
import pytest

from fastface_trt.engines.cache import EngineCache
from tests.engines.tiny_models import WIDTH, ChunkBuilder, expected, tree, write_module

fork = multiprocessing.get_context("fork")
X = np.arange(2 * WIDTH, dtype="float32").reshape(2, WIDTH)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def load(root, module, source, builder, queue=None, start=None):
    lines = []
    if start is not None:
        start.wait()
    with EngineCache(root).open(module, source, builder, lines.append) as engine:
        right = np.array_equal(engine(x=X)["y"], expected(X))
    if queue is not None:
        queue.put((right, lines))


def test_processes_at_once_build_once(tmp_path):
    source = tmp_path / "export"
    module = write_module(source)
    builder = ChunkBuilder(tmp_path / "log", pause=0.05)  # 12 chunks, 0.6 s
    queue = fork.Queue()
    start = fork.Barrier(4)
    processes = [
        fork.Process(target=load, args=(tmp_path / "cache", module, source, builder, queue, start))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert builder.builds() == 1
    assert all(right for right, _ in results)
    waited = [any("Waiting for another process" in line for line in lines) for _, lines in results]
    assert any(waited)


def test_threads_at_once_build_once(tmp_path):
    module = write_module(tmp_path / "export")
    cache = EngineCache(tmp_path / "cache")
    builder = ChunkBuilder(tmp_path / "log", pause=0.02)
    threads = [
        Thread(target=cache.get, args=(module, tmp_path / "export", builder)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert builder.builds() == 1


def test_different_engines_do_not_wait_for_each_other(tmp_path):
    source = tmp_path / "export"
    slow, fast = write_module(source, name="slow"), write_module(source, name="fast")
    cache = EngineCache(tmp_path / "cache")
    builder = ChunkBuilder(tmp_path / "log", pause=30)
    process = fork.Process(target=load, args=(cache.root, slow, source, builder))
    process.start()
    try:
        deadline = time.monotonic() + 20
        while not builder.builds() and time.monotonic() < deadline:
            time.sleep(0.01)
        cache.get(fast, source, ChunkBuilder())
        (draft,) = cache.root.glob(".*.partial-*")
        assert draft.is_dir(), "the build of another engine is not swept away"
    finally:
        process.kill()
        process.join()
    assert list(cache.root.glob(".*.partial-*"))
    cache.get(write_module(source, name="third"), source, ChunkBuilder())
    assert not list(cache.root.glob(".*")), "what a killed build left goes with the next build"
    lines = []
    cache.get(slow, source, ChunkBuilder(), lines.append)
    assert not any("Waiting" in line for line in lines), "a killed process holds no lock"


def phase(root, key):
    """How far the killed build had come, by what it left."""
    if (root / key / "engine.json").exists():
        return "finished"
    (draft,) = list(root.glob(".*.partial-*")) or (None,)
    if draft is None:
        return "not begun"
    if (draft / "engine.json").exists():
        return "before the rename"
    return f"writing {sorted(path.name for path in draft.iterdir())[-1:]}"


def test_killed_fifty_times_at_random_moments(tmp_path):
    source = tmp_path / "export"
    module = write_module(source)
    cache = EngineCache(tmp_path / "cache")
    builder = ChunkBuilder(tmp_path / "log", files=4, chunks=3, pause=0.002)
    key = cache.key(module, builder)
    began = time.monotonic()
    cache.get(module, source, builder)
    usual = time.monotonic() - began
    cache.remove(key)
    chance = random.Random(0)
    phases = {}
    for turn in range(50):
        process = fork.Process(target=load, args=(cache.root, module, source, builder))
        process.start()
        time.sleep(chance.uniform(0, 1.5 * usual))
        process.kill()
        process.join()
        left = phase(cache.root, key)
        phases[left] = phases.get(left, 0) + 1

        before = builder.builds()
        with cache.open(module, source, builder) as engine:
            np.testing.assert_array_equal(engine(x=X)["y"], expected(X), err_msg=f"{turn}: {left}")
        assert builder.builds() - before == (left != "finished"), left
        assert not list(cache.root.glob("quarantine/*")), "what a kill leaves is never an entry"
        assert not list(cache.root.glob(".*")), "what a kill leaves is swept"
        cache.remove(key)
    assert tree(cache.root) == ["quarantine"]
    assert sum(name.startswith("writing") for name in phases) >= 3, phases


def test_a_kill_while_a_damaged_engine_is_replaced(tmp_path):
    source = tmp_path / "export"
    module = write_module(source)
    cache = EngineCache(tmp_path / "cache")
    builder = ChunkBuilder(tmp_path / "log", pause=0.002)
    chance = random.Random(1)
    for _ in range(10):
        _, folder = cache.get(module, source, builder)
        (folder / "part1").write_bytes(b"damaged")
        process = fork.Process(target=load, args=(cache.root, module, source, builder))
        process.start()
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        load(cache.root, module, source, builder)
        with cache.open(module, source, builder) as engine:
            np.testing.assert_array_equal(engine(x=X)["y"], expected(X))
