"""Overload: four times what the server can take, for thousands of requests, each accounted for."""

import asyncio
import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from benchmarks.load.client import Address, Answer, ask, ask_when_due
from benchmarks.load.metrics import Metrics, read_metrics
from benchmarks.load.requests import Picture, bodies, face_file
from fastface_trt.measure.statistics import percentile

GENERATE = "/v1/images/generations"
OUTCOMES = {200: "picture", 429: "busy", 503: "unavailable", 504: "deadline"}
_CLIENTS = 6
"""Clients of the closed loop that finds the capacity: enough for full UNet calls."""
_MEMORY_EVERY = 1.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of server and workers over the last half of a run."""

    samples: int
    median: float
    growth: float
    """Of the fitted line from the beginning of that half to its end."""
    noise: float
    """Twice the standard error of that growth."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of the requests of a run; `seconds` are since each was due."""

    requests: int
    seconds: float
    capacity_per_second: float
    offered_per_second: float
    outcomes: dict[str, int]
    wrong_pictures: int
    repeated_ids: int
    pictures_per_second: float
    picture_seconds_p50: float
    picture_seconds_p99: float
    refusal_seconds_p99: float
    latency_budget: float
    server_tasks: dict[str, int]
    memory: Memory
    problems: list[str] = field(default_factory=list)


async def register_face(address: Address, key: str = "") -> str:
    """Register the face of all requests; its id."""
    body = {"image": base64.b64encode(face_file()).decode()}
    answer = await ask(address, "POST", "/v1/faces", body, key=key)
    if answer.status != 201:
        raise RuntimeError(f"registering a face: {answer.status} {answer.body[:500]!r}")
    return str(answer.json()["id"])


async def measure_capacity(
    address: Address, made: Sequence[Picture], face_id: str, count: int
) -> float:
    """Pictures per second of a closed loop of a few clients."""
    drawn = [body for _, body in bodies(made, face_id, count, np.random.default_rng(0))]
    for body in drawn:
        body.pop("deadline", None)
    waiting = iter(drawn)

    async def client() -> None:
        for body in waiting:
            answer = await ask(address, "POST", GENERATE, body)
            if answer.status != 200:
                raise RuntimeError(f"at low load: {answer.status} {answer.body[:500]!r}")

    started = perf_counter()
    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    return count / (perf_counter() - started)


async def overload(
    address: Address,
    made: Sequence[Picture],
    *,
    requests: int,
    times_capacity: float,
    latency_budget: float,
    seed: int = 1,
) -> LoadReport:
    """Offer `requests` at Poisson arrivals of `times_capacity` the measured capacity."""
    face_id = await register_face(address)
    capacity = await measure_capacity(address, made, face_id, min(requests, 150))
    generator = np.random.default_rng(seed)
    drawn = bodies(made, face_id, requests, generator)
    rate = times_capacity * capacity
    due = np.cumsum(generator.exponential(1 / rate, requests))
    before = await read_metrics(address)
    over = asyncio.Event()
    watching = asyncio.create_task(_watch_memory(address, over))
    started = perf_counter()
    answers = await ask_when_due(address, GENERATE, [body for _, body in drawn], due.tolist())
    seconds = perf_counter() - started
    over.set()
    memory = _memory(await watching, seconds)
    after = await read_metrics(address)
    return _report(
        answers,
        [picture for picture, _ in drawn],
        seconds=seconds,
        capacity=capacity,
        rate=rate,
        latency_budget=latency_budget,
        memory=memory,
        tasks=after.tasks_since(before),
    )


async def _watch_memory(address: Address, over: asyncio.Event) -> list[tuple[float, float]]:
    """Seconds and resident bytes, until the run is over."""
    started, samples = perf_counter(), []
    while not over.is_set():
        metrics: Metrics = await read_metrics(address)
        samples.append((perf_counter() - started, metrics.memory_bytes))
        try:
            await asyncio.wait_for(over.wait(), _MEMORY_EVERY)
        except asyncio.TimeoutError:
            continue
    return samples


def _memory(samples: Sequence[tuple[float, float]], seconds: float) -> Memory:
    late = np.array([sample for sample in samples if sample[0] >= seconds / 2])
    if len(late) < 4:
        return Memory(len(late), float(np.median([s[1] for s in samples])), 0.0, 0.0)
    at, resident = late[:, 0], late[:, 1]
    span = at[-1] - at[0]
    (slope, _), covariance = np.polyfit(at, resident, 1, cov=True)
    noise = 2 * float(np.sqrt(covariance[0, 0]))
    return Memory(len(late), float(np.median(resident)), float(slope * span), noise * span)


def _report(
    answers: Sequence[Answer],
    asked: Sequence[Picture],
    *,
    seconds: float,
    capacity: float,
    rate: float,
    latency_budget: float,
    memory: Memory,
    tasks: dict[str, int],
) -> LoadReport:
    outcomes = Counter(OUTCOMES.get(answer.status, f"status {answer.status}") for answer in answers)
    wrong, problems = 0, []
    for answer, picture in zip(answers, asked, strict=True):
        if answer.status == 200:
            data = answer.json()["data"]
            wrong += len(data) != 1 or not picture.equals(data[0]["b64_json"])
        elif answer.status in (429, 503):
            if "retry-after" not in answer.headers:
                problems.append(f"{answer.status} without Retry-After")
        elif answer.status not in OUTCOMES:
            problems.append(f"{answer.status}: {answer.body[:200]!r}")
    ids = Counter(answer.headers.get("x-request-id", "") for answer in answers if answer.status)
    made = [answer.seconds for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status in (429, 503)]
    return LoadReport(
        requests=len(answers),
        seconds=seconds,
        capacity_per_second=capacity,
        offered_per_second=rate,
        outcomes=dict(outcomes),
        wrong_pictures=wrong,
        repeated_ids=sum(count - 1 for count in ids.values()),
        pictures_per_second=len(made) / seconds,
        picture_seconds_p50=percentile(made, 50) if made else 0.0,
        picture_seconds_p99=percentile(made, 99) if made else 0.0,
        refusal_seconds_p99=percentile(refused, 99) if refused else 0.0,
        latency_budget=latency_budget,
        server_tasks=tasks,
        memory=memory,
        problems=problems[:20],
    )
