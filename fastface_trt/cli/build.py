"""`build`: make the engines of an export before they are needed."""

from pathlib import Path

import click

from fastface_trt.cli.common import backend_options, console, timed_lines
from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import UnknownName
from fastface_trt.pipeline import find_export


@click.command()
@backend_options
@click.option("--module", "modules", multiple=True, help="Only this module (repeatable).")
def build(
    export_folder: str,
    backend: str,
    cache: Path | None,
    threads: int | None,
    modules: tuple[str, ...],
) -> None:
    """Build the engines of an export into the cache; `generate` then starts without building."""
    folder = find_export(export_folder)
    manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest)
    for name in modules:
        if name not in manifest.modules:
            raise UnknownName("module", name, manifest.modules)
    options = {} if threads is None else {"threads": threads}
    builder = builder_for(backend, **options)
    store = EngineCache(cache)
    line = timed_lines(console())
    for name in modules or manifest.modules:
        engine, place = store.get(manifest.modules[name], folder, builder, line)
        size = sum(f.bytes for f in engine.files) / 2**20
        line(f"{name}: {size:.1f} MB, built in {engine.build_seconds:.1f} s")
        click.echo(str(place))
