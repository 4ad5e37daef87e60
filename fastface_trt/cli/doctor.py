"""`doctor`: what is installed, which backends work here and why not, and the hint."""

import importlib.metadata
import importlib.util
import json
import platform
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastface_trt import __version__
from fastface_trt.cli.common import FILE, FOLDER, console, timed_lines
from fastface_trt.engines.backends import BACKENDS, BackendStatus, probe_backends
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import storage_errors, write_text_durably
from fastface_trt.engines.hardware import cuda_driver, cuda_hardware, why_no_gpu
from fastface_trt.engines.kernels.operator_library import library_status
from fastface_trt.engines.ort.session import libraries_status
from fastface_trt.errors import BackendUnavailable, ExportIncomplete, FastFaceError, UnknownName
from fastface_trt.measure.tables import text_console
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.face import FaceAnalyzer, whose_code
from fastface_trt.runtime.images import load_picture
from fastface_trt.verify.self_test import (
    REFERENCE,
    Check,
    SelfTest,
    require_export_extra,
)

EXTRAS = {
    "export": ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript", "onnx-ir"),
    "gpu": ("onnxruntime-gpu", "cuda-python"),
    "tensorrt": ("tensorrt", "polygraphy"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "cuda-python"),
    "insightface": ("insightface", "scikit-image"),
    "kernels": ("nvidia-cuda-nvrtc", "cuda-core"),
    "quantize": ("nvidia-modelopt",),
}
RUNTIME = ("numpy", "onnxruntime", "onnx", "tokenizers", "pillow", "safetensors")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, dict[str, str | None]]:
    return {name: {p: _version(p) for p in packages} for name, packages in EXTRAS.items()}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@click.option("--gpu", is_flag=True, help="Test every GPU backend against ONNX Runtime's CPU.")
