"""`publish` and `obtain`: exports and engines through shared storage."""

from pathlib import Path

import click

from fastface_trt.cli.common import FOLDER, console, timed_lines
from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.cache import EngineCache
from fastface_trt.runtime.export_folder import Export

_cache = click.option("--cache", type=FOLDER, help="Engine cache folder [FASTFACE_CACHE].")


@click.command()
@click.argument("export")
@click.argument("url")
@click.option("--tag", metavar="NAME", help="Let this name mean the release from now on.")
@click.option("--engines", is_flag=True, help="Engines of it in the cache, too.")
@_cache
@click.option("--overwrite", is_flag=True, help="Send also what the storage has already.")
def publish(
    export: str, url: str, tag: str | None, engines: bool, cache: Path | None, overwrite: bool
) -> None:
    """Put EXPORT (a folder, or mini) into the storage at URL: a directory, s3://… or gs://….

    Prints URL#HASH, which means exactly these files for ever; URL#NAME means what --tag last said.
    """
    from fastface_trt.serving.storage import distribution

    manifest = Export.open(export).manifest
    entries = distribution.engines_of(manifest, EngineCache(cache)) if engines else []
    address = distribution.publish(
        export,
        url,
        tag=tag,
        engines=entries,
        overwrite=overwrite,
        progress=timed_lines(console()),
    )
    click.echo(str(address))


@click.command()
@click.argument("address", metavar="URL#NAME")
@click.option("--backend", help="Engines for this backend, where the release has them.")
@_cache
@click.option("--home", type=FOLDER, help="Where exports are kept [FASTFACE_CACHE].")
def obtain(address: str, backend: str | None, cache: Path | None, home: Path | None) -> None:
    """Fetch the export URL#TAG or URL#HASH to this machine; prints its folder, for --export.

    Stopped, it goes on where it was. What is here already is checked and not fetched again.
    """
    from fastface_trt.serving.storage import distribution

    line = timed_lines(console())
    obtained = distribution.obtain(address, home=home, progress=line)
    if backend is not None:
        store = EngineCache(cache)
        builder = make_builder(obtained.manifest, backend, cache=store)
        got = distribution.obtain_engines(obtained, store, builder, home=home, progress=line)
        missing = [name for name in obtained.manifest.modules if name not in got]
        if missing:
            line(f"No engine here for {backend} of {', '.join(missing)}: `build` makes them.")
    click.echo(str(obtained.folder))
