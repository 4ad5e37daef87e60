"""`verify`: is a backend's arithmetic that of the exported graphs, and if not, where it parts."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastface_trt.cli.common import FOLDER, console, timed_lines
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Progress
from fastface_trt.errors import MissingDependency, install_hint
from fastface_trt.measure.tables import text_console
from fastface_trt.runtime.export_folder import Export
from fastface_trt.verify.inputs import module_inputs
from fastface_trt.verify.layers import LayerReport, find_layer
from fastface_trt.verify.modules import ModuleVerdict, verify_builder, verify_modules

FAILED = 1
"""Exit code when a module is beyond its tolerance, or the linter finds an error."""


@click.command()
@click.argument("export", default="mini")
@click.option("--backend", default="onnxruntime", show_default=True, help="Any that `build` knows.")
@click.option("--module", "modules", multiple=True, help="Only this module (repeatable).")
@click.option("--layers", is_flag=True, help="Find the first tensor where a module differs.")
@click.option("--lint", "only_lint", is_flag=True, help="Lint the ONNX files; build nothing.")
@click.option("--tolerance", type=click.FloatRange(min=0, min_open=True), help="Relative L2.")
@click.option(
    "--marks",
    default=16,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tensors that --layers compares per build: more mean fewer builds and more memory.",
)
@click.option(
    "--float64/--no-float64",
    default=True,
    help="With --layers: ask float64 which side is right (minutes for a full-size UNet).",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads per module.")
@click.option("--cache", type=FOLDER, help="Engine cache folder [FASTFACE_CACHE].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@click.pass_context
def verify(
    context: click.Context,
    export: str,
    backend: str,
    modules: tuple[str, ...],
    layers: bool,
    only_lint: bool,
    tolerance: float | None,
    marks: int,
    float64: bool,
    seed: int,
    threads: int | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Compare the engines of EXPORT (a folder, or mini) with ONNX Runtime, module by module.

    The reference is ONNX Runtime on the CPU with all optimisations off; the exit code is 1 when a
    module is beyond the tolerance of its precision. --layers then looks inside such a module.
    """
    opened = Export.open(export)
    folder, manifest = opened.folder, opened.manifest
    for name in modules:
        opened.module(name)
    line = timed_lines(console())
    if only_lint:
        report, failed = _lint(opened, modules or tuple(manifest.modules), seed, line)
        _show(report, as_json, _print_lint)
        context.exit(FAILED if failed else 0)
    builder = verify_builder(backend, manifest, threads=threads)
    verdicts = verify_modules(
        folder,
        manifest,
        builder,
        EngineCache(cache),
        modules=modules,
        tolerance=tolerance,
        seed=seed,
        threads=threads,
        progress=line,
    )
    found = [
        layer
        for verdict in verdicts
        if layers
        and (
            layer := find_layer(
                folder,
                manifest,
                verdict,
                builder,
                marks=marks,
                float64=float64,
                seed=seed,
                threads=threads,
                progress=line,
            )
        )
    ]
    if as_json:
        report = {"export": str(folder), "backend": backend, "precision": manifest.precision}
        report["modules"] = [verdict.as_json() for verdict in verdicts]
        report["layers"] = [one.as_json() for one in found]
        click.echo(json.dumps(report, indent=2))
    else:
        out = text_console()
        _print_verdicts(out, backend, verdicts)
        for one in found:
            _print_layer(out, one)
    context.exit(0 if all(verdict.agrees for verdict in verdicts) else FAILED)


def _show(report: dict[str, Any], as_json: bool, show: Any) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(text_console(), report)


def _lint(
    export: Export, modules: tuple[str, ...], seed: int, line: Progress
) -> tuple[dict[str, Any], bool]:
    try:
        from fastface_trt.verify.lint import lint
    except ImportError as error:
        raise MissingDependency(
            f"Linting needs {error.name}.", f"Install it with: {install_hint('export')}"
        ) from None
    report: dict[str, Any] = {"export": str(export.folder), "lint": {}}
    failed = False
    for name in modules:
        line(f"Linting {name}")
        module = export.module(name)
        inputs = module_inputs(module, export.manifest, export.folder, seed=seed)
        entries = lint(module, export.folder, inputs)
        failed = failed or any(entry.is_error for entry in entries)
        report["lint"][name] = [
            {"level": e.level, "source": e.source, "message": e.message, "nodes": list(e.nodes)}
            for e in entries
        ]
    return report, failed


def _print_lint(out: Console, report: dict[str, Any]) -> None:
    for name, entries in report["lint"].items():
        out.print(f"{name}: {'clean' if not entries else ''}")
        for entry in entries:
            nodes = f" ({', '.join(entry['nodes'])})" if entry["nodes"] else ""
            out.print(f"  {entry['level']}, {entry['source']}{nodes}: {entry['message']}")


def _print_verdicts(out: Console, backend: str, verdicts: list[ModuleVerdict]) -> None:
    table = Table(title=f"{backend} against ONNX Runtime on the CPU, unoptimised")
    for heading in ("module", "output", "max |difference|", "relative L2", "tolerance", ""):
        table.add_column(heading)
    for verdict in verdicts:
        for name, one in verdict.differences.items():
            differs = one.exceeds(verdict.tolerance)
            table.add_row(
                verdict.module,
                name,
                f"{one.max_abs:.2e}",
                f"{one.relative_l2:.2e}",
                f"{verdict.tolerance:.0e}",
                Text("differs", "red") if differs else Text("agrees", "green"),
            )
    out.print(table)


def _print_layer(out: Console, report: LayerReport) -> None:
    sizes = " x ".join(map(str, report.shape)) or "scalar"
    where = f" inside a call of {report.inside}" if report.inside else ""
    out.print(f"{report.module} parts from the reference at {report.tensor} ({sizes}){where}:")
    rows = {
        "operator": f"{report.op} ({report.node})",
        "PyTorch module": report.scope or "not recorded",
        "type": report.dtype,
        "relative L2": f"{report.difference.relative_l2:.2e}, "
        f"tolerance {report.tolerance:.0e}, max |difference| {report.difference.max_abs:.2e}",
        "computed from": ", ".join(
            f"{name} ({one.relative_l2:.1e})" for name, one in report.producers.items()
        )
        or "inputs and weights",
        "searched": f"{report.searched} of {report.tensors} tensors in {report.builds} builds",
    }
    if report.float64 is not None:
        rows["from float64"] = (
            f"backend {report.float64.backend:.1e}, ONNX Runtime {report.float64.reference:.1e}"
        )
    for key, value in rows.items():
        out.print(f"  {key:15} {value}")
    out.print(f"  {report.suggestion}")
