"""`serve`: pictures over HTTP."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from fastface_trt.cli.common import FILE, backend_options, licence_option
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import InvalidRequest, MissingDependency, StorageError
from fastface_trt.export_folder import find_export, with_schedule_of
from fastface_trt.serving.settings import ServerSettings, WorkerSettings

KEYS_VARIABLE = "FASTFACE_API_KEYS"
MIN_KEY_LENGTH = 8
_SECONDS = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


def _of(settings: type[WorkerSettings] | type[ServerSettings], name: str) -> Any:
    return settings.model_fields[name].default


def api_keys(file: Path | None, variable: str) -> tuple[str, ...]:
    """The keys of a file, one per line, and of the environment, with commas or spaces between.

    Raises `InvalidRequest` for a key that is too short to be one, `StorageError` for the file.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(
                f"The keys in {file} cannot be read: {getattr(error, 'strerror', None) or error}.",
                "Check its path and permissions.",
            ) from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    keys += filter(None, re.split(r"[\s,]+", variable))
    if file is not None and not keys:
        raise InvalidRequest(f"There are no keys in {file}.", "Write one per line.")
    for key in keys:
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise InvalidRequest(
                "An API key is too short, or has characters that a header cannot carry.",
                f"Take {MIN_KEY_LENGTH} letters and digits or more: openssl rand -hex 24.",
            )
    return tuple(dict.fromkeys(keys))


@click.command()
@backend_options
@click.option("--schedule-of", metavar="NAME", help="Sampler and steps of another checkpoint.")
@click.option("--workers", type=_COUNT, help="Processes with engines [one per GPU, or one].")
@click.option(
    "--max-waiting",
    type=_COUNT,
    default=_of(WorkerSettings, "max_waiting"),
    show_default=True,
    help="Pictures that wait for their first step; the next gets 429.",
)
@click.option(
    "--max-running",
    type=_COUNT,
    default=_of(WorkerSettings, "max_running"),
    show_default=True,
    help="Pictures on their way in each worker.",
)
@click.option("--max-rows", type=_COUNT, help="Rows of a UNet call [what the engines take].")
@click.option(
    "--latency-budget",
    type=_SECONDS,
    metavar="SECONDS",
    help="Refuse with 429 what would not be done within this time.",
)
@click.option("--host", default=_of(ServerSettings, "host"), show_default=True, help="Address.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=_of(ServerSettings, "port"),
    show_default=True,
    help="0 takes a free one; the log says which.",
)
@click.option(
    "--api-keys-file",
    type=FILE,
    help=f"Keys of clients, one per line; also in {KEYS_VARIABLE}.",
)
@click.option("--allow-anonymous", is_flag=True, help="Let everybody in, whatever the address.")
@click.option("--requests-per-minute", type=_COUNT, help="Of each key, or address [any number].")
@click.option(
    "--max-requests",
    type=_COUNT,
    default=_of(ServerSettings, "max_requests"),
    show_default=True,
    help="Requests in work at once; the next gets 503.",
)
@click.option(
    "--max-pictures",
    type=_COUNT,
    default=_of(ServerSettings, "max_pictures"),
    show_default=True,
    help="n of one request.",
)
@click.option(
    "--max-connections",
    type=_COUNT,
    default=_of(ServerSettings, "max_connections"),
    show_default=True,
    help="Open connections.",
)
@click.option(
    "--max-connections-per-address",
    type=click.IntRange(min=0),
    default=_of(ServerSettings, "max_connections_per_address"),
    show_default=True,
    help="Of one client; 0 for any number (behind a proxy).",
)
@click.option(
    "--deadline",
    "default_deadline",
    type=_SECONDS,
    default=_of(ServerSettings, "default_deadline"),
    show_default=True,
    help="Seconds of a request that names no deadline.",
)
@click.option(
    "--max-deadline",
    type=_SECONDS,
    default=_of(ServerSettings, "max_deadline"),
    show_default=True,
    help="Seconds that a request may ask for.",
)
@click.option(
    "--drain-seconds",
    type=_SECONDS,
    default=_of(ServerSettings, "drain_seconds"),
    show_default=True,
    help="After SIGTERM, until pictures on their way are ended.",
)
@click.option(
    "--faces-ttl",
    type=_SECONDS,
    default=_of(ServerSettings, "faces_ttl"),
    show_default=True,
    help="Seconds until a registered face is forgotten.",
)
@click.option("--fetch-urls", is_flag=True, help="Take pictures by address (face_url).")
@click.option("--ui", is_flag=True, help="Serve the web page at /.")
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log.")
@click.option("--telemetry", is_flag=True, help="Send traces (OTEL_EXPORTER_OTLP_ENDPOINT).")
@click.option("--no-ai-mark", is_flag=True, help="Leave out the mark of pictures made by AI.")
@click.option("--c2pa-certificate", type=FILE, help="Sign pictures: certificate chain, PEM.")
@click.option("--c2pa-key", type=FILE, help="Sign pictures: private key, PEM.")
@click.option(
    "--check",
    "checks",
    multiple=True,
    metavar="MODULE:NAME",
    help="A check of prompts and pictures (repeatable).",
)
@licence_option
def serve(
    export_folder: str,
    accept_licence: bool,
    workers: int | None,
    api_keys_file: Path | None,
    allow_anonymous: bool,
    no_ai_mark: bool,
    max_connections_per_address: int,
    **given: Any,
) -> None:
    """Make pictures for clients of OpenAI's image API, on this machine.

    Logs are JSON lines on standard error. SIGTERM lets pictures on their way end first, and the exit
    status is 0; it is not when the engines could not be opened, or died.
    """
    given |= {
        "export": export_folder,
        "licence_acknowledged": accept_licence,
        "api_keys": api_keys(api_keys_file, os.environ.get(KEYS_VARIABLE, "")),
        "ai_mark": not no_ai_mark,
        "max_connections_per_address": max_connections_per_address or None,
    }
    worker_settings, server_settings = (
        kind.model_validate({name: given[name] for name in kind.model_fields if name in given})
        for kind in (WorkerSettings, ServerSettings)
    )
    sys.exit(_serve(worker_settings, server_settings, workers, allow_anonymous=allow_anonymous))


def _serve(
    worker_settings: WorkerSettings,
    settings: ServerSettings,
    count: int | None,
    *,
    allow_anonymous: bool,
) -> int:
    try:
        from fastface_trt.serving.http.app import create_app
        from fastface_trt.serving.http.logs import log_json
        from fastface_trt.serving.http.server import check_binding, listen, run_server
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Serving needs {error.name}.", "Run pip install 'fastface-trt[serve]'."
        ) from None
    from fastface_trt.serving.workers.placement import place_workers
    from fastface_trt.serving.workers.pool import WorkerPool

    check_binding(settings, allow_anonymous=allow_anonymous)
    manifest = read_manifest(find_export(worker_settings.export) / EXPORT_MANIFEST, ExportManifest)
    if worker_settings.schedule_of is not None:
        manifest = with_schedule_of(manifest, worker_settings.schedule_of)
    placed, environments = place_workers(worker_settings, count)
    pool = WorkerPool(placed, environments=environments)
    app = create_app(pool, settings, manifest, backend=worker_settings.backend)
    log_json(sys.stderr)
    with listen(settings) as listener, pool:
        status = run_server(app, pool, settings, listener)
    if pool.failure is not None:
        raise pool.failure
    return status
