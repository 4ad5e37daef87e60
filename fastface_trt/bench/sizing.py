"""How many pictures a machine makes per second, per hour and for a sum, from measured rates.

A picture's device time is the sum of what `fastface-trt bench` measured: encoding the face and the
prompt, the UNet's steps by their number of branches, and decoding. So the time of any branch plan
follows whose numbers of branches were measured with that preset:

    S = e·fresh + Σ_steps u(branches of the step) / fill + d

with e, u, d in seconds per picture; `fresh` is the share of requests whose face and prompt are new,
`fill` the share of a UNet call's rows that hold work (an engine with fixed profiles computes the
others, too). At utilisation ρ a machine makes ρ/S pictures per second, and with Poisson arrivals
and a constant S a request waits on average

    W = ρ·S / (2·(1 − ρ))

before its turn: the Pollaczek–Khinchine formula of the queue M/D/1 (Kleinrock, Queueing Systems,
volume 1, chapter 5). With one picture after the other that is the wait; where calls are shared,
pictures start earlier and take longer, and it is an estimate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastface_trt.bench.report import BenchReport, BranchPlan, Case
from fastface_trt.errors import InvalidRequest

DECODING = frozenset({"vae_decoder", "picture", "png"})


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per picture of a preset, in calls of `requests` pictures.

    encode: face and prompt, where they are new. steps: one step by its number of branches, UNet and
    guidance. decode: VAE, pixels and PNG. other: what no stage covers, and the noise.
    """

    preset: str
    requests: int
    encode: float
    steps: Mapping[int, float]
    decode: float
    other: float

    @classmethod
    def of(cls, report: BenchReport, preset: str, requests: int) -> "Rates":
        """The rates of `preset` in a report; raises `InvalidRequest` where it lacks a case."""
        fresh = _case(report, preset, "fresh", None)
        cached = _case(report, preset, "cached", requests)
        kept = {stage.name for stage in cached.stages}
        encode = sum(s.seconds.median for s in fresh.stages if s.name not in kept) / fresh.requests
        steps: dict[int, list[float]] = {}
        for stage in cached.stages:
            if stage.step is not None and stage.branches is not None:
                rest = sum(
                    other.seconds.median
                    for other in cached.stages
                    if other.step == stage.step and other.branches is None
                )
                steps.setdefault(stage.branches, []).append(stage.seconds.median + rest)
        decode = sum(s.seconds.median for s in cached.stages if s.name in DECODING)
        other = sum(
            s.seconds.median for s in cached.stages if s.step is None and s.name not in DECODING
        )
        return cls(
            preset=preset,
            requests=requests,
            encode=encode,
            steps={b: sum(of) / len(of) / requests for b, of in steps.items()},
            decode=decode / requests,
            other=other / requests,
        )


@dataclass(frozen=True, slots=True)
class Operation:
    """How a machine is run: see the module. `price` is per hour, in any currency; None for none."""

    utilisation: float = 0.7
    fill: float = 1.0
    fresh: float = 1.0
    price: float | None = None

    def __post_init__(self) -> None:
        for name, value, low in (
            ("utilisation", self.utilisation, 0.0),
            ("fill", self.fill, 0.0),
        ):
            if not low < value <= 1 or (name == "utilisation" and value == 1):
                raise InvalidRequest(
                    f"The {name} is {value}.", "Give a share above 0, such as 0.7 for 70 %."
                )
        if not 0 <= self.fresh <= 1:
            raise InvalidRequest(f"The share of new faces is {self.fresh}.", "Give 0 to 1.")
        if self.price is not None and not self.price >= 0:
            raise InvalidRequest(f"The price is {self.price}.", "Give money per hour.")


@dataclass(frozen=True, slots=True)
class Size:
    """A row of the table: one branch plan of one preset. Times are seconds per picture."""

    preset: str
    plan: str
    unet_samples: int
    requests: int
    encode: float
    denoise: float
    decode: float
    pictures_per_second: float
    pictures_per_hour: float
    wait: float
    cost_per_thousand: float | None

    @property
    def seconds(self) -> float:
        """Device time of a picture."""
        return self.encode + self.denoise + self.decode


