"""`refit`: make an export's engines out of built ones by replacing weights, without a build."""

from pathlib import Path

import click

from fastface_trt.cli.common import FOLDER, backend_options, console, timed_lines
from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.refit import RefitReport, refit
from fastface_trt.runtime.export_folder import Export


@click.command("refit")
@backend_options
@click.option("--from", "base", type=FOLDER, help="Use the engines of this export [the newest].")
@click.option("--module", "modules", multiple=True, help="Only this module (repeatable).")
def refit_command(
    export_folder: str,
    backend: str,
    cache: Path | None,
    threads: int | None,
    base: Path | None,
    modules: tuple[str, ...],
) -> None:
    """Make the engines of an export from built ones whose graphs are the same.

    For another LoRA scale, another LoRA, or another distilled checkpoint: only weights differ, so
    they are put into a copy of an engine that the cache holds. The copy is compared with the
    export's probe before it counts.
    """
    export = Export.open(export_folder)
    start = None if base is None else Export.open(base)
    for name in modules:
        export.module(name)
        if start is not None:
            start.module(name)
    store = EngineCache(cache)
    builder = make_builder(export.manifest, backend, threads=threads, cache=store)
    line = timed_lines(console())
    for name in modules or export.manifest.modules:
        report = refit(
            store,
            export.module(name),
            export.folder,
            builder,
            line,
            None if start is None else start.manifest.modules.get(name),
        )
        line(_words(report))
        click.echo(str(store.root / report.key))


def _words(report: RefitReport) -> str:
    if report.base is None:
        return f"{report.module}: this engine exists"
    errors = "no probe"
    if report.probe_errors is not None:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in report.probe_errors.items())
    return (
        f"{report.module}: {len(report.changed)} weights changed "
        f"({report.changed_bytes / 2**20:.1f} MB) in {report.seconds:.1f} s; "
        f"difference from PyTorch: {errors}"
    )
