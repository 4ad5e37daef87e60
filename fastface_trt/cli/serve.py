"""`serve`: pictures over HTTP, by worker processes on this machine or by replicas on Ray."""

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from fastface_trt.cli.common import (
    FILE,
    Command,
    backend_options,
    console,
    engine_options,
    licence_option,
    provider_option,
    timed_lines,
)
from fastface_trt.errors import InvalidRequest, MissingDependency, StorageError, install_hint
from fastface_trt.runtime.export_folder import Export
from fastface_trt.serving.settings import ServerSettings, Settings, WorkerSettings

Kind = TypeVar("Kind", bound=Settings)
KEYS_VARIABLE = "FASTFACE_API_KEYS"
METRICS_VARIABLE = "FASTFACE_METRICS_KEYS"
_COUNT = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=0, min_open=True)
_SETTINGS = WorkerSettings.model_fields | ServerSettings.model_fields
_SHARE = click.FloatRange(min=0)


def _setting(
    name: str, kind: click.ParamType[Any], text: str, flag: str | None = None
) -> Callable[[Command], Command]:
    """An option for a setting of the worker or the server, with the setting's default."""
    return click.option(
        f"--{flag or name.replace('_', '-')}",
        name,
        type=kind,
        default=_SETTINGS[name].default,
        show_default=True,
        help=text,
    )


def _ray_options(command: Command) -> Command:
    """`--ray` and what goes with it."""
    for option in (
        click.option("--replica-cpus", type=_SHARE, help="With --ray: CPUs of each replica [1]."),
        click.option("--replica-gpus", type=_SHARE, help="With --ray: GPUs of each replica [0]."),
        click.option(
            "--max-replicas", type=_COUNT, help="With --ray: scale up to so many [--workers]."
        ),
        click.option(
            "--ray-address",
            metavar="ADDRESS",
            help="With --ray: deploy to this cluster, or update what it serves, and return.",
        ),
        click.option(
            "--ray", "on_ray", is_flag=True, help="Replicas behind Ray Serve; --workers of them."
        ),
    ):
        command = option(command)
    return command


@click.command()
@backend_options
@provider_option
@click.option("--schedule-of", metavar="NAME", help="Sampler and steps of another checkpoint.")
@click.option("--workers", type=_COUNT, help="Processes with engines [one per GPU, or one].")
@click.option(
    "--max-output-pixels", type=_COUNT, help="Of a picture [four times those of the model's size]."
)
@_setting("max_request_seconds", _SECONDS, "What one picture may take, as far as was measured.")
@_setting("max_waiting", _COUNT, "Pictures that wait in each worker, shared out between clients.")
@_setting("max_running", _COUNT, "Pictures on their way in each worker.")
@click.option("--max-rows", type=_COUNT, help="Rows of a UNet call [what the engines take].")
@click.option(
    "--latency-budget",
    type=_SECONDS,
    metavar="SECONDS",
    help="Refuse with 429 what would not be done within this time.",
)
@_setting("host", click.STRING, "Address.")
@_setting("port", click.IntRange(0, 65535), "0 takes a free one; the log says which.")
@click.option(
    "--api-keys-file",
    type=FILE,
    help=f"Keys of clients, one per line; also in {KEYS_VARIABLE}.",
)
@click.option(
    "--metrics-keys-file",
    type=FILE,
    help=f"Keys of who may read /metrics, one per line; also in {METRICS_VARIABLE} [everybody].",
)
@click.option("--allow-anonymous", is_flag=True, help="Let everybody in, whatever the address.")
@click.option("--requests-per-minute", type=_COUNT, help="Of each key, or address [any number].")
@_setting(
    "max_requests",
    _COUNT,
    "Requests in work at once; the next gets 503, or 429 above its client's share.",
)
@_setting("max_bodies", _COUNT, "Bodies on their way in at once; the next gets 503.")
@_setting("max_body_bytes", _COUNT, "Of one request.")
@_setting("max_body_memory", _COUNT, "Bytes of all bodies on their way in; the next get 503.")
@_setting("max_picture_pixels", _COUNT, "Of a face picture.")
@_setting("max_faces", _COUNT, "Registered faces; the next gets 429, as above its client's share.")
@_setting("body_timeout", _SECONDS, "Seconds for headers, and for a body.")
@_setting("write_timeout", _SECONDS, "Seconds for a client to take what was written.")
@_setting(
    "max_passed_over",
    click.IntRange(min=0),
    "UNet calls that may pass over a picture for a fuller one.",
)
@_setting("stall_seconds", _SECONDS, "A worker that gets nothing done is started again.")
@_setting("max_pictures", _COUNT, "n of one request.")
@_setting("max_connections", _COUNT, "Open connections.")
@_setting(
    "max_connections_per_address",
    click.IntRange(min=0),
    "Of one client, and opened by it in a second; 0 for any number (behind a proxy).",
)
@_setting(
    "default_deadline", _SECONDS, "Seconds of a request that names no deadline.", flag="deadline"
)
@_setting("max_deadline", _SECONDS, "Seconds that a request may ask for.")
@_setting("drain_seconds", _SECONDS, "After SIGTERM, until pictures on their way are ended.")
@_setting("faces_ttl", _SECONDS, "Seconds until a registered face is forgotten.")
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin call from a browser (CORS; repeatable; * for all).",
)
@click.option(
    "--model-name",
    "model_names",
    multiple=True,
    metavar="NAME",
    help="A further name that clients may ask for as model (repeatable).",
)
@click.option("--heif", is_flag=True, help="Read HEIC and AVIF pictures (extra heif).")
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
@_ray_options
@licence_option
def serve(
    export_folder: str,
    accept_licence: bool,
    workers: int | None,
    provider_options: dict[str, str] | None,
    api_keys_file: Path | None,
    metrics_keys_file: Path | None,
    allow_anonymous: bool,
    no_ai_mark: bool,
    max_connections_per_address: int,
    on_ray: bool,
    **given: Any,
) -> None:
    """Make pictures for clients of OpenAI's image API, on this machine.

    Logs are JSON lines on standard error. SIGTERM lets pictures on their way end first, and the
    exit status is 0; it is not when the engines could not be opened, or died.
    """
    given |= {
        "export": export_folder,
        "engine_options": engine_options(provider_options=provider_options),
        "licence_acknowledged": accept_licence,
        "api_keys": read_keys(api_keys_file, KEYS_VARIABLE),
        "metrics_keys": read_keys(metrics_keys_file, METRICS_VARIABLE),
        "ai_mark": not no_ai_mark,
        "max_connections_per_address": max_connections_per_address or None,
    }
    status = _serve(
        _settings(WorkerSettings, given),
        _settings(ServerSettings, given),
        workers,
        allow_anonymous=allow_anonymous,
        ray=given if on_ray else None,
    )
    sys.exit(status)