@click.option(
    "--backend", "chosen", multiple=True, help="With --gpu: only this backend (repeatable)."
)
@click.option(
    "--export",
    "export",
    type=FOLDER,
    metavar="EXPORT",
    help="Say of this export which modules returned values that are not finite.",
)
@click.option(
    "--full-size",
    type=FOLDER,
    metavar="EXPORT",
    help="With --gpu: also run this full-size export's UNet "
    "(make one with `export --random-weights --fp16`).",
)
@click.option(
    "--recording",
    type=FOLDER,
    help="With --gpu: also replay these recorded cases (tests/golden/pipeline in the sources).",
)
@click.option("--cache", type=FOLDER, help="Engine cache folder [FASTFACE_CACHE].")
@click.option("--out", "file", type=FILE, help="With --gpu: write the checks as JSON to this file.")
def doctor(
    as_json: bool,
    gpu: bool,
    chosen: tuple[str, ...],
    export: Path | None,
    full_size: Path | None,
    recording: Path | None,
    cache: Path | None,
    file: Path | None,
) -> None:
    """Say what is installed, which backends work here, and how to make the others work.

    It also looks for the face of a sample picture, and says whose code found it. With --gpu it is
    a self-test: every GPU backend that works here builds the small model, makes pictures and is
    compared with ONNX Runtime on the CPU. Exits with 1 when a check fails.
    """
    if export:
        _probes(export)
        return
    backends = probe_backends()
    if gpu:
        names = chosen or _on_gpu(backends)
        line = timed_lines(console())
        _self_test(SelfTest(names, EngineCache(cache), full_size, recording, line), file, as_json)
        return
    face, face_hint = _sample_face()
    if as_json:
        report = {
            "fastface_trt": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "runtime": {p: _version(p) for p in RUNTIME},
            "extras": _extras(),
            "backends": [asdict(status) for status in backends],
            "facts": _facts(),
            "face": {"works": not face_hint, "detail": face, "hint": face_hint},
            "cache": str(EngineCache().root),
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _print_report(text_console(), backends, " ".join(filter(None, (face, face_hint))))
    if face_hint:
        raise click.exceptions.Exit(1)


def _print_report(out: Console, backends: list[BackendStatus], face: str) -> None:
    out.print(
        f"FastFace-TRT {__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    _print_backends(out, backends)
    table = Table(title="Extras", show_lines=False)
    for heading in ("extra", "installed", "missing"):
        table.add_column(heading)
    for name, packages in _extras().items():
        have = [f"{p} {v}" for p, v in packages.items() if v]
        lack = [p for p, v in packages.items() if not v]
        table.add_row(name, ", ".join(have) or "-", ", ".join(lack) or "-")
    out.print(table)
    for name, fact in _facts().items():
        out.print(f"{name}: {fact}", soft_wrap=True)
    out.print(f"Faces: {face}", soft_wrap=True)
    out.print(f"Engine cache: {EngineCache().root}", soft_wrap=True)


def _sample_face() -> tuple[str, str]:
    """What came of looking for the face of a sample picture, and the hint where that failed."""
    sample = SAMPLE_FACES / "ada.png"
    try:
        face = FaceAnalyzer.of_export(Export.open()).analyze(load_picture(sample))
    except FastFaceError as error:
        return error.message, error.hint
    code, why = whose_code()
    by = f"{code} ({why})" if why else code
    return f"found the face of {sample.name} (score {face.score:.2f}) by {by}", ""


def _probes(folder: Path) -> None:
    """Look whether what PyTorch made of each probe is finite; raises `ExportIncomplete` if not."""
    from safetensors.numpy import load_file

    export = Export.open(folder)
    for name, module in export.manifest.modules.items():
        if module.probe is None:
            click.echo(f"{name}: no probe")
            continue
        tensors = load_file(folder / module.probe.file.path)
        if not all(np.isfinite(value).all() for value in tensors.values()):
            raise ExportIncomplete(
                f"{name} of {folder} returns values that are not finite in "
                f"{export.manifest.precision}.",
                "Export again with --precision bf16 or fp32"
                + (", or with another --vae." if name == "vae_decoder" else "."),
            )
        click.echo(f"{name}: finite")


def _facts() -> dict[str, str]:
    """Single lines about this machine, in the order in which they are printed."""
    gpu, driver = cuda_hardware(), cuda_driver().get("driver", "unknown")
    if gpu["gpu"] == "unknown":
        facts = {"GPU": f"none: {why_no_gpu()[0]}"}
    else:
        capability = gpu["compute_capability"]
        card = f"{gpu['gpu']}, compute capability {capability}, driver for CUDA {driver}"
        facts = {"GPU": card}
    with suppress(BackendUnavailable):  # the table has said what is wrong with ONNX Runtime
        if libraries := libraries_status():
            facts["CUDA libraries of ONNX Runtime"] = libraries
    operator = library_status()
    facts["Attention kernels"] = " ".join(filter(None, (operator.detail, operator.hint)))
    return facts


def _on_gpu(backends: list[BackendStatus]) -> list[str]:
    """GPU backends that work here; raises `BackendUnavailable` when there are none."""
    names = [status.name for status in backends if status.works and status.name != REFERENCE]
    if not names:
        reasons = "; ".join(f"{s.name}: {s.detail}" for s in backends if s.name != REFERENCE)
        raise BackendUnavailable(
            "No GPU backend works here, so there is nothing to test.",
            f"{reasons}. `fastface-trt doctor` says what to do about each.",
        )
    return names


def _self_test(test: SelfTest, file: Path | None, as_json: bool) -> None:
    for backend in test.backends:
        if backend not in BACKENDS:
            raise UnknownName("backend", backend, BACKENDS)
    require_export_extra(test.recording)
    checks = test.run()
    report = json.dumps(test.report(checks), indent=2)
    if file is not None:
        with storage_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_durably(file, report + "\n")
    if as_json:
        click.echo(report)
    else:
        _print_checks(text_console(), checks)
    if not all(check.passed for check in checks):
        raise click.exceptions.Exit(1)


def _yes_or_no(value: bool) -> Text:
    return Text("yes", "green") if value else Text("no", "red")


def _print_checks(out: Console, checks: list[Check]) -> None:
    table = Table(title="Self-test", show_lines=True)
    for heading in ("backend", "check", "passed", "how"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        passed = _yes_or_no(check.passed)
        table.add_row(check.backend, check.name, passed, check.detail)
    out.print(table)


def _print_backends(out: Console, backends: list[BackendStatus]) -> None:
    table = Table(title="Backends", show_lines=True)
    for heading in ("backend", "works", "what"):
        table.add_column(heading, overflow="fold")
    hints: dict[str, list[str]] = {}
    for status in backends:
        works = _yes_or_no(status.works)
        table.add_row(status.name, works, status.detail)
        if status.hint:
            hints.setdefault(status.hint, []).append(status.name)
    out.print(table)
    # Below the table, and never wrapped, so that a command can be copied.
    for hint, names in hints.items():
        out.print(f"{', '.join(names)}: {hint}", soft_wrap=True)
