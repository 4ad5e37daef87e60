"""Prometheus metrics of one server; what the worker knows is asked for when they are read."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastface_trt.serving.work import State, Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
STAGES = ("queue", "denoise", "decode")


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(
        self, worker: Worker, state: Callable[[], State], faces: Callable[[], int]
    ) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fastface_requests",
            "Requests by route, method and status.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "fastface_request_seconds",
            "From the arrival of a request to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._tasks = Counter(
            "fastface_tasks",
            "Pictures asked of the worker, by how they ended: picture, or the code of an error.",
            ("outcome",),
            registry=self._registry,
        )
        self._stage_seconds = Histogram(
            "fastface_stage_seconds",
            "Seconds of a picture: queue, denoise, decode, and total, their sum.",
            ("stage",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._in_work = Gauge(
            "fastface_requests_in_work", "Requests without their answer.", registry=self._registry
        )
        self._refused = Counter(
            "fastface_refused_before_requests",
            "What was refused before it was a request, by its status, or as a connection too many.",
            ("reason",),
            registry=self._registry,
        )
        self._registry.register(_OfWorker(worker, state, faces))

    def connection_refused(self, reason: str) -> None:
        """A connection was refused: `connection`, or the status it was answered with."""
        self._refused.labels(reason).inc()

    def request_began(self) -> None:
        """A request came in."""
        self._in_work.inc()

    def request_ended(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered, or its client went (status 499)."""
        self._in_work.dec()
        self._requests.labels(route, method, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def task_ended(self, outcome: str) -> None:
        """A task ended."""
        self._tasks.labels(outcome).inc()

    def picture(self, seconds: Mapping[str, float]) -> None:
        """A picture is done, and this is where its time went."""
        for stage in STAGES:
            self._stage_seconds.labels(stage).observe(seconds.get(stage, 0.0))
        self._stage_seconds.labels("total").observe(sum(seconds.get(one, 0.0) for one in STAGES))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _OfWorker(Collector):
    """What `Worker.load` says at the moment of reading."""

    def __init__(
        self, worker: Worker, state: Callable[[], State], faces: Callable[[], int]
    ) -> None:
        self._worker, self._state, self._faces = worker, state, faces

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry would otherwise read the worker to learn the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        load, state = self._worker.load(), self._state()
        for name, text, value in (
            ("fastface_tasks_waiting", "Tasks before their first step.", load.waiting),
            ("fastface_tasks_running", "Tasks between first step and end.", load.running),
            (
                "fastface_backlog_seconds",
                "The worker's estimate until it is done with all of them.",
                load.backlog_seconds,
            ),
            ("fastface_worker_memory_bytes", "Resident memory.", load.memory_bytes),
            (
                "fastface_rows_per_call",
                "Rows of a UNet call, on average since the start.",
                load.rows / load.calls if load.calls else 0.0,
            ),
            ("fastface_registered_faces", "Faces kept in memory.", self._faces()),
        ):
            yield GaugeMetricFamily(name, text, value)
        yield CounterMetricFamily("fastface_unet_calls", "UNet calls.", load.calls)
        yield CounterMetricFamily("fastface_unet_rows", "Rows of all UNet calls.", load.rows)
        states = GaugeMetricFamily("fastface_state", "1 for the state it is in.", labels=["state"])
        for one in State:
            states.add_metric([one.value], float(one is state))
        yield states
