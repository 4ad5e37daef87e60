"""A task inside the batcher: how far it is, what it will need, and whether it comes in time."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import inf

from fastface_trt.engines.contract import TEXT_POSITIONS
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import Cancelled, DeadlinePassed, FastFaceError
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import Sample, shares_statistics
from fastface_trt.serving.batching.cost import CostModel, Remaining
from fastface_trt.serving.batching.policy import Candidate, Policy
from fastface_trt.serving.work import OnEvent, Task


@dataclass(slots=True, eq=False)
class Entry:
    """A task from `submit` to its last event. Times are in seconds of the batcher's clock.

    `refused` is what is wrong with the request, where something is: it has no demand then.
    """

    order: int
    task: Task
    on_event: OnEvent
    request: GenerationRequest
    submitted: float
    demand: "Demand | None" = None
    refused: FastFaceError | None = None
    sample: Sample | None = None
    warnings: tuple[str, ...] = ()
    passed_over: int = 0
    cancelled: bool = False
    called: float | None = None
    denoised: float | None = None

    def ending(self, now: float) -> FastFaceError | None:
        """Why it must go no further, or None."""
        if self.refused is not None:
            return self.refused
        if self.cancelled:
            return Cancelled("The task was cancelled.")
        if self.task.deadline is not None and now >= self.task.deadline:
            return DeadlinePassed(
                "The picture was not done by its deadline.",
                "Allow more time, or try when there is less to do.",
            )
        return None

    @property
    def finished(self) -> bool:
        """Whether only decoding is left."""
        return self.sample is not None and self.sample.finished

    def candidate(self, latency_budget: float = inf) -> Candidate:
        """What the policy wants to know; not for one that is refused or finished.

        A task that is allowed so many seconds since it came has a deadline that only the order of
        the calls knows of.
        """
        assert self.demand is not None
        step = 0 if self.sample is None else self.sample.step
        return Candidate(
            self.order,
            self.demand.sharing(step),
            self.demand.rows[step],
            self.demand.area,
            self.sample is not None,
            len(self.demand.rows) - step,
            self.passed_over,
            min(
                inf if self.task.deadline is None else self.task.deadline,
                self.submitted + latency_budget,
            ),
            not self.demand.shares_statistics,
        )

    def remaining(self) -> Remaining | None:
        """What is left to do; None for one that is refused. For any thread."""
        sample = self.sample
        if self.demand is None:
            return None
        step = 0 if sample is None else sample.step
        return Remaining(self.demand.rows[step:], self.demand.area, sample is None)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request will need of the UNet, known before anything of it is encoded.

    rows: of each step. latent_shape: (C, h, w). text_positions: see `Sample.text_positions`.
    """

    rows: tuple[int, ...]
    latent_shape: tuple[int, int, int]
    shares_statistics: bool
    text_positions: int

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        manifest: ExportManifest,
        text_positions: int = TEXT_POSITIONS,
    ) -> "Demand":
        """The demand of a request to an export."""
        return cls(
            tuple(len(step.branches) for step in request.guidance_steps()),
            manifest.latent_shape(request.height, request.width),
            shares_statistics(request),
            text_positions,
        )

    @property
    def area(self) -> int:
        """Latent pixels of one row."""
        return self.latent_shape[1] * self.latent_shape[2]

    def sharing(self, step: int) -> Hashable:
        """What `Sample.sharing` will be before that step, counted from 0."""
        return self.rows[step], self.latent_shape, self.shares_statistics, self.text_positions


class LatencyBudget:
    """Estimates against the seconds that a task may take from `submit` on; None allows any time.

    It is asked when a task comes and once more before it begins: an estimate may turn out wrong,
    because the machine became slower or others took more than was measured. Whoever would be late
    then is refused before work goes into the picture, which brings those behind back into time.
    """

    def __init__(self, seconds: float | None, cost: CostModel, clock: Callable[[], float]) -> None:
        self.seconds = inf if seconds is None else seconds
        self._cost = cost
        self._clock = clock

    def late_by(self, entry: Entry, ahead: Sequence[Entry], policy: Policy) -> float:
        """Seconds that a task would come too late behind `ahead`; 0 or less for in time."""
        own = entry.remaining()
        if self.seconds == inf or own is None:
            return -inf
        expected = self._cost.seconds_behind(
            own, remaining(ahead), policy.full_rows, company=policy.max_running
        )
        return self._clock() - entry.submitted + expected - self.seconds


def remaining(entries: Sequence[Entry]) -> list[Remaining]:
    """What is left to do for all of them."""
    return [left for entry in entries if (left := entry.remaining()) is not None]
