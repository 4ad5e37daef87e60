"""The engine thread: it owns every call of the engines and tells every event.

One thread for both, so that a task's events come in order and its last one once, whatever is
cancelled, late or closed meanwhile. As long as there are tasks, it

1. ends those that are cancelled, late or refused;
2. decodes one finished picture of the owner whose turn it is, if there is one;
3. otherwise prepares the tasks that the policy begins, and makes one UNet call.

Decoding goes before UNet calls: it is the shortest way to a picture in somebody's hands, and it
frees the room that a waiting task needs, so that the next call is fuller. It cannot starve the
steps, since between two UNet calls no more is decoded than the first one finished.

Each owner is charged the seconds that were measured: of a call its rows' part. A call cannot be
interrupted, so a task may end while it runs; what the call made of it is dropped then, and it is
not tried again.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import Busy, FastFaceError, OutOfMemory, Unavailable
from fastface_trt.runtime.face import CROP_SIZE, EMBEDDING_SIZE, PORTRAIT_SIZE, Face
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import Sample
from fastface_trt.serving.batching.cost import CostModel, Remaining
from fastface_trt.serving.batching.entry import Demand, Entry, LatencyBudget
from fastface_trt.serving.batching.fairness import Turns
from fastface_trt.serving.batching.measured_stages import (
    EnginesLost,
    MeasuredStages,
    for_client,
    latent_area,
)
from fastface_trt.serving.batching.policy import Choice, Policy
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import Event, PictureDone, Pixels, State, StepDone, TaskFailed

_log = logging.getLogger(__name__)

Preview = Callable[[NDArray[np.float32]], Pixels]
"""Latents [C,h,w] to a small RGB picture, uint8 [H,W,3]."""

Clock = Callable[[], float]
"""Seconds, never going back."""

Admit = Callable[[Sequence[Entry]], None]
"""Raises where a new task must not come behind these; may refuse others in its favour."""

OnCall = Callable[[Sequence[str] | None], None]
"""Told the ids of the tasks that the engines begin to work on, which are none where they are put to
the test, and None when they are done."""

OnDead = Callable[[FastFaceError], None]
"""Told that the engines failed for good, before any task ends for it."""


@dataclass(slots=True)
class Tally:
    """UNet calls and the rows in them; written by the engine thread."""

    calls: int = 0
    rows: int = 0


class EngineLoop:
    """What the engine thread does from the first engine to the last event."""

    def __init__(
        self,
        fastface: FastFace,
        settings: WorkerSettings,
        table: "TaskTable",
        cost: CostModel,
        budget: LatencyBudget,
        preview: Preview | None,
        clock: Clock,
        on_call: OnCall | None = None,
        on_dead: OnDead | None = None,
    ) -> None:
        self.tally = Tally()
        self._turns = Turns()
        self._on_call = on_call or (lambda ids: None)
        self._on_dead = on_dead or (lambda error: None)
        self._fastface = fastface
        self._settings = settings
        self._table = table
        self._cost = cost
        self._budget = budget
        self._stages = MeasuredStages(fastface, cost)
        self._preview = preview
        self._clock = clock
        self._policy = Policy(settings.max_running, settings.max_passed_over)

    @property
    def policy(self) -> Policy:
        """Who goes into a call; with the engines' limits once they are open."""
        return self._policy

    def run(self) -> None:
        """The body of the thread; returns when the table is closed or the engines are dead."""
        try:
            self._start()
            while entries := self._table.wait_for_work():
                self._round(entries)
        except Exception as error:
            # What a user can fix has a sentence; only a surprise needs a traceback.
            surprise = not isinstance(error, (FastFaceError, EnginesLost))
            _log.critical("The engines failed for good: %s", error, exc_info=surprise)
            self._on_dead(for_client(error))
            self._table.dead(for_client(error))
        finally:
            for entry in self._table.entries():
                self._fail(entry, Unavailable("The worker stopped.", "Try again later."))

    def _start(self) -> None:
        self._fastface.warm_up()
        self._policy = Policy(
            self._settings.max_running,
            self._settings.max_passed_over,
            self._fastface.stages.request_counts,
            self._settings.max_rows,
            call_seconds=self._cost.call_seconds,
        )
        self._policy = warm_up(self._fastface, self._stages, self._policy, self._cost)
        ordinary = Demand.of(_request(self._fastface, _GUIDED), self._fastface.manifest)
        self._turns.credit = self._cost.seconds_alone(Remaining(ordinary.rows, ordinary.area))
        self._table.ready()

    def _round(self, entries: Sequence[Entry]) -> None:
        alive = [entry for entry in entries if not self._ended(entry)]
        started = perf_counter()
        claims = self._turns.claims({entry.owner for entry in alive}, self._clock())
        finished = min(
            (entry for entry in alive if entry.finished),
            key=lambda entry: (claims[entry.owner], entry.order),
            default=None,
        )
        candidates = [e.candidate(self._budget.seconds) for e in alive if not e.finished]
        choice = self._policy.choose(candidates, claims)
        if finished is not None and not (
            choice.go and claims[choice.go[0].owner] < claims[finished.owner]
        ):
            expected = self._decode(finished)
        else:
            expected = self._call(alive, choice)
        self._cost.observe_round(expected, perf_counter() - started)

    def _ended(self, entry: Entry) -> bool:
        error = entry.ending(self._clock(), self._cost)
        if error is not None:
            self._fail(entry, error)
        return error is not None

    @contextmanager
    def _working_on(self, *entries: Entry) -> Iterator[None]:
        """The engines work on these tasks, whose owners are charged by their rows."""
        rows = [entry.demand.rows[entry.step] if not entry.finished else 1 for entry in entries]
        self._on_call([entry.task.id for entry in entries])
        started, lost = perf_counter(), False
        try:
            yield
        except EnginesLost:
            lost = True
            raise
        finally:
            if not lost:  # or it must stay known on whom they worked
                self._on_call(None)
                seconds = perf_counter() - started
                for entry, count in zip(entries, rows, strict=True):
                    self._turns.charge(entry.owner, seconds * count / sum(rows))

    def _call(self, entries: Sequence[Entry], choice: Choice) -> float:
        """One UNet call; the seconds that it was expected to take."""
        by_order = {entry.order: entry for entry in entries}
        running = [entry for entry in entries if entry.sample is not None]
        going, expected = [], 0.0
        for entry in (by_order[one.order] for one in choice.go):
            if entry.sample is None:
                if not self._in_time(entry, running) or not self._prepared(entry):
                    continue
                expected += self._cost.preparation_seconds()
            going.append(entry)
        if not going:
            return expected
        for one in choice.passed_over:
            by_order[one.order].passed_over += 1
        now = self._clock()
        for entry in going:
            entry.passed_over = 0
            entry.called = now if entry.called is None else entry.called
        samples = [entry.sample for entry in going if entry.sample is not None]
        expected += sum(self._expected_seconds(sample) for sample in samples)
        rows = sum(len(sample.guidance.branches) for sample in samples)
        with self._working_on(*going):
            stepped = self._stages.step(samples, lambda index: self._wanted(going[index]))
        if stepped.out_of_memory:
            self._policy = self._policy.with_fewer_rows(rows)
            _log.warning("UNet calls have %d rows at most now.", self._policy.max_rows)
        self.tally.calls, self.tally.rows = self.tally.calls + 1, self.tally.rows + rows
        for entry, error in zip(going, stepped.errors, strict=True):
            if error is None:
                self._stepped(entry)
            else:
                self._fail(entry, entry.refused or error)
        self._test_suspect_engines()
        return expected

    def _wanted(self, entry: Entry) -> bool:
        """Whether a task whose call failed is tried again."""
        entry.refused = entry.ending(self._clock(), self._cost)
        return entry.refused is None

    def _expected_seconds(self, sample: Sample) -> float:
        rows = len(sample.guidance.branches)
        full = self._policy.full_rows(rows, not sample.shares_statistics)
        return self._cost.step_seconds(latent_area(sample), rows, full)

    def _in_time(self, entry: Entry, running: Sequence[Entry]) -> bool:
        late = self._budget.late_by(entry, running, self._policy)
        if late > 0:
            message = "The picture waited longer than was expected, and would come too late."
            self._fail(entry, Busy(message, "Try again later.", retry_after=late))
        return late <= 0

    def _prepared(self, entry: Entry) -> bool:
        try:
            with self._working_on(entry):
                entry.sample, entry.warnings = self._stages.prepare(entry.task, entry.request)
        except FastFaceError as error:
            self._fail(entry, error)
            self._test_suspect_engines()
            return False
        return True

    def _stepped(self, entry: Entry) -> None:
        sample = entry.sample
        assert sample is not None
        if sample.finished:
            entry.denoised = self._clock()
        preview = None
        if entry.task.previews and self._preview is not None:
            try:
                preview = self._preview(self._stages.download(sample.latents))
            except Exception:
                _log.exception("A preview failed; the picture goes on without it.")
        self._send(entry, StepDone(entry.task.id, sample.step, len(sample.schedule), preview))

    def _decode(self, entry: Entry) -> float:
        """Decode a finished picture; the seconds that it was expected to take."""
        assert entry.sample is not None
        assert entry.called is not None
        assert entry.denoised is not None
        expected = self._cost.decoding_seconds(latent_area(entry.sample))
        try:
            with self._working_on(entry):
                pixels = self._stages.decode(entry.sample)
        except FastFaceError as error:
            self._fail(entry, error)
            self._test_suspect_engines()
            return expected
        seconds = {
            "queue": entry.called - entry.submitted,
            "denoise": entry.denoised - entry.called,
            "decode": self._clock() - entry.denoised,
        }
        parameters = self._fastface.parameters(entry.request)
        done = PictureDone(entry.task.id, pixels, parameters, entry.warnings, seconds)
        self._end(entry, done)
        return expected

    def _test_suspect_engines(self) -> None:
        """Raise what a picture of nobody fails with, once too much failed to be the requests."""
        if self._stages.suspect:
            _log.error("Too many failures in a row: the engines are put to the test.")
            self._on_call(())
            self_test(self._fastface, self._stages)
            self._on_call(None)

    def _fail(self, entry: Entry, error: FastFaceError) -> None:
        self._end(entry, TaskFailed(entry.task.id, error))

    def _end(self, entry: Entry, event: Event) -> None:
        self._send(entry, event)
        self._table.remove(entry)

    def _send(self, entry: Entry, event: Event) -> None:
        try:
            entry.on_event(event)
        except Exception:
            _log.exception("Telling the events of a task failed.")


