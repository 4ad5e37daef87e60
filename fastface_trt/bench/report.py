"""What a latency benchmark reports: `bench.json`, and the schema that is published for it.

All times are in seconds, all sizes in bytes. Every sample that was taken is in the file, so that
another program can draw other conclusions from it.
"""

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field

from fastface_trt.engines.manifest import Strict
from fastface_trt.measure import statistics
from fastface_trt.measure.machine import Environment

BENCH_FILE: Final = "bench.json"

Features = Literal["fresh", "cached"]
"""fresh: the face is found in its picture, and face and prompts are encoded, on every call. cached:
the face was analysed before and all encodings are kept, as for a person's second picture."""


class Distribution(Strict):
    """Samples in the order in which they were taken, and what they say.

    Percentiles are interpolated linearly. `median_interval` is a 95 % bootstrap interval.
    `outliers` are places in `samples` outside Tukey's fences; nothing leaves them out.
    """

    samples: tuple[float, ...] = Field(min_length=1)
    n: int = Field(ge=1)
    minimum: float
    median: float
    median_interval: tuple[float, float]
    p90: float
    p95: float
    p99: float
    maximum: float
    outliers: tuple[int, ...] = ()

    @classmethod
    def of(cls, samples: statistics.Samples) -> "Distribution":
        """Summarise at least one sample."""
        values = tuple(float(value) for value in samples)
        return cls(
            samples=values,
            n=len(values),
            minimum=min(values),
            median=statistics.percentile(values, 50),
            median_interval=statistics.median_interval(values),
            p90=statistics.percentile(values, 90),
            p95=statistics.percentile(values, 95),
            p99=statistics.percentile(values, 99),
            maximum=max(values),
            outliers=statistics.outliers(values),
        )


class Stage(Strict):
    """A stage of a call; `seconds` has one sample per call, the sum over its `calls`.

    step counts from 0 and is None outside the denoising loop; branches and rows are those of the
    UNet in that step. The stage `other` is what no stage covers.
    """

    name: str
    step: int | None = None
    branches: int | None = None
    rows: int | None = None
    calls: int = Field(ge=1)
    seconds: Distribution

    @property
    def label(self) -> str:
        """What tables and plots call it; steps are counted from 1 there."""
        if self.step is None:
            return self.name
        plural = "" if self.branches == 1 else "es"
        branches = f", {self.branches} branch{plural}" if self.branches else ""
        return f"{self.name} {self.step + 1}{branches}"


class Throughput(Strict):
    """Pictures of all threads over the wall-clock time from their common start to the last end."""

    pictures: int
    wall_seconds: float
    pictures_per_second: float


class Case(Strict):
    """One way to call the pipeline, measured.

    requests: pictures per call. concurrency: threads that call one `FastFace`. seconds: from the
    call to the bytes of the last PNG. unet_samples: UNet rows per call.
    """

    preset: str
    features: Features
    requests: int = Field(ge=1)
    concurrency: int = Field(ge=1)
    warm_up: int = Field(ge=0)
    unet_samples: int
    seconds: Distribution
    stages: tuple[Stage, ...]
    throughput: Throughput

    @property
    def label(self) -> str:
        """One line that tells this case from the others."""
        many = [f"{self.requests} requests"] if self.requests > 1 else []
        many += [f"{self.concurrency} threads"] if self.concurrency > 1 else []
        return ", ".join([self.preset, self.features, *many])


class PairedRatio(Strict):
    """How many times as long one case takes as another that was measured in turns with it.

    ratio: median over the rounds of (time of `case` / time of `over` in the same round), so that
    what slowed both down cancels; `interval` is its 95 % bootstrap interval.
    """

    case: str
    over: str
    ratio: float
    interval: tuple[float, float]


class ColdStart(Strict):
    """Fresh processes, each making one picture; the system may still hold their files in memory.

    to_first_picture: from starting the process to the first picture on the disk, which is the sum
    of imports (interpreter and packages), load (engines and face models opened), picture and write.
    peak_host_bytes: the most resident memory of such a process.
    """

    to_first_picture: Distribution
    imports: Distribution
    load: Distribution
    picture: Distribution
    write: Distribution
    peak_host_bytes: int


class BranchPlan(Strict):
    """Branches that a preset evaluates per step under a branch plan."""

    preset: str
    plan: Literal["exact", "full", "lean"]
    branches: tuple[tuple[str, ...], ...]
    unet_samples: int


class EngineFacts(Strict):
    """A built engine: its key in the cache, its files' bytes, and how long its build took."""

    module: str
    key: str
    bytes: int
    build_seconds: float


class Work(Strict):
    """What was asked for: two reports with equal `work` did the same."""

    checkpoint: str
    adapter: str
    precision: str
    random_weights: bool
    scheduler: str
    width: int
    height: int
    steps: int
    plan: Literal["exact", "full", "lean"]
    presets: tuple[str, ...]


class Memory(Strict):
    """The most resident memory of the measuring process, and what it holds of the GPU's."""

    host_peak_bytes: int
    device_bytes: int | None


class RooflineStage(Strict):
    """A stage against the least time in which the machine could do its work."""

    stage: str
    flops: float
    bytes: float
    floor_seconds: float
    achieved_seconds: float


class RooflineReport(Strict):
    """Stages of one case (its label, and its n calls) against the measured rates of its machine."""

    case: str
    n: int
    stages: tuple[RooflineStage, ...]
    matmul_flops_per_second: float
    copy_bytes_per_second: float


class BenchReport(Strict):
    """A latency benchmark, as `bench.json` holds it. `notes` says what to doubt, in sentences."""

    schema_version: Literal[1] = 1
    date: str
    work: Work
    environment: Environment
    cold_start: ColdStart | None
    cases: tuple[Case, ...] = Field(min_length=1)
    ratios: tuple[PairedRatio, ...] = ()
    branch_plans: tuple[BranchPlan, ...]
    engines: tuple[EngineFacts, ...]
    memory: Memory
    notes: tuple[str, ...] = ()
    roofline: RooflineReport | None = None


def make_roofline(
    case: Case,
    counted: Mapping[str, tuple[float, float, float]],
    *,
    matmul_flops_per_second: float,
    copy_bytes_per_second: float,
) -> RooflineReport:
    """Put what was counted beside what was measured.

    `counted` maps labels of the case's stages (`Stage.label`) to operations, bytes moved and floor
    in seconds, all per call; stages that were not counted are left out. The rates are of the
    machine that measured the case. `report.model_copy(update={"roofline": …})` takes the result.
    """
    return RooflineReport(
        case=case.label,
        n=case.seconds.n,
        stages=tuple(
            RooflineStage(
                stage=stage.label,
                flops=counted[stage.label][0],
                bytes=counted[stage.label][1],
                floor_seconds=counted[stage.label][2],
                achieved_seconds=stage.seconds.median,
            )
            for stage in case.stages
            if stage.label in counted
        ),
        matmul_flops_per_second=matmul_flops_per_second,
        copy_bytes_per_second=copy_bytes_per_second,
    )


def schema() -> dict[str, Any]:
    """The JSON schema of `bench.json`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **BenchReport.model_json_schema(),
    }


def schema_text() -> str:
    """`schema` as the repository keeps it."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
