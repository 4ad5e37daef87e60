"""A task inside the batcher: how far it is, what it will need, and whether it comes in time."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import inf

from fastface_trt.engines.contract import TEXT_POSITIONS
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import Cancelled, DeadlinePassed, FastFaceError, InvalidRequest, naming
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import Sample, shares_statistics
from fastface_trt.serving.batching.cost import CostModel, Remaining
from fastface_trt.serving.batching.policy import Candidate, Policy
from fastface_trt.serving.work import OnEvent, Task


@dataclass(slots=True, eq=False)
class Entry:
    """A task from `submit` to its last event. Times are in seconds of the batcher's clock.

    `price` are the seconds that it takes by itself, as far as was known when it came. `alone` keeps
    others out of its calls. `refused` is why it must go no further, where there is a reason.
    """

    order: int
    task: Task
    on_event: OnEvent
    request: GenerationRequest
    submitted: float
    demand: "Demand"
    price: float = 0.0
    alone: bool = False
    refused: FastFaceError | None = None
    sample: Sample | None = None
    warnings: tuple[str, ...] = ()
    passed_over: int = 0
    called: float | None = None
    denoised: float | None = None

    @property
    def owner(self) -> str:
        """Who asks for it."""
        return self.task.owner

    def cancel(self) -> None:
        """Let it go no further."""
        self.refused = Cancelled("The task was cancelled.")

    def ending(self, now: float, cost: CostModel) -> FastFaceError | None:
        """Why it must go no further, or None."""
        if self.refused is not None:
            return self.refused
        deadline = self.task.deadline
        if deadline is None or now + self.price < deadline:
            return None
        # Half of what is left, since the machine may have become faster: a task that was let in
        # is only ended where there is no hope.
        if now + cost.seconds_alone(self.remaining()) / 2 >= deadline:
            return DeadlinePassed(
                "The picture was not done by its deadline.",
                "Allow more time, or try when there is less to do.",
            )
        return None

    @property
    def finished(self) -> bool:
        """Whether only decoding is left."""
        return self.sample is not None and self.sample.finished

    @property
    def step(self) -> int:
        """How many of its steps are done."""
        return 0 if self.sample is None else self.sample.step

    def candidate(self, latency_budget: float = inf) -> Candidate:
        """What the policy wants to know; not for one that is finished.

        A task that is allowed so many seconds since it came has a deadline that only the order of
        the calls knows of.
        """
        step = self.step
        return Candidate(
            self.order,
            (self.order,) if self.alone else self.demand.sharing(step),
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
            self.owner,
        )

    def remaining(self) -> Remaining:
        """What is left to do. For any thread."""
        # The sample first: it may get one meanwhile, and never loses it.
        sample = self.sample
        return Remaining(self.demand.rows[self.step :], self.demand.area, sample is None)


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
        if self.seconds == inf:
            return -inf
        of_owner: dict[str, list[Remaining]] = defaultdict(list)
        for other in ahead:
            of_owner[other.owner].append(other.remaining())
        own = of_owner.pop(entry.owner, [])
        expected = self._cost.seconds_behind(
            entry.remaining(),
            own,
            policy.full_rows,
            company=policy.max_running,
            others=of_owner.values(),
        )
        return self._clock() - entry.submitted + expected - self.seconds


OUTPUT_TIMES = 4
"""Pixels of a picture over those of the export's own size, where the settings do not say more."""


def check_output(
    request: GenerationRequest, manifest: ExportManifest, max_pixels: int | None
) -> None:
    """Raise `InvalidRequest` for a picture with more pixels than may be asked for."""
    most = max_pixels or OUTPUT_TIMES * manifest.width * manifest.height
    if request.width * request.height > most:
        with naming("size"):
            raise InvalidRequest(
                f"The size {request.width}x{request.height} has more than the {most:,} pixels "
                "that may be asked for here.",
                f"The model's own size is {manifest.width}x{manifest.height}.",
            )


def check_price(seconds: float, allowed: float) -> None:
    """Raise `InvalidRequest` where a picture by itself takes more seconds than it may."""
    if seconds > allowed:
        raise InvalidRequest(
            f"This picture would take about {seconds:.0f} s by itself, and one may take "
            f"{allowed:g} s here.",
            "Ask for fewer steps, a smaller picture, or fewer branches.",
        )


def check_deadline(entry: Entry, now: float) -> None:
    """Raise `DeadlinePassed` where a picture would be late even if nobody else were there."""
    deadline = entry.task.deadline
    if deadline is not None and now + entry.price >= deadline:
        raise DeadlinePassed(
            f"This picture takes about {entry.price:.2g} s by itself, and its deadline is in "
            f"{max(0.0, deadline - now):.2g} s.",
            "Allow more time, or ask for fewer steps or a smaller picture.",
        )
