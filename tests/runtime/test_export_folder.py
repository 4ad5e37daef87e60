"""Which export is meant, what it says of itself, and what opening its engines costs a picture."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.cli.main import cli
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.errors import ExportIncomplete, NoFaceFound, UnknownName
from fastface_trt.mini import folders
from fastface_trt.runtime import pipeline
from fastface_trt.runtime.export_folder import Export, ModuleSet
from fastface_trt.runtime.face import FaceAnalyzer
from fastface_trt.runtime.schedule import make_schedule

ADA = folders.SAMPLE_FACES / "ada.png"


def test_mini_is_the_built_in_model_whatever_lies_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    assert Export.open("mini").folder == folders.EXPORT
    (tmp_path / "mini" / "notes.txt").touch()
    for other in ("./mini", Path("mini")):
        with pytest.raises(ExportIncomplete, match="mini has no manifest"):
            Export.open(other)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hyper", "Export it first: fastface-trt export --checkpoint hyper exports/hyper"),
        (
            "RunDiffusion/Juggernaut-XL-v9",
            "Export it first: fastface-trt export --checkpoint hyper --base "
            "RunDiffusion/Juggernaut-XL-v9 exports/Juggernaut-XL-v9",
        ),
        ("pub#production", "Obtain it first: fastface-trt obtain 'pub#production'"),
        ("s3://models/fastface", "Obtain it first: fastface-trt obtain 's3://models/fastface#TAG'"),
        ("exports/lcm", "Export it first: fastface-trt export --checkpoint lcm exports/lcm"),
        ("exports/mine", "Check the path of the export."),  # no owner of the hub: a folder here
        ("/nowhere/mine", "Check the path of the export."),
        ("../mine", "Check the path of the export."),
    ],
)
def test_what_is_no_folder_is_told_how_to_become_one(name, hint, tmp_path, monkeypatch):
    """Every command in a hint is one that the command line takes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exports").mkdir()
    with pytest.raises(ExportIncomplete, match="There is no folder") as caught:
        Export.open(name)
    assert caught.value.hint == hint
    if "fastface-trt" in hint:
        _, command, *rest = shlex.split(hint.partition(": ")[2])
        cli.commands[command].make_context(command, rest)


def test_an_export_answers_for_its_folder_and_manifest():
    export = Export.open()
    assert export.manifest.latent_shape() == (4, 24, 24)
    assert export.manifest.latent_shape(96, 128) == (4, 24, 32)
    assert export.manifest.size_unit == 16
    assert export.schedule(4) == make_schedule(export.manifest.scheduler, 4)
    assert export.face_parser is None
    assert export.module("unet").name == "unet"
    with pytest.raises(UnknownName, match="unet"):
        export.module("unett")


def test_another_schedule_changes_only_the_schedule():
    mini, other = Export.open(), Export.open(schedule_of="lightning")
    assert other.manifest.scheduler["class"] == "EulerDiscreteScheduler"
    assert other.manifest.modules == mini.manifest.modules
    assert other.schedule(4) != mini.schedule(4)
    with pytest.raises(UnknownName, match="lightening"):
        Export.open(schedule_of="lightening")


@pytest.mark.parametrize(("kind", "portraits"), [("faceid-plus-v2", False), ("pulid", True)])
def test_the_analyser_of_an_export_finds_what_its_adapter_needs(kind, portraits):
    mini = Export.open()
    export = replace(mini, manifest=mini.manifest.model_copy(update={"adapter_kind": kind}))
    face = FaceAnalyzer.of_export(export).analyze(np.asarray(Image.open(ADA).convert("RGB")))
    assert (face.portrait_bgr is not None) is portraits


@pytest.fixture
def hours(monkeypatch):
    """A clock that stands still but for hours that models take to be built and opened."""
    clock = [0.0]

    def slow(method):
        def run(*args, **kwargs):
            clock[0] += 3600
            return method(*args, **kwargs)

        return run

    monkeypatch.setattr(pipeline, "perf_counter", lambda: clock[0])
    for owner, name in (
        (OnnxRuntimeBuilder, "build"),
        (OnnxRuntimeBuilder, "open"),
        (FaceAnalyzer, "load"),
    ):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    return clock


def test_seconds_are_without_building_and_opening(hours, tmp_path):
    shutil.copytree(folders.EXPORT, tmp_path / "export")
    with FastFace.load(tmp_path / "export", cache=tmp_path / "cache") as fastface:
        result = fastface("photo; person", ADA, num_inference_steps=2)
    assert hours[0] >= 12 * 3600
    assert dict(result.seconds) == dict.fromkeys(("face", "text", "unet", "vae", "total"), 0.0)


def test_nothing_is_built_for_a_picture_without_a_face(hours, tmp_path):
    with FastFace.load(cache=tmp_path) as fastface, pytest.raises(NoFaceFound):
        fastface("photo; person", np.zeros((96, 96, 3), np.uint8))
    assert hours[0] == 3600


def laid(folder, name):
    """A tokenizer, a face model and what is put beside them: `name` is what nobody named."""
    shutil.copytree(folders.EXPORT, folder)
    place = folder / name
    place.parent.mkdir(exist_ok=True)
    shutil.copy(folders.EXPORT / "tokenizer" / "vocab.json", place)
    return Export.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/tokenizer.json",  # which would win over the vocabulary
        "tokenizer_2/added_tokens.json",
        "face/zzz.onnx",
        "face/deeper/detection.onnx",
    ],
)
def test_what_a_reader_would_find_and_the_manifest_does_not_name_is_refused(tmp_path, name):
    export = laid(tmp_path / "export", name)
    with pytest.raises(ExportIncomplete, match=f"holds {name}, which its manifest does not name"):
        ModuleSet(export, OnnxRuntimeBuilder(), EngineCache(tmp_path / "cache"))
    stray = export.folder / name
    stray.rename(stray.with_name(f".{stray.name}"))  # as a file manager leaves them
    ModuleSet(export, OnnxRuntimeBuilder(), EngineCache(tmp_path / "cache"))


def test_a_tokenizer_that_the_manifest_does_not_have_at_all_is_refused(tmp_path):
    shutil.copytree(folders.EXPORT, tmp_path / "export")
    export = Export.open(tmp_path / "export")
    kept = tuple(f for f in export.manifest.extra_files if not f.path.startswith("tokenizer/"))
    manifest = export.manifest.model_copy(update={"extra_files": kept})
    with pytest.raises(ExportIncomplete, match="holds tokenizer/"):
        ModuleSet(replace(export, manifest=manifest), OnnxRuntimeBuilder(), EngineCache(tmp_path))


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside.bin", "weights.bin"])
def test_a_face_model_that_reads_what_the_manifest_does_not_name_is_refused(tmp_path, name):
    shutil.copytree(folders.EXPORT, tmp_path / "export")
    export = Export.open(tmp_path / "export")
    path = export.folder / "face" / "recognition.onnx"
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", name
    path.write_bytes(model.SerializeToString())
    files = tuple(describe_file(export.folder, file.path) for file in export.manifest.extra_files)
    manifest = export.manifest.model_copy(update={"extra_files": files})
    with pytest.raises(ExportIncomplete, match="which no manifest names"):
        ModuleSet(replace(export, manifest=manifest), OnnxRuntimeBuilder(), EngineCache(tmp_path))
