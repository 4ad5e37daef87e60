"""`publish` and `obtain` from the command line."""

from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("fsspec")

from fastface_trt.cli.main import cli
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.mini import folders


def run(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFACE_CACHE", str(tmp_path / "cache"))
    return EngineCache()


def test_there_and_back(tmp_path, cache):
    manifest = read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)
    cache.get(manifest.modules["guidance_step"], folders.EXPORT, OnnxRuntimeBuilder("cpu"))
    (engine,) = cache.entries()
    storage = tmp_path / "storage"
    published = run("publish", "mini", storage, "--tag", "production", "--engines")
    assert published.exit_code == 0, published.output
    there = tmp_path / "there"
    options = ("--home", tmp_path / "home", "--cache", there, "--backend", "onnxruntime")
    for address in (f"{storage}#production", published.stdout.strip()):
        obtained = run("obtain", address, *options)
        assert obtained.exit_code == 0, obtained.output
        folder = Path(obtained.stdout.strip())
        assert read_manifest(folder / EXPORT_MANIFEST, ExportManifest) == manifest
    assert [entry.key for entry in EngineCache(there).entries()] == [engine.key]


def test_errors_are_one_sentence(tmp_path):
    run("publish", "mini", tmp_path / "storage", "--tag", "production")
    answer = run("obtain", f"{tmp_path}/storage#staging")
    assert answer.exit_code == 2
    assert answer.stderr.startswith("Error: ")
    assert "tags/staging" in answer.stderr
    assert "Traceback" not in answer.stderr


LONG = "a" * 5000
PINNED = f"#{'0' * 64}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("obtain", f"{LONG}#tag"),
        ("obtain", f"/tmp/{LONG}{PINNED}"),
        ("obtain", f"/nowhere{PINNED}", "--home", LONG),
        ("obtain", f"/nowhere{PINNED}", "--home", "~nobody-of-that-name/x"),
        ("obtain", "zip://inside::/nowhere/archive.zip#tag"),
        ("obtain", "reference://x#tag"),
        ("obtain", "/dev/zero#tag"),
        ("publish", LONG, "storage"),
        ("publish", "mini", LONG),
        ("inspect", LONG),
        ("build", "--export", "mini", "--cache", LONG),
        ("build", "--export", LONG),
        ("cache", "list", "--cache", LONG),
        ("export", "--checkpoint", "hyper", "--base", LONG, "out"),
        ("export-triton", LONG),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_names_that_no_file_can_have_are_one_sentence(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run(*arguments)
    assert answer.exit_code == 2, (answer.output, answer.exception)
    assert answer.stderr.startswith("Error: ")
    assert len(answer.stderr) < 6000
    assert list(tmp_path.glob("[!c]*")) == []