def mean_wait(service: float, utilisation: float) -> float:
    """Mean seconds before its turn in the queue M/D/1 with service time `service`."""
    return utilisation * service / (2 * (1 - utilisation))


def sizes(report: BenchReport, operation: Operation) -> Iterator[Size]:
    """Every branch plan of every measured preset and number of requests per call.

    Plans that evaluate the same branches stand once, and those with numbers of branches that were
    not measured with their preset are left out.
    """
    for preset in report.work.presets:
        cases = [c for c in report.cases if (c.preset, c.concurrency) == (preset, 1)]
        for requests in sorted({c.requests for c in cases if c.features == "cached"}):
            rates = Rates.of(report, preset, requests)
            seen: set[tuple[tuple[str, ...], ...]] = set()
            for plan in sorted(report.branch_plans, key=lambda one: one.plan != report.work.plan):
                counts = {len(step) for step in plan.branches}
                if (
                    plan.preset == preset
                    and plan.branches not in seen
                    and counts <= set(rates.steps)
                ):
                    seen.add(plan.branches)
                    yield _size(rates, plan, operation)


def _size(rates: Rates, plan: BranchPlan, operation: Operation) -> Size:
    encode = operation.fresh * rates.encode + rates.other
    denoise = sum(rates.steps[len(step)] for step in plan.branches) / operation.fill
    service = encode + denoise + rates.decode
    per_hour = 3600 * operation.utilisation / service
    return Size(
        preset=rates.preset,
        plan=plan.plan,
        unet_samples=plan.unet_samples,
        requests=rates.requests,
        encode=encode,
        denoise=denoise,
        decode=rates.decode,
        pictures_per_second=1 / service,
        pictures_per_hour=per_hour,
        wait=mean_wait(service, operation.utilisation),
        cost_per_thousand=None if operation.price is None else 1000 * operation.price / per_hour,
    )


def _case(report: BenchReport, preset: str, features: str, requests: int | None) -> Case:
    for case in report.cases:
        if (case.preset, case.features, case.concurrency) == (preset, features, 1) and (
            requests in (None, case.requests)
        ):
            return case
    raise InvalidRequest(
        f"The report has no {features} case of {preset}.", "Run fastface-trt bench again."
    )


def machine_names(report: BenchReport) -> tuple[str, str]:
    """What did the work, the GPU or the processor with its cores, and what its hours are called."""
    gpu = report.environment.start.gpu
    if gpu is not None and report.environment.backend != "onnxruntime":
        return gpu.name, "GPU-hour"
    machine = report.environment.machine
    name = f"{machine.get('processor', 'unknown processor')}, {machine.get('cores', '?')} cores"
    return name, "machine-hour"


def markdown(report: BenchReport, operation: Operation) -> str:
    """The table, with what it rests on above it."""
    work = report.work
    machine, hour = machine_names(report)
    priced = operation.price is not None
    headings = [
        "preset",
        "branch plan",
        "UNet samples",
        "pictures per call",
        "encode, ms",
        "denoise, ms",
        "decode, ms",
        "pictures/s at 100 %",
        f"pictures per {hour} at {operation.utilisation:.0%}",
        "mean wait, ms",
    ] + ["cost per 1000"] * priced
    lines = [
        f"{work.checkpoint}, {work.width}×{work.height}, {work.steps} steps, "
        f"{report.environment.backend}, {machine}. Fill {operation.fill:.0%}, "
        f"{operation.fresh:.0%} of requests with a new face and prompt.",
        "",
        _row(headings),
        _row(["---"] * 2 + ["---:"] * (len(headings) - 2)),
    ]
    for size in sizes(report, operation):
        cells = [size.preset, size.plan, str(size.unet_samples), str(size.requests)]
        cells += [f"{1000 * value:.1f}" for value in (size.encode, size.denoise, size.decode)]
        cells += [f"{size.pictures_per_second:.2f}", f"{size.pictures_per_hour:,.0f}"]
        cells += [f"{1000 * size.wait:.0f}"]
        if size.cost_per_thousand is not None:
            cells.append(f"{size.cost_per_thousand:.3g}")
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
