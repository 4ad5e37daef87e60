"""Publishing and obtaining: what arrives is what was sent, or nothing arrives."""

import hashlib
import json
import os
import shutil
import socket
import uuid
from pathlib import Path

import pytest

pytest.importorskip("fsspec")
import fsspec

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import EngineBuilder
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    ExportManifest,
    read_manifest,
)
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.errors import (
    EngineMismatch,
    ExportIncomplete,
    FastFaceError,
    InvalidRequest,
    ManifestError,
    MissingDependency,
    StorageError,
)
from fastface_trt.mini import folders
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.storage.distribution import (
    engines_of,
    obtain,
    obtain_engines,
    publish,
    resolve,
    with_obtained,
)
from fastface_trt.serving.storage.release import (
    ManifestEntry,
    Release,
    parse_address,
    sha256_of,
    to_json,
)
from tests.serving.small_export import write_small_export


@pytest.fixture(params=["directory", "memory"])
def url(request, tmp_path):
    if request.param == "directory":
        return str(tmp_path / "storage")
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def export(tmp_path):
    return write_small_export(tmp_path / "export")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def objects(url):
    """Path in its file system → bytes, of every object in a storage."""
    fs, root = fsspec.url_to_fs(url)
    return fs, {path: fs.cat_file(path) for path in fs.find(f"{root}/objects")}


def the_object(url, content):
    fs, found = objects(url)
    return fs, next(path for path, bytes_ in found.items() if bytes_ == content)


def test_an_obtained_export_is_the_published_one(url, export, tmp_path):
    address = publish(export, url, tag="production")
    for name in (str(address), f"{url}#production"):
        obtained = obtain(name, home=tmp_path / "home")
        assert obtained.address == address
        assert contents(obtained.folder) == contents(export)
        assert obtained.manifest == read_manifest(export / EXPORT_MANIFEST, ExportManifest)


def test_the_release_and_every_object_are_called_by_their_hash(url, export):
    address = publish(export, url)
    fs, found = objects(url)
    assert found
    for path, content in found.items():
        assert Path(path).name == hashlib.sha256(content).hexdigest()
    root = fsspec.url_to_fs(url)[1]
    release = fs.cat_file(f"{root}/releases/{address.reference}.json")
    assert hashlib.sha256(release).hexdigest() == address.reference


def test_a_tag_moves_and_a_hash_does_not(url, export, tmp_path):
    first = publish(export, url, tag="production")
    other = write_small_export(tmp_path / "other", seed=1)
    second = publish(other, url, tag="production")
    assert first != second
    assert resolve(f"{url}#production") == second
    obtained = obtain(str(first), home=tmp_path / "home")
    assert contents(obtained.folder) == contents(export)
    assert contents(obtain(f"{url}#production", home=tmp_path / "home").folder) == contents(other)


def test_what_two_exports_share_is_sent_and_fetched_once(url, export, tmp_path):
    publish(export, url)
    other = write_small_export(tmp_path / "other", seed=1, shared=export)
    said = []
    address = publish(other, url, progress=said.append)
    assert [line.split()[1].rpartition("/")[2] for line in said] == ["model.onnx"]
    obtain(str(address), home=tmp_path / "home")


def test_a_pinned_release_that_is_here_needs_no_storage(export, tmp_path):
    storage = tmp_path / "storage"
    address = publish(export, str(storage))
    obtain(str(address), home=tmp_path / "home")
    shutil.rmtree(storage)
    again = obtain(str(address), home=tmp_path / "home")
    assert contents(again.folder) == contents(export)


def test_damage_on_this_machine_is_repaired(url, export, tmp_path):
    address = publish(export, url)
    folder = obtain(str(address), home=tmp_path / "home").folder
    with open(folder / "unet" / "model.onnx", "r+b") as file:
        file.write(b"!")  # through the hard link this is the local object too
    assert contents(folder) != contents(export)
    assert contents(obtain(str(address), home=tmp_path / "home").folder) == contents(export)


