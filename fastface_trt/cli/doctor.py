"""`doctor`: what is installed, which backends work here and why not, and the mend."""

import importlib.metadata
import importlib.util
import json
import platform
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from fastface_trt import __version__
from fastface_trt.engines.backends import BackendStatus, probe_backends
from fastface_trt.engines.cache import EngineCache

EXTRAS = {
    "export": ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript", "onnx-ir"),
    "gpu": ("onnxruntime-gpu", "cuda-python"),
    "tensorrt": ("tensorrt", "polygraphy"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13",),
}
RUNTIME = ("numpy", "onnxruntime", "insightface", "tokenizers", "pillow", "safetensors")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, dict[str, str | None]]:
    return {name: {p: _version(p) for p in packages} for name, packages in EXTRAS.items()}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def doctor(as_json: bool) -> None:
    """Say what is installed, which backends work here, and how to mend the others."""
    backends = probe_backends()
    if as_json:
        report = {
            "fastface_trt": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "runtime": {p: _version(p) for p in RUNTIME},
            "extras": _extras(),
            "backends": [asdict(status) for status in backends],
            "cache": str(EngineCache().root),
        }
        click.echo(json.dumps(report, indent=2))
        return
    out = Console(highlight=False)
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
    out.print(f"Engine cache: {EngineCache().root}")


def _print_backends(out: Console, backends: list[BackendStatus]) -> None:
    table = Table(title="Backends", show_lines=True)
    for heading in ("backend", "works", "what", "mend"):
        table.add_column(heading, overflow="fold")
    for status in backends:
        works = "[green]yes[/green]" if status.works else "[red]no[/red]"
        table.add_row(status.name, works, status.detail, status.mend or "-")
    out.print(table)