def _settings(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    return kind.model_validate({name: given[name] for name in kind.model_fields if name in given})


def _serve(
    worker_settings: WorkerSettings,
    settings: ServerSettings,
    count: int | None,
    *,
    allow_anonymous: bool,
    ray: Mapping[str, Any] | None,
) -> int:
    try:
        from fastface_trt.serving.http.app import create_app
        from fastface_trt.serving.http.logs import log_json
        from fastface_trt.serving.http.server import check_binding, listen, run_server
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Serving needs {error.name}.", f"Run {install_hint('serve')}"
        ) from None
    from fastface_trt.serving.storage.distribution import with_obtained
    from fastface_trt.serving.workers.placement import place_workers
    from fastface_trt.serving.workers.pool import WorkerPool

    check_binding(settings, allow_anonymous=allow_anonymous)
    if ray is not None:
        _serve_on_ray(worker_settings, settings, count, ray)
        return 0
    worker_settings = with_obtained(worker_settings, progress=timed_lines(console()))
    export = Export.open(worker_settings.export, schedule_of=worker_settings.schedule_of)
    placed, environments = place_workers(worker_settings, count)
    pool = WorkerPool(placed, environments=environments)
    app = create_app(pool, settings, export.manifest, backend=worker_settings.backend)
    log_json(sys.stderr)
    with listen(settings) as listener, pool:
        _say_address(listener.getsockname()[1], settings)
        status = run_server(app, pool, settings, listener)
    if pool.failure is not None:
        raise pool.failure
    return status


def _say_address(port: int, settings: ServerSettings) -> None:
    """What a person at a terminal can open: the page, or the API's documentation."""
    screen = console()
    if screen.is_terminal:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(settings.host)
        path, rest = ("/", "") if settings.ui else ("/docs", " (--ui has a page)")
        screen.print(f"open http://{host or settings.host}:{port}{path}{rest}", soft_wrap=True)


def _serve_on_ray(
    worker: WorkerSettings, server: ServerSettings, workers: int | None, given: Mapping[str, Any]
) -> None:
    from fastface_trt.serving.ray.arguments import Placement
    from fastface_trt.serving.ray.run import run_on_ray

    names = {
        "min_replicas": workers,
        "max_replicas": given["max_replicas"],
        "num_gpus": given["replica_gpus"],
        "num_cpus": given["replica_cpus"],
    }
    placement = Placement.model_validate({n: v for n, v in names.items() if v is not None})
    run_on_ray(worker, server, placement, address=given["ray_address"], say=click.echo)


def read_keys(file: Path | None, variable: str) -> tuple[str, ...]:
    """The keys of a file, one per line, and of an environment variable, with commas or spaces.

    Raises `InvalidRequest` for either without keys, which would let everybody in, `StorageError`
    for a file that cannot be read.
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(
                f"The keys in {file} cannot be read: {getattr(error, 'strerror', None) or error}.",
                "Check its path and permissions.",
            ) from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InvalidRequest(f"There are no keys in {file}.", "Write one per line.")
    text = os.environ.get(variable)
    if text is not None:
        given = list(filter(None, re.split(r"[\s,]+", text)))
        if not given:
            raise InvalidRequest(
                f"{variable} is set, and there are no keys in it.",
                "Write them with commas between them, or unset it.",
            )
        keys += given
    return tuple(dict.fromkeys(keys))
