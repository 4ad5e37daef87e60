"""Every limit of the server in one place, with the reason for each."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fastface_trt.errors import InvalidRequest

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
MIN_KEY_LENGTH = 8
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:,*]+)(:[0-9]{1,5})?")


class Settings(BaseModel):
    """Base of the settings: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkerSettings(Settings):
    """What a worker opens, and how much it takes on. See `FastFace.load` for the first five."""

    export: str = "mini"
    backend: str = "onnxruntime"
    cache: Path | None = None
    threads: int | None = None
    engine_options: dict[str, Any] | None = None
    licence_acknowledged: bool = False
    schedule_of: str | None = None
    max_output_pixels: Count | None = None
    """Of a picture that is made; None is four times as many as the export's own size has. Larger
    ones take time and memory that nobody measured, in calls that cannot be interrupted."""
    max_request_seconds: Seconds = 600
    """A picture that by itself takes longer, as far as calls were measured, is refused at once."""
    max_waiting: Count = 64
    """Tasks that wait for their first step, shared out between the owners who are there; the next
    is refused, since its client would wait long and a queue without end only hides that the machine
    is too small. One owner alone leaves an eighth free, and where the queue is full whoever has
    less than a share takes the newest place of the one who has most."""
    max_running: Count = 8
    """Tasks between their first step and their end; each holds latents and conditions in memory.
    Where one owner has them all, others begin as many more as their shares are."""
    max_rows: int | None = None
    """Rows of one UNet call at most; None is what the engines take."""
    latency_budget: Seconds | None = None
    """A task that would not be done within this time, as far as the measured rates tell, is refused
    at the door: better there than late. None refuses only by `max_waiting`."""
    max_passed_over: Annotated[int, Field(ge=0)] = 4
    """How many UNet calls in a row may pass over a task that is ready for one, for the sake of a
    fuller call."""
    stall_seconds: Seconds = 300
    """A worker process that is in one call of its engines for this long, or says nothing for this
    long, is killed and started again."""


class ServerSettings(Settings):
    """The HTTP surface and what it lets in."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[str, ...] = ()
    """Keys of clients; none lets everybody in, which is refused on an address that is not local."""
    metrics_keys: tuple[str, ...] = ()
    """Keys of whoever reads /metrics, sent as clients send theirs; none shows it to everybody."""
    requests_per_minute: Count | None = None
    """Per key, or per address where there are no keys."""
    max_body_bytes: Count = 20_000_000
    max_picture_pixels: Count = 40_000_000
    max_pictures: Count = 4
    """`n` of one request at most."""
    max_requests: Count = 512
    """Requests in work at once, whatever they ask for; beyond it new ones get 503. Of these, of
    bodies and of faces a client may hold three times what is free, and gets 429 beyond: alone three
    quarters, less as others come, never all."""
    max_bodies: Count = 256
    """Bodies that are being read, or whose pictures are not decoded yet. Each may take
    `body_timeout`, and holds no place among the requests in work meanwhile."""
    max_body_memory: Count = 256_000_000
    """Bytes of these bodies together, as far as they came, and `max_body_bytes` for a picture that
    is fetched; two of those fit in any case."""
    body_timeout: Seconds = 20
    """A client that needs longer to send its headers and body is cut off (slow loris)."""
    write_timeout: Seconds = 60
    """A client that in this time does not take what was written is cut off: until then an answer of
    some megabytes stays in memory."""
    max_connections: Count = 800
    """Open connections; above it new ones are dropped. Below the usual limit of 1024 files."""
    max_connections_per_address: Count | None = 200
    """Of one client, so that one alone cannot hold them all, and as many opened in a second. Behind
    a proxy all clients have its address: None there, and the limit in the proxy."""
    default_deadline: Seconds = 120
    max_deadline: Seconds = 600
    allow_origins: tuple[str, ...] = ()
    """Origins (`https://example.com:8443`) whose pages may call the server from a browser, or `*`;
    none sends no CORS headers. Raises `InvalidRequest` for what is no origin."""
    model_names: tuple[str, ...] = ()
    """Further names that clients may ask for as `model`, whose own cannot be changed."""
    heif: bool = False
    """Whether HEIC and AVIF pictures are read: their decoders see whole files of strangers."""
    fetch_urls: bool = False
    """Whether pictures may be given by address; see `pictures.fetch` for what is checked then."""
    faces_ttl: Seconds = 3600
    """Registered faces are forgotten after this time, and when the server stops."""
    max_faces: Count = 1000
    drain_seconds: Seconds = 30
    """After SIGTERM, how long tasks may go on before they are ended."""
    log_prompts: bool = False
    telemetry: bool = False
    """OpenTelemetry's traces, sent where OTEL_EXPORTER_OTLP_ENDPOINT says."""
    ui: bool = False
    ai_mark: bool = True
    """The machine-readable AI mark in every picture."""
    c2pa_certificate: Path | None = None
    c2pa_key: Path | None = None
    checks: tuple[str, ...] = ()
    """`package.module:name` of prompt and picture checks; see `pictures.checks`."""

    @field_validator("api_keys", "metrics_keys")
    @classmethod
    def _are_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            if len(key) < MIN_KEY_LENGTH or not re.fullmatch("[!-~]+", key):
                raise InvalidRequest(
                    "A key is too short, or has characters that a header cannot carry.",
                    f"Take {MIN_KEY_LENGTH} letters and digits or more: openssl rand -hex 24.",
                )
        return keys

    @field_validator("allow_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        # As browsers send them: lower case, no slash behind; that of a file is "null".
        written = tuple(one.strip().lower().removesuffix("/") for one in origins)
        for one, given in zip(written, origins, strict=True):
            if one not in ("*", "null") and not _ORIGIN.fullmatch(one):
                raise InvalidRequest(
                    f"{given!r:.80} is no origin of a web page.",
                    "Write SCHEME://HOST[:PORT] without a path, or *.",
                )
        return written
