"""What to doubt in a report, in sentences: outliers, drift, throttling, and company."""

from collections.abc import Sequence

from fastface_trt.bench import statistics
from fastface_trt.bench.report import Case, ColdStart, Environment

_DRIFT_SAID_FROM = 0.02
"""Smaller changes between the halves of a run are of no use to anybody."""


def notes(
    cases: Sequence[Case], environment: Environment, cold_start: ColdStart | None
) -> list[str]:
    """Sentences about everything that could make these numbers differ from another run's."""
    said = [sentence for case in cases for sentence in _case(case)]
    said += _environment(environment)
    fewest = min(case.seconds.n for case in cases)
    if fewest < 100:
        said.append(
            f"Some percentiles rest on as few as {fewest} samples; p99 of fewer than 100 is close "
            "to their maximum."
        )
    if cold_start is not None:
        said.append(
            "Cold starts read engines and packages that the system may hold in memory; the first "
            "start after a reboot takes longer."
        )
    return said


def _case(case: Case) -> list[str]:
    said = []
    seconds = case.seconds
    if seconds.outliers:
        outside = [seconds.samples[at] for at in seconds.outliers]
        worst = max(outside, key=lambda value: abs(value - seconds.median))
        said.append(
            f"{case.label}: {len(seconds.outliers)} of {seconds.n} calls lie outside Tukey's "
            f"fences, the farthest at {worst * 1000:.1f} ms with a median of "
            f"{seconds.median * 1000:.1f} ms; all are counted."
        )
    ratio, low, high = statistics.drift(seconds.samples)
    if abs(ratio - 1) > _DRIFT_SAID_FROM and not low <= 1 <= high:
        change = f"{abs(ratio - 1):.0%} {'slower' if ratio > 1 else 'faster'}"
        said.append(
            f"{case.label}: the second half of the calls was {change} than the first (ratio "
            f"{ratio:.2f}, 95 % interval {low:.2f} to {high:.2f}), so the machine changed its pace."
        )
    return said


def _environment(environment: Environment) -> list[str]:
    said = []
    cores = int(environment.machine["cores"])
    load = environment.start.load_average
    if load is not None and load > cores / 2:
        said.append(
            f"The load average was {load:.1f} on {cores} cores before the first call: something "
            "else was running."
        )
    load = environment.end.load_average
    if load is not None and load > cores:
        said.append(
            f"The load average was {load:.1f} on {cores} cores after the last call; this command's "
            "own threads count in it."
        )
    for when, state in (("before", environment.start), ("after", environment.end)):
        if state.gpu is not None and state.gpu.throttled:
            said.append(
                f"{state.gpu.name} was throttled {when} the calls: "
                f"{', '.join(state.gpu.throttled)}."
            )
    return said
