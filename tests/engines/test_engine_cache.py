"""The engine cache: identity by content, verification before use, repair."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import write_text_durably
from fastface_trt.engines.manifest import TensorSpec, read_manifest
from fastface_trt.errors import (
    BuildFailed,
    EngineMismatch,
    ExportIncomplete,
    FastFaceError,
    StorageError,
    UnknownName,
)
from tests.engines.tiny_models import WIDTH, ChunkBuilder, expected, tree, write_module

X = np.arange(2 * WIDTH, dtype="float32").reshape(2, WIDTH)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


@pytest.fixture
def module(tmp_path):
    return write_module(tmp_path / "export", external=True)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "export"


@pytest.fixture
def builder(tmp_path):
    return ChunkBuilder(tmp_path / "log")


def check(cache, module, source, builder):
    """Load, and see that the engine computes what it should: a wrong byte would show."""
    with cache.open(module, source, builder) as engine:
        np.testing.assert_allclose(engine(x=X)["y"], expected(X))


def test_built_once_then_found(cache, module, source, builder):
    lines = []
    manifest, folder = cache.get(module, source, builder, lines.append)
    assert folder == cache.root / manifest.key == cache.root / cache.key(module, builder)
    assert manifest.module == module
    assert [file.path for file in manifest.files] == ["part0", "part1", "part2"]
    assert any("Building affine for chunks" in line for line in lines)
    assert tree(cache.root) == sorted(
        [manifest.key, *(f"{manifest.key}/{n}" for n in ("engine.json", "part0", "part1", "part2"))]
    )
    lines.clear()
    shutil.rmtree(source)  # an engine needs its ONNX files only to be built
    assert cache.get(module, source, builder, lines.append) == (manifest, folder)
    assert builder.builds() == 1
    assert not any("Building" in line for line in lines)
    check(cache, module, source, builder)


def test_an_engine_is_found_without_building_or_verifying(cache, module, source, builder):
    assert cache.find(module, builder) is None
    manifest, folder = cache.get(module, source, builder)
    assert cache.find(module, builder) == manifest
    (folder / "part0").write_bytes(b"damaged")
    assert cache.find(module, builder) == manifest
    (folder / "engine.json").unlink()
    assert cache.find(module, builder) is None
    assert builder.builds() == 1


def test_opening_one_engine_of_many_reads_one_manifest(cache, module, source, builder, monkeypatch):
    manifest, folder = cache.get(module, source, builder)
    for number in range(199):
        other = manifest.model_copy(update={"key": f"{number:064x}"})
        (cache.root / other.key).mkdir()
        (cache.root / other.key / "engine.json").write_text(other.model_dump_json())
    read = []

    def note(path, kind):
        read.append(path)
        return read_manifest(path, kind)

    monkeypatch.setattr("fastface_trt.engines.cache.read_manifest", note)
    assert cache.find(module, builder) == manifest
    check(cache, module, source, builder)
    assert read == [folder / "engine.json"] * 2
    another = ChunkBuilder(backend_version="2")
    assert cache.find(module, another) is None
    assert len(read) == 2 + 1 + 200, "where it is missing, each of the others is read once"
    with pytest.raises(EngineMismatch, match="was built with backend_version 1, here 2"):
        cache.get(module, source, another, build=False)


def test_the_key_follows_the_content_and_not_the_place(tmp_path, cache, module, builder):
    key = cache.key(module, builder)
    assert cache.key(write_module(tmp_path / "elsewhere", external=True), ChunkBuilder()) == key
    assert EngineCache(tmp_path / "other").key(module, builder) == key
    renamed = tuple(
        file.model_copy(update={"path": f"deep/{file.sha256[:4]}"}) for file in module.files
    )
    assert cache.key(module.model_copy(update={"files": renamed}), builder) == key


def different_modules(tmp_path, module):
    tensor = module.inputs[0]
    yield "weights", write_module(tmp_path / "w", external=True, factor=2.5)
    yield "graph", write_module(tmp_path / "g", external=True, extra="changed")
    yield "name", module.model_copy(update={"name": "unet"})
    yield "storage", write_module(tmp_path / "s")
    for change in ({"name": "z"}, {"dtype": "float16"}, {"shape": ("batch", 17)}):
        changed = (tensor.model_copy(update=change),)
        yield f"input {change}", module.model_copy(update={"inputs": changed})
        yield f"output {change}", module.model_copy(update={"outputs": changed})
    more = (*module.outputs, TensorSpec(name="more", dtype="float32", shape=()))
    yield "another output", module.model_copy(update={"outputs": more})


def test_the_key_changes_with_every_ingredient(tmp_path, cache, module, builder):
    keys = {"as it is": cache.key(module, builder)}
    keys |= {what: cache.key(other, builder) for what, other in different_modules(tmp_path, module)}
    for change in (
        {"backend": "another"},
        {"backend_version": "2"},
        {"options": {"files": 4}},
        {"options": {"files": 3, "more": True}},
        {"hardware": {"machine": "other"}},
        {"hardware": {"machine": "test", "isa": "avx512f"}},
    ):
        keys[str(change)] = cache.key(module, ChunkBuilder(**change))
    assert len(set(keys.values())) == len(keys), keys


def test_the_key_changes_with_the_schema(cache, module, builder, monkeypatch):
    before = cache.key(module, builder)
    monkeypatch.setattr("fastface_trt.engines.cache.SCHEMA_VERSION", 2)
    assert cache.key(module, builder) != before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(**change):
    def apply(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return apply


def swap(path):
    other = path.with_name("part2")
    data = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(data)


DAMAGE = {
    "a file is truncated": ("part1", truncate),
    "a file is empty": ("part1", lambda path: path.write_bytes(b"")),
    "one bit is flipped": ("part1", flip),
    "two files are swapped": ("part0", swap),
    "a file is missing": ("part2", os.unlink),
    "the manifest is missing": ("engine.json", os.unlink),
    "the manifest is cut": ("engine.json", lambda path: os.truncate(path, 100)),
    "the manifest is empty": ("engine.json", lambda path: path.write_bytes(b"")),
    "the manifest is of another schema": ("engine.json", edit(schema_version=99)),
    "the manifest is another engine's": ("engine.json", edit(backend_version="2")),
    "the manifest is another key's": ("engine.json", edit(key="0" * 64)),
    "the manifest has an unknown field": ("engine.json", edit(surprise=1)),
    "the folder is empty": ("", lambda path: [file.unlink() for file in path.iterdir()]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_engine_is_set_aside_and_built_again(cache, module, source, builder, damage):
    manifest, folder = cache.get(module, source, builder)
    name, apply = DAMAGE[damage]
    apply(folder / name)
    with pytest.raises(FastFaceError) as caught:
        cache.verify(manifest.key)
    assert caught.value.hint
    assert builder.builds() == 1, "verifying changes nothing"
    lines = []
    again, _ = cache.get(module, source, builder, lines.append)
    assert any("set aside" in line for line in lines)
    assert builder.builds() == 2
    assert again.files == manifest.files
    assert cache.verify(manifest.key) == again
    check(cache, module, source, builder)
    (aside,) = (cache.root / "quarantine").iterdir()
    assert aside.name.startswith(manifest.key)


def test_the_quarantine_keeps_only_the_newest(cache, module, source, builder):
    for turn in range(5):
        _, folder = cache.get(module, source, builder)
        (folder / "part0").write_bytes(bytes([turn]))
    cache.get(module, source, builder)
    kept = sorted((path / "part0").read_bytes()[0] for path in cache.root.glob("quarantine/*"))
    assert kept == [3, 4]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (os.unlink, "is missing"),
        (truncate, "is truncated"),
        (flip, "is changed"),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_a_damaged_export_is_not_built(cache, module, source, builder, damage, message, index):
    damage(source / module.files[index].path)
    with pytest.raises(ExportIncomplete, match=message) as caught:
        cache.get(module, source, builder)
    assert module.files[index].path in caught.value.message
    assert caught.value.hint
    assert builder.builds() == 0
    assert tree(cache.root) == []


def test_the_weights_of_another_export_are_noticed(tmp_path, cache, module, source, builder):
    other = write_module(tmp_path / "other", external=True, factor=3.0)
    path = module.files[1].path
    assert module.files[1].bytes == other.files[1].bytes
    shutil.copy(tmp_path / "other" / path, source / path)
    with pytest.raises(ExportIncomplete, match=r"model\.data is changed"):
        cache.get(module, source, builder)
    assert tree(cache.root) == []


@pytest.mark.parametrize("error", [ValueError("bug"), BuildFailed("refused"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing_and_blocks_nobody(cache, module, source, builder, error):
    class Failing(ChunkBuilder):
        def write(self, file, part):
            if file.name.endswith("part1"):
                raise error
            super().write(file, part)

    with pytest.raises(type(error)):
        cache.get(module, source, Failing())
    assert tree(cache.root) == []
    check(cache, module, source, builder)


def test_a_builder_that_writes_nothing_has_failed(cache, module, source):
    with pytest.raises(BuildFailed, match="wrote nothing"):
        cache.get(module, source, ChunkBuilder(files=0))
    assert tree(cache.root) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_while_building(cache, module, source, builder, code):
    class Full(ChunkBuilder):
        def write(self, file, part):
            if file.name.endswith("part2"):
                file.write(part[:10])
                raise OSError(code, os.strerror(code))
            super().write(file, part)

    with pytest.raises(StorageError, match=os.strerror(code) if code == errno.EROFS else "full"):
        cache.get(module, source, Full())
    assert tree(cache.root) == []
    check(cache, module, source, builder)


def test_a_full_disk_at_the_manifest(cache, module, source, builder, monkeypatch):
    def fail(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastface_trt.engines.files.write_text_durably", fail)
    with pytest.raises(StorageError, match="full") as caught:
        cache.get(module, source, builder)
    assert "free" in caught.value.hint
    assert tree(cache.root) == []
    monkeypatch.setattr("fastface_trt.engines.files.write_text_durably", write_text_durably)
    check(cache, module, source, builder)


def test_a_cache_that_cannot_be_made(tmp_path, module, source, builder):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        EngineCache(tmp_path / "file" / "cache").get(module, source, builder)
    assert caught.value.hint


def test_finished_engines_serve_from_a_disk_that_cannot_be_written(
    cache, module, source, builder, monkeypatch
):
    cache.get(module, source, builder)
    shutil.rmtree(cache.root / "locks")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "rename", "replace", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    check(cache, module, source, builder)


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_entries_and_remove(tmp_path, cache, module, source, builder):
    assert cache.entries() == []
    first, folder = cache.get(module, source, builder)
    other = write_module(source, name="other")
    second, _ = cache.get(other, source, builder)
    assert [entry.key for entry in cache.entries()] == sorted([first.key, second.key])
    (entry,) = (entry for entry in cache.entries() if entry.key == first.key)
    size = folder_bytes(folder)
    assert (entry.manifest, entry.folder, entry.bytes, entry.problem) == (first, folder, size, "")

    (folder / "engine.json").write_text("{")
    (entry,) = (entry for entry in cache.entries() if entry.key == first.key)
    assert entry.manifest is None
    assert "not a manifest" in entry.problem

    assert cache.remove(first.key) == size - len(first.model_dump_json(indent=2)) - 1 + 1
    assert [entry.key for entry in cache.entries()] == [second.key]
    assert list((cache.root / "quarantine").iterdir()) == []
    for method in (cache.remove, cache.verify):
        for key in (first.key, "../..", ""):
            with pytest.raises(UnknownName, match="Unknown engine"):
                method(key)


def test_verify_names_the_damage(cache, module, source, builder):
    manifest, folder = cache.get(module, source, builder)
    truncate(folder / "part1")
    with pytest.raises(EngineMismatch, match="part1 is truncated"):
        cache.verify(manifest.key)


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFACE_CACHE", str(tmp_path / "mine"))
    assert EngineCache().root == tmp_path / "mine" / "engines"
    monkeypatch.setenv("FASTFACE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert EngineCache().root.is_relative_to(tmp_path / "xdg")
    assert not (tmp_path / "xdg").exists(), "making a cache object writes nothing"