class TaskTable:
    """The tasks of a batcher, in the order in which they came, and its state; threads may share it.

    Only the engine thread removes tasks, after it told their last event, so `drain` returns when
    everybody was told.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._state = State.STARTING
        self._failure: FastFaceError | None = None
        self._closing = False

    @property
    def state(self) -> State:
        """How the batcher is."""
        return self._state

    def entries(self) -> list[Entry]:
        """Every task that has not ended."""
        with self._changed:
            return list(self._entries.values())

    def add(self, entry: Entry, admit: Admit) -> None:
        """Take a task in, unless not READY (`Unavailable`) or `admit` raises."""
        with self._changed:
            if self._state is not State.READY or self._closing:
                raise Unavailable(f"This worker is {self._state.value}.", "Try again later.")
            if entry.task.id in self._entries:
                raise ValueError(f"A task {entry.task.id!r} is in work already.")
            admit(list(self._entries.values()))
            self._entries[entry.task.id] = entry
            self._changed.notify_all()

    def cancel(self, task_id: str) -> None:
        """Mark a task; the engine thread ends it."""
        with self._changed:
            if task_id in self._entries:
                self._entries[task_id].cancel()

    def remove(self, entry: Entry) -> None:
        """A task ended."""
        with self._changed:
            del self._entries[entry.task.id]
            self._changed.notify_all()

    def wait_for_work(self) -> list[Entry]:
        """The tasks, as soon as there are any; none when the batcher is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._entries)
            return [] if self._closing else list(self._entries.values())

    def ready(self) -> None:
        """Warm-up is over."""
        with self._changed:
            if self._state is State.STARTING:
                self._state = State.READY
            self._changed.notify_all()

    def dead(self, failure: FastFaceError) -> None:
        """The engines failed for good; the first failure is what `wait_until_started` raises."""
        with self._changed:
            self._state = State.DEAD
            self._failure = self._failure or failure
            self._changed.notify_all()

    def wait_until_started(self) -> None:
        """Until warm-up is over; raises what it failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self._state is not State.STARTING or self._closing)
            if self._failure is not None:
                raise self._failure

    def drain(self, seconds: float) -> bool:
        """Take no more tasks; whether all ended in that time."""
        with self._changed:
            if self._state is State.READY:
                self._state = State.DRAINING
            return self._changed.wait_for(lambda: not self._entries, seconds)

    def close(self) -> None:
        """Let the engine thread end."""
        with self._changed:
            self._closing = True
            if self._state is not State.DEAD:
                self._state = State.DRAINING
            self._changed.notify_all()


_PROMPT = "photo; a person in a garden"
_PLAIN, _GUIDED = "plain", "am1+dcg"
"""Between them their steps have one, two and three branches."""


def blank_face(seed: int = 0) -> Face:
    """A face of nobody: a random direction and grey pixels."""
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal(EMBEDDING_SIZE)
    return Face(
        embedding=(direction / np.linalg.norm(direction)).astype(np.float32),
        embedding_norm=20.0,
        crop_bgr=np.full((CROP_SIZE, CROP_SIZE, 3), 127, np.uint8),
        box=(0.0, 0.0, float(CROP_SIZE), float(CROP_SIZE)),
        score=1.0,
        index=0,
        count=1,
        detector_size=0,
        portrait_bgr=np.full((PORTRAIT_SIZE, PORTRAIT_SIZE, 3), 127, np.uint8),
    )


def warm_up(fastface: FastFace, stages: MeasuredStages, policy: Policy, cost: CostModel) -> Policy:
    """Make pictures with every number of branches, alone and in the fullest call.

    The fullest call claims its memory now: where there is too little, the policy that is returned
    has fewer rows, so that this shows before the first client and not under load. Calls of larger
    pictures have no more pixels than it. Everything is made twice, since a first call pays for
    allocations, and the cost model has the second times.
    Raises what fails.
    """
    plain, guided = (_request(fastface, preset) for preset in (_PLAIN, _GUIDED))
    for request in (plain, guided):
        stages.make([request], blank_face())
    policy = _fitting(guided, stages, policy)
    cost.clear()
    most = _most(guided, policy)
    for requests in ([plain], [guided], [guided] * most):
        stages.make(requests, blank_face())
    area = Demand.of(guided, fastface.manifest).area
    return replace(policy, max_area=most * _rows(guided) * area)


def self_test(fastface: FastFace, stages: MeasuredStages) -> None:
    """One guided picture through every engine; raises what fails."""
    stages.make([_request(fastface, _GUIDED)], blank_face())


def _request(fastface: FastFace, preset: str) -> GenerationRequest:
    request = fastface.request(_PROMPT, preset=preset)
    return request.for_adapter(fastface.manifest.adapter_kind)


def _rows(request: GenerationRequest) -> int:
    return max(len(step.branches) for step in request.guidance_steps())


def _most(request: GenerationRequest, policy: Policy) -> int:
    return policy.size(_rows(request), policy.max_running)


def _fitting(request: GenerationRequest, stages: MeasuredStages, policy: Policy) -> Policy:
    """The policy with as many rows as there is memory for."""
    while (count := _most(request, policy)) > 1:
        try:
            stages.make([request] * count, blank_face())
        except OutOfMemory as error:
            policy = policy.with_fewer_rows(count * _rows(request))
            _log.warning("%s UNet calls have %d rows at most now.", error, policy.max_rows)
        else:
            break
    return policy