DAMAGES = {
    "missing": lambda fs, path, content: fs.rm(path),
    "truncated": lambda fs, path, content: fs.pipe_file(path, content[:-1]),
    "grown": lambda fs, path, content: fs.pipe_file(path, content + b"!"),
    "changed": lambda fs, path, content: fs.pipe_file(path, b"!" + content[1:]),
    "empty": lambda fs, path, content: fs.pipe_file(path, b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("victim", ["unet/model.onnx", EXPORT_MANIFEST])
def test_a_damaged_object_is_named_and_nothing_of_it_kept(url, export, tmp_path, damage, victim):
    address = publish(export, url)
    content = (export / victim).read_bytes()
    fs, path = the_object(url, content)
    DAMAGES[damage](fs, path, content)
    home = tmp_path / "home"
    with pytest.raises(ExportIncomplete):
        obtain(str(address), home=home)
    assert not list(home.glob("exports/*/*"))
    for left in (*home.glob("objects/*"), *home.glob("documents/*")):
        assert left.stem == hashlib.sha256(left.read_bytes()).hexdigest()
    publish(export, url, overwrite=True)
    assert contents(obtain(str(address), home=home).folder) == contents(export)


def test_a_part_of_an_earlier_process_is_gone_on_with(export, tmp_path, monkeypatch):
    from fastface_trt.serving.storage.objects import Storage

    address = publish(export, str(tmp_path / "storage"))
    content = (export / "unet" / "model.onnx").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    starts = []
    stream = Storage.stream

    def watched(self, name, start=0):
        if name.endswith(sha256):
            starts.append(start)
        return stream(self, name, start)

    monkeypatch.setattr(Storage, "stream", watched)
    for number, part in enumerate((content[:1000], b"?" * 1000, content, content + b"!!")):
        home = tmp_path / f"home{number}"
        (home / "objects").mkdir(parents=True)
        (home / "objects" / f"{sha256}.part").write_bytes(part)
        assert contents(obtain(str(address), home=home).folder) == contents(export)
    # A good beginning is gone on with, a bad one found out at the end; all of it needs nothing.
    assert starts == [1000, 1000, 0, 0]


def test_an_object_without_end_is_not_read_to_its_end(export, tmp_path, monkeypatch):
    from fastface_trt.serving.storage.objects import BLOCK, Storage

    address = publish(export, str(tmp_path / "storage"))
    obtain(str(address), home=tmp_path / "documents")
    stream, given = Storage.stream, []

    def endless(self, name, start=0):
        if "objects" not in name or name.endswith(manifest_hash):
            yield from stream(self, name, start)
        while len(given) < 100:
            given.append(name)
            yield b"?" * BLOCK

    manifest_hash = hashlib.sha256((export / EXPORT_MANIFEST).read_bytes()).hexdigest()
    monkeypatch.setattr(Storage, "stream", endless)
    shutil.copytree(tmp_path / "documents" / "documents", tmp_path / "home" / "documents")
    with pytest.raises(ExportIncomplete, match="larger"):
        obtain(str(address), home=tmp_path / "home")
    assert len(given) <= 4, "the first file has three megabytes"
    given.clear()
    with pytest.raises(ExportIncomplete, match="larger"):
        obtain(str(address), home=tmp_path / "empty")
    assert len(given) <= 2


def hostile(export, url, change):
    """The pinned address of a release of `export` whose manifest `change` was applied to."""
    address = publish(export, url)
    fs, root = fsspec.url_to_fs(url)
    manifest = json.loads((export / EXPORT_MANIFEST).read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    entry = ManifestEntry(bytes=len(content), sha256=sha256_of(content))
    fs.makedirs(f"{root}/objects/{entry.sha256[:2]}", exist_ok=True)
    fs.pipe_file(f"{root}/objects/{entry.sha256[:2]}/{entry.sha256}", content)
    release = to_json(Release(export=entry))
    fs.pipe_file(f"{root}/releases/{sha256_of(release)}.json", release)
    return f"{address.url}#{sha256_of(release)}"


def renamed(name):
    def change(manifest):
        manifest["extra_files"][0]["path"] = name

    return change


@pytest.mark.parametrize(
    "name",
    ["../outside", "/outside", "a/../../outside", "a\\..\\outside", ".", "a//b", "./a", "",
     "manifest.json", "manifest.json/a", "unet/model.onnx", "unet/model.onnx/below", "nul\0"],
)  # fmt: skip
def test_file_names_that_leave_or_meet_are_refused(url, export, tmp_path, name):
    address = hostile(export, url, renamed(name))
    with pytest.raises(ManifestError):
        obtain(address, home=tmp_path / "home")
    assert not (tmp_path / "outside").exists()
    assert not list((tmp_path / "home").glob("exports/*/*"))


def test_a_release_of_another_version_is_refused(url, export, tmp_path):
    address = hostile(export, url, lambda manifest: manifest.update(surprise=1))
    with pytest.raises(ManifestError, match="surprise"):
        obtain(address, home=tmp_path / "home")


@pytest.mark.parametrize("tag", ["", "../up", "a/b", "-x", "a" * 64, "0" * 101, "x y"])
def test_bad_tags(export, url, tag):
    with pytest.raises(InvalidRequest):
        publish(export, url, tag=tag)
    if tag != "a" * 64:  # which is a hash
        with pytest.raises(InvalidRequest):
            obtain(f"{url}#{tag}")
    fs, root = fsspec.url_to_fs(url)
    assert not fs.exists(root)


def test_what_cannot_be_obtained_says_why(export, url, tmp_path):
    publish(export, url, tag="production")
    home = tmp_path / "home"
    with pytest.raises(ExportIncomplete, match="tags/staging"):
        obtain(f"{url}#staging", home=home)
    with pytest.raises(ExportIncomplete, match="releases/0000"):
        obtain(f"{url}#{'0' * 64}", home=home)
    with pytest.raises(InvalidRequest, match="names no release"):
        parse_address(url)
    with pytest.raises(InvalidRequest, match="no storage"):
        obtain(f"nonsense://x#{'0' * 64}", home=home)
    with pytest.raises(MissingDependency, match="cannot be opened"):
        obtain(f"git://x#{'0' * 64}", home=home)
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/tags/production", b"../../etc/passwd")
    with pytest.raises(ManifestError, match="not a hash"):
        obtain(f"{url}#production", home=home)


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def unix_socket(path):
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    os.rename("socket", path)


@pytest.mark.parametrize("strange", [fifo, device, folder, unix_socket])
@pytest.mark.parametrize("kind", ["tags", "releases", "objects"])
def test_what_is_no_file_in_a_directory_is_not_waited_for(
    export, tmp_path, monkeypatch, strange, kind
):
    monkeypatch.chdir(tmp_path)
    address = publish(export, str(tmp_path / "storage"), tag="production")
    found = [path for path in (tmp_path / "storage" / kind).rglob("*") if path.is_file()]
    assert found
    for path in found:
        path.unlink()
        strange(path)
    tag = f"{address.url}#production"
    with pytest.raises(StorageError, match="cannot be read"):
        obtain(tag if kind == "tags" else str(address), home=tmp_path / "home")
    assert not list((tmp_path / "home").glob("exports/*/*"))


def test_a_storage_that_fails_is_told_in_one_sentence(export, tmp_path, monkeypatch):
    url = f"memory://{uuid.uuid4().hex}"
    address = publish(export, url)

    def broken(*args, **kwargs):
        raise RuntimeError("the bucket is on fire")

    monkeypatch.setattr(fsspec.filesystem("memory"), "open", broken)
    with pytest.raises(StorageError, match="the bucket is on fire"):
        obtain(str(address), home=tmp_path / "home")
    with pytest.raises(StorageError, match="the bucket is on fire"):
        publish(write_small_export(tmp_path / "other", seed=1), url)


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path):
    from fastface_trt.serving.storage.objects import Storage

    def breaking():
        yield b"new"
        raise RuntimeError("the disk of the export is gone")

    storage = Storage(str(tmp_path))
    storage.write("folder/name", [b"old"])
    with pytest.raises(RuntimeError):
        storage.write("folder/name", breaking())
    assert contents(tmp_path) == {"folder/name": b"old"}


def test_a_damaged_export_is_not_published(url, export):
    with open(export / "unet" / "model.onnx", "r+b") as file:
        file.write(b"!")
    with pytest.raises(ExportIncomplete, match="changed"):
        publish(export, url, tag="production")
    _, found = objects(url)
    assert all(Path(p).name == hashlib.sha256(c).hexdigest() for p, c in found.items())
    with pytest.raises(FastFaceError):
        resolve(f"{url}#production")


class TestEngines:
    @pytest.fixture
    def built(self, tmp_path):
        """The mini export, and a cache with the engine of its smallest module."""
        cache = EngineCache(tmp_path / "engines")
        manifest = read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)
        builder = OnnxRuntimeBuilder("cpu")
        cache.get(manifest.modules["guidance_step"], folders.EXPORT, builder)
        return manifest, cache, builder

    def test_engines_come_with_their_export(self, built, url, tmp_path):
        manifest, cache, builder = built
        address = publish("mini", url, engines=engines_of(manifest, cache))
        there = EngineCache(tmp_path / "there")
        obtained = obtain(str(address), home=tmp_path / "home")
        assert obtain_engines(obtained, there, builder, home=tmp_path / "home") == ["guidance_step"]
        module = manifest.modules["guidance_step"]
        engine, folder = there.get(module, folders.EXPORT, builder, build=False)
        assert contents(folder) == contents(cache.root / engine.key)

    def test_engines_for_other_builds_stay_where_they_are(self, built, url, tmp_path):
        manifest, cache, _ = built
        address = publish("mini", url, engines=engines_of(manifest, cache))
        other: EngineBuilder = OnnxRuntimeBuilder("cpu", optimization="basic")
        obtained = obtain(str(address), home=tmp_path / "home")
        there = EngineCache(tmp_path / "there")
        assert obtain_engines(obtained, there, other, home=tmp_path / "home") == []
        assert there.entries() == []

    def test_an_engine_under_a_wrong_key_is_refused(self, built, url, tmp_path):
        manifest, cache, _ = built
        publish("mini", url, engines=engines_of(manifest, cache))
        (entry,) = cache.entries()
        swapped = entry.manifest.model_copy(update={"backend_version": "0"})
        there = EngineCache(tmp_path / "there")
        with pytest.raises(EngineMismatch):
            there.adopt(swapped, lambda folder: None)
        with pytest.raises((EngineMismatch, ExportIncomplete)):
            there.adopt(entry.manifest, lambda folder: None)
        assert there.entries() == []

    def test_settings_with_an_address_become_settings_with_a_folder(
        self, built, url, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("FASTFACE_CACHE", str(tmp_path / "own"))
        manifest, cache, _ = built
        publish("mini", url, tag="production", engines=engines_of(manifest, cache))
        settings = WorkerSettings(export=f"{url}#production")
        local = with_obtained(settings)
        # The manifest's text may be that of another version; what it says is the same.
        there, here = contents(local.export), contents(folders.EXPORT)
        assert there.keys() == here.keys()
        assert [name for name in here if there[name] != here[name]] in ([], [EXPORT_MANIFEST])
        assert read_manifest(Path(local.export, EXPORT_MANIFEST), ExportManifest) == manifest
        assert [entry.key for entry in EngineCache().entries()] == [
            entry.key for entry in cache.entries()
        ]
        assert with_obtained(WorkerSettings()) == WorkerSettings()
