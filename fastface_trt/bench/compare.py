"""Two reports side by side: ratios of medians, with the intervals that their samples allow."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from fastface_trt.bench.report import BenchReport, Case, Distribution
from fastface_trt.bench.tables import interval_text
from fastface_trt.engines.manifest import first_problem
from fastface_trt.errors import InvalidRequest
from fastface_trt.measure import statistics
from fastface_trt.measure.tables import Table

_SAME_MACHINE = ("processor", "cores", "gpu")
_SAME_WORK = ("checkpoint", "width", "height", "steps", "plan", "presets")


@dataclass(frozen=True, slots=True)
class Ratio:
    """What became of a median: B over A, with a 95 % bootstrap interval of that ratio."""

    case: str
    what: str
    first: float
    second: float
    ratio: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.low <= 1 <= self.high


def read_report(path: Path) -> BenchReport:
    """Read a `bench.json`; raises `InvalidRequest` saying what is wrong with it."""
    hint = "Give a bench.json that fastface-trt bench of this version wrote."
    try:
        return BenchReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.", hint) from None
    except ValidationError as error:
        where, problem = first_problem(error)
        raise InvalidRequest(
            f"{path} is no report of this version at {where or 'the top'}: {problem}.", hint
        ) from None


def compare(
    first: BenchReport,
    second: BenchReport,
    *,
    across_machines: bool = False,
    different_work: bool = False,
) -> list[Ratio]:
    """Ratios, second over first, of every case and stage that both have.

    Raises `InvalidRequest` for reports of different machines (processor, cores, GPU) or of
    different work (checkpoint, size, steps, branch plan, presets), unless allowed; with
    `different_work` the presets are paired in their order. Of a hundred equal pairs about five
    are told apart by chance.
    """
    if not across_machines:
        _refuse(
            "machines",
            _SAME_MACHINE,
            first.environment.machine,
            second.environment.machine,
            "--across-machines",
        )
    if not different_work:
        before, after = (json.loads(one.work.model_dump_json()) for one in (first, second))
        _refuse("work", _SAME_WORK, before, after, "--different-work")
    pairs = list(_pairs(first, second))
    if not pairs:
        raise InvalidRequest(
            "The two reports have no case in common.",
            "Measure both with the same --requests and --concurrency.",
        )
    return [ratio for one, other in pairs for ratio in _ratios(one, other)]


def comparison_tables(first: BenchReport, second: BenchReport, ratios: list[Ratio]) -> list[Table]:
    """The ratios, a table per case, and then how either report's own ratios agree.

    A report's own ratios are of calls in turns, so they say the same on a faster machine if the
    software is the same.
    """
    found = [
        Table(
            f"{case}, B over A: ratio of medians with its 95 % interval",
            ("stage", "verdict", "A, ms", "B, ms", "B / A", "95 % of it"),
            tuple(
                (
                    one.what,
                    _verdict(one),
                    f"{one.first * 1000:.2f}",
                    f"{one.second * 1000:.2f}",
                    f"{one.ratio:.2f}",
                    interval_text((one.low, one.high)),
                )
                for one in ratios
                if one.case == case
            ),
            words=2,
        )
        for case in dict.fromkeys(one.case for one in ratios)
    ]
    others = {(one.case, one.over): one for one in second.ratios}
    rows = tuple(
        (
            f"{one.case} / {one.over}",
            "overlap" if _overlap(one.interval, other.interval) else "apart",
            f"{one.ratio:.2f} ({interval_text(one.interval)})",
            f"{other.ratio:.2f} ({interval_text(other.interval)})",
        )
        for one in first.ratios
        if (other := others.get((one.case, one.over))) is not None
    )
    if rows:
        title = "Ratios within each report, with 95 % intervals"
        found.append(Table(title, ("ratio", "intervals", "A", "B"), rows, words=2))
    return found


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _verdict(ratio: Ratio) -> str:
    if not ratio.distinguishable:
        return "not told apart"
    return "B is faster" if ratio.ratio < 1 else "B is slower"


def _refuse(
    what: str,
    names: tuple[str, ...],
    first: dict[str, str | int | float],
    second: dict[str, str | int | float],
    option: str,
) -> None:
    differing = [
        f"{name} {first.get(name, 'none')} and {second.get(name, 'none')}"
        for name in names
        if first.get(name) != second.get(name)
    ]
    if differing:
        raise InvalidRequest(
            f"The reports are of different {what}: {'; '.join(differing)}.",
            f"Add {option} if that is what you want to compare.",
        )


def _pairs(first: BenchReport, second: BenchReport) -> Iterator[tuple[Case, Case]]:
    def key(report: BenchReport, case: Case) -> tuple[int, str, int, int]:
        place = report.work.presets.index(case.preset)
        return place, case.features, case.requests, case.concurrency

    known = {key(second, case): case for case in second.cases}
    for case in first.cases:
        other = known.get(key(first, case))
        if other is not None:
            yield case, other


def _ratios(first: Case, second: Case) -> Iterator[Ratio]:
    label = first.label if first.preset == second.preset else f"{first.label} / {second.label}"
    found = _ratio(label, "whole call", first.seconds, second.seconds)
    if found is not None:
        yield found
    stages = {(stage.name, stage.step): stage for stage in second.stages}
    for stage in first.stages:
        other = stages.get((stage.name, stage.step))
        # What no stage covers is a difference of noisy numbers; its ratio would say nothing.
        if other is not None and stage.name != "other":
            found = _ratio(label, stage.label, stage.seconds, other.seconds)
            if found is not None:
                yield found


def _ratio(case: str, what: str, first: Distribution, second: Distribution) -> Ratio | None:
    if min(*first.samples, *second.samples) <= 0:
        return None
    low, high = statistics.ratio_interval(np.array(first.samples), np.array(second.samples))
    return Ratio(case, what, first.median, second.median, second.median / first.median, low, high)
