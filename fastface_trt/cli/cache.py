"""`cache`: what built engines there are, whether they are whole, and which can go."""

import json
import time
from pathlib import Path

import click
from rich.table import Table

from fastface_trt.cli.common import FOLDER
from fastface_trt.engines.backends import BACKENDS, timing_cache_file
from fastface_trt.engines.cache import CacheEntry, EngineCache
from fastface_trt.engines.tensorrt.flavour import find_flavour
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.engines.tensorrt.plan import measurements, read_tactics
from fastface_trt.errors import EngineMismatch, FastFaceError
from fastface_trt.measure.tables import text_console

_DAY_SECONDS = 24 * 3600

_cache_option = click.option("--cache", type=FOLDER, help="Engine cache folder [FASTFACE_CACHE].")


@click.group()
def cache() -> None:
    """List, check or thin out the engine cache."""


@cache.command("list")
@_cache_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def list_engines(cache: Path | None, as_json: bool) -> None:
    """Show every engine: module, backend and version, size, age, and for which GPU."""
    store = EngineCache(cache)
    entries = store.entries()
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in entries], indent=2))
        return
    table = Table(title=f"Engine cache {store.root}")
    for heading in ("key", "module", "backend", "for", "MB", "used", "state"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        facts = _facts(entry)
        table.add_row(
            entry.key[:12],
            facts["module"],
            f"{facts['backend']} {facts['backend_version']}",
            facts["hardware"],
            f"{entry.bytes / 2**20:.1f}",
            f"{(time.time() - entry.used) / _DAY_SECONDS:.0f} days ago",
            entry.problem or "ok",
        )
    out = text_console()
    out.print(table)
    out.print(f"{len(entries)} engines, {sum(e.bytes for e in entries) / 2**30:.2f} GB")


@cache.command()
@_cache_option
def verify(cache: Path | None) -> None:
    """Compare every file of every engine with its hash; exits with 2 when one is damaged."""
    store = EngineCache(cache)
    damaged = []
    for entry in store.entries():
        try:
            store.verify(entry.key)
            click.echo(f"{entry.key[:12]}  ok")
        except FastFaceError as error:
            damaged.append(entry.key)
            click.echo(f"{entry.key[:12]}  {error.message}")
    if damaged:
        raise EngineMismatch(
            f"{len(damaged)} of {len(store.entries())} engines are damaged.",
            "They are built again when they are needed; `fastface-trt cache prune` removes them.",
        )


@cache.command()
@_cache_option
@click.option("--older-than", type=float, metavar="DAYS", help="Not used for so many days.")
@click.option("--backend", help="Only engines of this backend.")
@click.option("--all", "everything", is_flag=True, help="Every engine.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def prune(
    cache: Path | None,
    older_than: float | None,
    backend: str | None,
    everything: bool,
    dry_run: bool,
) -> None:
    """Remove engines that no longer serve: damaged ones, and those of other backend versions.

    What is damaged is what `cache verify` says, which reads every file. --older-than and --all
    take more. Left-overs of stopped builds go too.
    """
    store = EngineCache(cache)
    versions = {name: one.probe().version for name, one in BACKENDS.items()}
    freed = 0
    for entry in store.entries():
        if backend is not None and (entry.manifest is None or entry.manifest.backend != backend):
            continue
        reason = _reason(entry, versions, older_than, everything) or _damage(store, entry)
        if reason is None:
            continue
        freed += entry.bytes if dry_run else store.remove(entry.key)
        click.echo(f"{entry.key[:12]}  {_facts(entry)['module']}: {reason}")
    if not dry_run:
        freed += store.sweep()
    click.echo(f"{'Would free' if dry_run else 'Freed'} {freed / 2**20:.1f} MB.")


@cache.command()
@_cache_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def tactics(cache: Path | None, as_json: bool) -> None:
    """List what TensorRT measured for --editable-timing-cache: key, tactic, milliseconds.

    `build --tactic KEY=HASH` then builds another tactic for a key. Not run on a GPU so far.
    """
    file = measurements(
        timing_cache_file(EngineCache(cache), "tensorrt"),
        TensorRTOptions(editable_timing_cache=True),
    )
    found = read_tactics(find_flavour("tensorrt"), file) if file.is_file() else []
    if as_json:
        rows = [{"key": key, "tactic": tactic, "ms": ms} for key, tactic, ms in found]
        click.echo(json.dumps(rows, indent=2))
    elif not found:
        click.echo(f"{file} holds no measurements; build with --editable-timing-cache first.")
    else:
        click.echo("\n".join(f"{key}={tactic}  {ms:.4f} ms" for key, tactic, ms in found))


def _damage(store: EngineCache, entry: CacheEntry) -> str | None:
    """What is wrong with the files of an engine; None where nothing is."""
    try:
        store.verify(entry.key)
    except FastFaceError as error:
        return error.message
    return None


def _reason(
    entry: CacheEntry, versions: dict[str, str], older_than: float | None, everything: bool
) -> str | None:
    """Why an engine goes; None when it stays."""
    if entry.manifest is None:
        return entry.problem
    if everything:
        return "all engines go"
    installed = versions.get(entry.manifest.backend, "")
    # A backend that is not installed says nothing about its engines: they may be for others.
    if installed and entry.manifest.backend_version != installed:
        return f"built with {entry.manifest.backend_version}, installed is {installed}"
    days = (time.time() - entry.used) / _DAY_SECONDS
    if older_than is not None and days > older_than:
        return f"not used for {days:.0f} days"
    return None


def _facts(entry: CacheEntry) -> dict[str, str]:
    """What a row of the list shows, as text."""
    engine = entry.manifest
    hardware = {} if engine is None else engine.hardware
    return {
        "key": entry.key,
        "folder": str(entry.folder),
        "module": "?" if engine is None else engine.module.name,
        "backend": "?" if engine is None else engine.backend,
        "backend_version": "" if engine is None else engine.backend_version,
        "hardware": hardware.get("gpu") or hardware.get("targets") or hardware.get("machine", ""),
        "bytes": str(entry.bytes),
        "problem": entry.problem,
    }
