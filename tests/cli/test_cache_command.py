"""`fastface-trt cache`: what it lists, what it calls damaged, and what it removes."""

import json
import os
import time

import pytest
from click.testing import CliRunner

from fastface_trt.cli.main import USER_ERROR, cli
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.manifest import ENGINE_MANIFEST
from tests.engines.tiny_models import ChunkBuilder, write_module


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def store(tmp_path):
    """A cache of three engines: of this ONNX Runtime's version, of an old one, and by `chunks`."""
    import onnxruntime

    module = write_module(tmp_path / "export")
    store = EngineCache(tmp_path / "cache")
    for backend, version in (
        ("onnxruntime", onnxruntime.__version__),
        ("onnxruntime", "1.0"),
        ("chunks", "1"),
    ):
        builder = ChunkBuilder(backend=backend, backend_version=version)
        builder.backend = backend
        store.get(module, tmp_path / "export", builder)
    return store


def entry(store, backend, version):
    return next(
        e
        for e in store.entries()
        if (e.manifest.backend, e.manifest.backend_version) == (backend, version)
    )


def test_list_shows_every_engine(store):
    result = run("cache", "list", "--cache", store.root)
    assert result.exit_code == 0
    assert result.output.count("affine") == 3
    assert "3 engines" in result.output
    rows = json.loads(run("cache", "list", "--cache", store.root, "--json").stdout)
    assert {row["backend"] for row in rows} == {"onnxruntime", "chunks"}
    assert {row["hardware"] for row in rows} == {"test"}


def test_verify_names_the_damaged_engine(store):
    assert run("cache", "verify", "--cache", store.root).exit_code == 0
    damaged = entry(store, "chunks", "1")
    with open(damaged.folder / "part1", "r+b") as file:
        file.write(b"x")
    result = run("cache", "verify", "--cache", store.root)
    assert result.exit_code == USER_ERROR
    assert "part1 is changed" in result.output
    assert "1 of 3 engines are damaged" in result.output


def test_prune_removes_other_versions_and_damaged_manifests(store):
    old, kept = entry(store, "onnxruntime", "1.0"), entry(store, "chunks", "1")
    broken = next(e for e in store.entries() if e.key not in (old.key, kept.key))
    (broken.folder / ENGINE_MANIFEST).write_text("{}")
    dry = run("cache", "prune", "--cache", store.root, "--dry-run")
    assert "Would free" in dry.output
    assert len(store.entries()) == 3
    result = run("cache", "prune", "--cache", store.root)
    assert "built with 1.0, installed is" in result.output
    assert [e.key for e in store.entries()] == [kept.key]
    assert not (store.root / "quarantine").exists()


def test_prune_removes_what_verify_calls_damaged_and_nothing_else(store):
    damaged, old = entry(store, "chunks", "1"), entry(store, "onnxruntime", "1.0")
    whole = {e.key for e in store.entries()} - {damaged.key, old.key}
    with open(damaged.folder / "part1", "r+b") as file:
        file.write(b"x")
    dry = run("cache", "prune", "--cache", store.root, "--backend", "chunks", "--dry-run")
    assert f"{damaged.key[:12]}  affine: " in dry.output
    assert "part1 is changed" in dry.output
    assert damaged.folder.is_dir()
    assert run("cache", "prune", "--cache", store.root).exit_code == 0
    assert {e.key for e in store.entries()} == whole
    assert run("cache", "verify", "--cache", store.root).exit_code == 0


def test_prune_by_age_and_all(store):
    lately = entry(store, "chunks", "1")
    weeks_ago = time.time() - 30 * 24 * 3600
    os.utime(lately.folder / ENGINE_MANIFEST, (weeks_ago, weeks_ago))
    result = run("cache", "prune", "--cache", store.root, "--older-than", 7, "--backend", "chunks")
    assert "not used for 30 days" in result.output
    assert len(store.entries()) == 2
    assert run("cache", "prune", "--cache", store.root, "--all").exit_code == 0
    assert store.entries() == []


def test_tactics_are_listed_from_the_editable_timing_cache(tmp_path, monkeypatch):
    from fastface_trt.cli import cache as command

    result = run("cache", "tactics", "--cache", tmp_path)
    assert result.exit_code == 0
    assert "--editable-timing-cache" in result.output
    file = tmp_path / "timing" / "tensorrt.editable.cache"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"measured")
    key = f"0x{'a' * 32}"
    monkeypatch.setattr(
        command, "read_tactics", lambda flavour, path: [(key, "0x1f", 0.25)] * (path == file)
    )
    assert f"{key}=0x1f  0.2500 ms" in run("cache", "tactics", "--cache", tmp_path).output
    rows = json.loads(run("cache", "tactics", "--cache", tmp_path, "--json").output)
    assert rows == [{"key": key, "tactic": "0x1f", "ms": 0.25}]
