"""Traces with OpenTelemetry, where it is installed and asked for; otherwise nothing is done."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from starlette.types import Scope

from fastface_trt import __version__
from fastface_trt.errors import MissingDependency, install_hint


class Traced(Protocol):
    """What a span says of a request; see `front.Record`."""

    id: str
    outcome: str
    tasks: int
    seconds: list[Mapping[str, float]]


class Tracing:
    """No traces."""

    @contextmanager
    def request(self, scope: Scope, route: str, record: Traced) -> Iterator[None]:
        """Around a request."""
        yield

    def close(self) -> None:
        """Send what is left."""


class Spans(Tracing):
    """A span per request, child of the client's `traceparent`, with an event per picture.

    Neither prompts nor addresses are in it. `exporter` is one of OpenTelemetry's; without one,
    spans go where OTEL_EXPORTER_OTLP_ENDPOINT says. Raises `MissingDependency`.
    """

    def __init__(self, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise MissingDependency(
                f"Traces need {error.name}.", f"Run {install_hint('telemetry')}"
            ) from None
        resource = Resource.create({"service.name": "fastface-trt", "service.version": __version__})
        # Not the global provider: a process may hold other things that are traced.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(__name__, __version__)

    @contextmanager
    def request(self, scope: Scope, route: str, record: Traced) -> Iterator[None]:
        """Around a request."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        with self._tracer.start_as_current_span(
            f"{scope['method']} {route}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.route": route, "http.request.method": scope["method"]},
            record_exception=False,
        ) as span:
            try:
                yield
            finally:
                span.set_attribute("fastface.request_id", record.id)
                span.set_attribute("fastface.outcome", record.outcome or "ok")
                span.set_attribute("fastface.tasks", record.tasks)
                for seconds in record.seconds:
                    span.add_event("picture", {f"{name}_seconds": s for name, s in seconds.items()})

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
