"""A small benchmark of the mini model, whole: files, schema, and every mistake in a sentence."""

import builtins
import csv
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastface_trt.bench.report import BenchReport, schema, schema_text
from fastface_trt.cli.main import USER_ERROR, cli
from fastface_trt.errors import install_hint

SCHEMA = Path(__file__).parents[2] / "benchmarks" / "bench.schema.json"
FEW = ("--runs", 2, "--warm-up", 0, "--requests", "1,2", "--cold-starts", 1)
ONE = ("--runs", 1, "--warm-up", 0, "--requests", 1, "--concurrency", 1, "--cold-starts", 0)


def run(*arguments):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    result = run(*FEW, "--trace", "--nvtx", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result


@pytest.fixture(scope="module")
def report(written):
    return BenchReport.model_validate_json((written[0] / "bench.json").read_text())


def test_every_file_is_there(written):
    out, result = written
    plots = {
        "stages-am1+dcg",
        "latency-distribution",
        "unet-samples",
        "latency-over-requests",
        "throughput-over-concurrency",
        "roofline",
    }
    assert {path.name for path in out.iterdir()} == {
        "bench.json",
        "stages.csv",
        "report.md",
        "plots",
        "trace.json",
    }
    assert {path.stem for path in (out / "plots").iterdir()} == plots
    for path in (out / "plots").iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.std() > 5, f"{path.name} is blank"
    text = (out / "report.md").read_text()
    assert "am1+dcg, fresh" in text
    assert all(f"(plots/{name}.png)" in text for name in plots)
    assert "am1+dcg, cached, 2 threads" in result.stdout
    assert result.stdout.rstrip().endswith("bench.json")


def test_the_json_is_what_the_published_schema_says(written):
    content = json.loads((written[0] / "bench.json").read_text())
    published = json.loads(SCHEMA.read_text())
    checker = jsonschema.Draft202012Validator
    checker.check_schema(published)
    checker(published).validate(content)
    for broken in ({**content, "extra": 1}, {k: v for k, v in content.items() if k != "cases"}):
        with pytest.raises(jsonschema.ValidationError):
            checker(published).validate(broken)


def test_the_published_schema_is_the_models(tmp_path):
    assert json.loads(SCHEMA.read_text()) == schema()
    assert SCHEMA.read_text() == schema_text(), "run: fastface-trt bench schema"
    assert run("schema", "--out", tmp_path / "s.json").exit_code == 0
    assert (tmp_path / "s.json").read_text() == schema_text()


def test_stages_are_the_pipelines_and_make_up_the_call(report):
    fresh, cached = report.cases[:2]
    encoders = ["image_encoder", "face_projection", "tokenise", "text_encoder", "text_encoder_2"]
    face = ["read_picture", "face_detection", "face_recognition"]
    loop = ["noise", *[name for step in "1234" for name in ("unet", "guidance")]]
    rest = ["vae_decoder", "picture", "png", "other"]
    assert [stage.name for stage in fresh.stages] == [*face, *encoders, *loop, *rest]
    assert [stage.name for stage in cached.stages] == [*loop, *rest]
    unet = [stage for stage in fresh.stages if stage.name == "unet"]
    assert [(s.step, s.branches, s.rows) for s in unet] == [
        (0, 2, 2),
        (1, 3, 3),
        (2, 3, 3),
        (3, 2, 2),
    ]
    calls = {stage.name: stage.calls for stage in fresh.stages}
    # The prompt, since an empty one is zeros here; the face and no face.
    assert (calls["text_encoder"], calls["image_encoder"], calls["face_detection"]) == (1, 2, 1)
    for case in report.cases:
        total = np.sum([stage.seconds.samples for stage in case.stages], axis=0)
        np.testing.assert_allclose(total, case.seconds.samples)
        # Nothing is counted twice, but the file that another thread encodes meanwhile.
        png, other = (np.array(stage.seconds.samples) for stage in case.stages[-2:])
        assert min(png + other) > 0


def test_what_is_stamped(report):
    assert (report.work.checkpoint, report.work.width, report.work.steps) == ("mini", 96, 4)
    assert report.environment.versions["onnxruntime"]
    assert {engine.module for engine in report.engines} >= {"unet", "vae_decoder"}
    assert all(engine.bytes > 0 for engine in report.engines)
    assert set(report.environment.engine_keys) == {engine.key for engine in report.engines}
    # Python, NumPy and ONNX Runtime with weights: neither kilobytes nor terabytes.
    assert 2**26 < report.memory.host_peak_bytes < 2**34
    start = report.cold_start
    parts = [part.samples[0] for part in (start.imports, start.load, start.picture, start.write)]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(start.to_first_picture.samples[0])
    plans = {(p.preset, p.plan): p.unet_samples for p in report.branch_plans}
    assert [plans["am1+dcg", plan] for plan in ("full", "exact", "lean")] == [12, 10, 8]


def test_the_spreadsheet_has_every_stage(written, report):
    rows = list(csv.DictReader((written[0] / "stages.csv").open()))
    assert len(rows) == sum(len(case.stages) + 1 for case in report.cases)
    calls = [row for row in rows if row["stage"] == "call"]
    for row, case in zip(calls, report.cases, strict=True):
        assert float(row["median"]) == case.seconds.median


def test_the_trace_nests(written):
    trace = json.loads((written[0] / "trace.json").read_text())
    events = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
    (whole,) = [e for e in events if e["name"] == "call"]
    assert whole["ts"] == 0
    assert len([e for e in events if e["name"] == "unet"]) == 4
    assert all(e["ts"] >= 0 and e["ts"] + e["dur"] <= whole["dur"] + 1 for e in events)


def test_an_earlier_report_is_replaced_and_other_files_are_not(written, tmp_path):
    out = tmp_path / "out"
    first = run(*ONE, "--preset", "plain", "--out", out, "--json")
    assert first.exit_code == 0, first.output
    assert BenchReport.model_validate_json(first.stdout).cold_start is None
    assert run(*ONE, "--preset", "dcg", "--out", out).exit_code == 0
    assert (out / "plots" / "stages-dcg.png").exists()
    assert not (out / "plots" / "stages-plain.png").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused = run(*ONE, "--out", mine)
    assert refused.exit_code == USER_ERROR
    assert (mine / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "am3"), "Unknown preset 'am3'"),
        (("--plan", "leaner"), "Unknown branch plan"),
        (("--size", "big"), "The size is 'big'"),
        (("--size", "30x30"), "does not fit the model"),
        (("--steps", 5), "does not do 5 steps"),
        (("--requests", "0,1"), "--requests is 0,1"),
        (("--concurrency", "2,2"), "--concurrency is 2,2"),
        (("--face", "absent.png"), "no picture absent.png"),
        (("--backend", "onnxruntim"), "onnxruntim"),
        (("--export", "absent"), "absent"),
        (("--prompt", " "), "prompt is empty"),
        (("--random-weights", "--checkpoint", "hiper"), "hiper"),
        (("--random-weights", "--checkpoint", "mini"), "full-size SDXL"),
    ],
)
def test_mistakes_get_one_sentence_and_the_hint(tmp_path, arguments, says):
    result = run("--out", tmp_path / "out", "--cache", tmp_path / "cache", *arguments)
    assert result.exit_code == USER_ERROR, result.output
    error = result.stderr[result.stderr.index("Error:") :]
    assert says in error
    assert len(error.strip().splitlines()) == 2
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_first_call(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(*ONE, "--out", tmp_path / "file" / "out")
    assert result.exit_code == USER_ERROR, result.output
    assert "Traceback" not in result.output
    assert "median" not in result.stderr


def without(monkeypatch, *packages):
    real = builtins.__import__

    def absent(name, *arguments, **named):
        if name.split(".")[0] in packages:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", absent)


def test_without_matplotlib_everything_else_is_written(tmp_path, monkeypatch):
    without(monkeypatch, "matplotlib")
    result = run(*ONE, "--preset", "plain", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "bench.json",
        "stages.csv",
        "report.md",
    }
    report = BenchReport.model_validate_json((tmp_path / "out" / "bench.json").read_text())
    assert report.notes[-1] == (
        "There are no plots: Figures need matplotlib. pip install matplotlib."
    )


def test_without_nvtx_or_the_export_extra_it_says_what_to_install(tmp_path, monkeypatch):
    without(monkeypatch, "nvtx", "torch", "diffusers")
    result = run("--nvtx", "--out", tmp_path / "out")
    assert result.exit_code == USER_ERROR
    assert install_hint("bench") in result.stderr
    monkeypatch.setitem(__import__("sys").modules, "fastface_trt.export.exporter", None)
    fp8 = ("--random-weights", "--precision", "fp8")
    result = run(*fp8, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert result.exit_code == USER_ERROR
    assert install_hint("export") in result.stderr
    assert "fp16 need nothing" in result.stderr


def test_other_precisions_are_exported_once_into_the_cache(tmp_path, monkeypatch):
    from fastface_trt.bench.random_weights import random_export
    from fastface_trt.engines.cache import EngineCache
    from fastface_trt.export import exporter

    exported = []

    def export(options, folder, progress):
        exported.append((options.checkpoint.name, options.precision, options.random_weights))
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(exporter, "run_export", export)
    cache = EngineCache(tmp_path)
    folders = {random_export("hyper", "bf16", None, cache, print) for _ in range(2)}
    assert exported == [("hyper", "bf16", True)]
    folders.add(random_export("hyper", "fp8", 8, cache, print))
    assert len(exported) == len(folders) == 2
    assert all(folder.is_relative_to(cache.root) for folder in folders)
    assert cache.entries() == []
