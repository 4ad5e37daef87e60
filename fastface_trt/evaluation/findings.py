"""What a run says, in sentences computed from its numbers and never more than they say.

A difference is called one only where its paired 95 % interval excludes 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastface_trt.evaluation.judges import Column
from fastface_trt.evaluation.results import PictureResult
from fastface_trt.evaluation.run_view import RunView, SettingView, interval_text, verdict
from fastface_trt.evaluation.statistics import Interval

FEW = 30
"""Pairs below which percentile bootstrap intervals deserve a warning."""

EXAMPLES = 4
"""Best and worst pictures to show."""


@dataclass(frozen=True, slots=True)
class Extremes:
    """The pictures of one setting that the identity judge likes best and least."""

    setting: SettingView
    best: tuple[PictureResult, ...]
    worst: tuple[PictureResult, ...]


def findings(run: RunView) -> list[str]:
    """Headline sentences: completeness first, then per judge and baseline, then the cost."""
    if not run.done:
        return ["No picture is finished yet, so nothing can be said."]
    sentences = _completeness(run)
    judges = [judge for judge in run.judges if run.has(judge.name)]
    for judge in run.judges:
        if judge not in judges:
            sentences.append(f"{judge.label}: no finished picture has a value.")
    if not run.compared:
        first = run.done[0]
        sentences += [
            f"{judge.label}: {interval_text(run.mean(first, judge.name))} in “{first.label}”."
            for judge in judges
        ]
        return [*sentences, "No two settings with pictures are to be compared."]
    sentences += _merged([_compared(run, judge) for judge in judges])
    sentences.append(_chance(len(judges) * len(run.compared)))
    fewest = min(len(run.results[setting.name]) for setting in run.compared)
    if fewest < FEW:
        sentences.append(
            f"With as few as {fewest} pairs, bootstrap intervals come out too narrow, so take "
            "these differences as hints."
        )
    return [*sentences, _cost(run)]


def extremes(run: RunView) -> list[Extremes]:
    """Best and worst kept pictures by ID, of the baseline and of the setting with the highest ID.

    Only pairs whose picture was kept and shows a face count.
    """
    scored = [setting for setting in run.done if run.mean(setting, "id").n]
    if not scored:
        return []
    top = max(scored, key=lambda setting: run.mean(setting, "id").mean)
    baseline = run.baseline_of(top)
    found = []
    for setting in [top] if baseline is None else [baseline, top]:
        kept = [
            result
            for result in run.results[setting.name].values()
            if run.picture(result) is not None and result.metrics.get("id") is not None
        ]
        kept.sort(key=lambda result: -float(result.metrics["id"] or 0))
        if len(kept) > 1:
            half = min(EXAMPLES, len(kept) // 2)
            found.append(Extremes(setting, tuple(kept[:half]), tuple(kept[::-1][:half])))
    return found


def _completeness(run: RunView) -> list[str]:
    pairs = run.record.pairs
    missing = [setting.label for setting in run.settings if setting not in run.done]
    partial = [(s.label, len(run.results[s.name])) for s in run.done]
    counts = [f"{label} {count}" for label, count in partial if count < pairs]
    sentences = []
    if missing:
        sentences.append(
            f"Not finished: {len(missing)} of {len(run.settings)} settings have no picture yet "
            f"({_listed(missing)})."
        )
    if counts:
        sentences.append(f"Not finished: of {pairs} pairs, {_listed(counts)} are done.")
    if any(judge.name == "id" for judge in run.judges) and not run.has("id"):
        sentences.append("No face was found in any picture, so identity cannot be judged.")
    return sentences


def _merged(found: Sequence[tuple[str, str]]) -> list[str]:
    """Sentences from (judge, statement), judges with the same statement in one."""
    judges: dict[str, list[str]] = {}
    for judge, statement in found:
        judges.setdefault(statement, []).append(judge)
    return [f"{' · '.join(names)}: {statement}." for statement, names in judges.items()]


def _compared(run: RunView, judge: Column) -> tuple[str, str]:
    """The judge's label, and what its paired differences to the baselines say."""
    known = [(s, one) for s in run.compared if (one := run.difference(s, judge.name)).n]
    baselines = run.baselines
    parts, to = [], "their baselines"
    if len(baselines) == 1:
        to = f"“{baselines[0].label}”"
        parts = [f"{to} has {interval_text(run.mean(baselines[0], judge.name))}"]
    if not known:
        return judge.label, "; ".join([*parts, "no other setting shares a judged pair with it"])
    clear = [(s, one, verdict(one, judge)) for s, one in known]
    for kind, sign in (("better", 1), ("worse", -1)):
        found = [(s, one) for s, one, which in clear if which == sign]
        if found:
            setting, one = max(found, key=lambda item: abs(item[1].mean))
            count = f"{len(found)} of {len(known)} settings are {kind} than {to}, most of all "
            lead = count if len(found) > 1 else f"{kind} is only "
            if len(known) == 1:
                lead = f"{kind} is "
            parts.append(f"{lead}“{setting.label}”: {_difference(one)}")
    if not any(which for *_, which in clear):
        none = f"none of {len(known)} settings" if len(known) > 1 else f"“{known[0][0].label}”"
        parts.append(f"{none} {'can' if len(known) > 1 else 'cannot'} be told apart from {to}")
    return judge.label, "; ".join(parts)


def _difference(one: Interval) -> str:
    return f"{interval_text(one, sign=True)}, n = {one.n} pairs"


def _chance(comparisons: int) -> str:
    if comparisons < 20:
        return "A difference is named only where its paired 95 % interval excludes 0."
    return (
        f"A difference is named only where its paired 95 % interval excludes 0; of {comparisons} "
        f"comparisons about {round(0.05 * comparisons)} would do so by chance alone."
    )


def _cost(run: RunView) -> str:
    cost = {
        setting.label: sum(r.unet_samples for r in found) / len(found)
        for setting in run.done
        for found in [run.results[setting.name].values()]
    }
    low, high = min(cost.values()), max(cost.values())
    if low == high:
        return f"Cost: every setting takes {low:g} UNet samples a picture."
    cheap = [name for name, value in cost.items() if value == low]
    dear = [name for name, value in cost.items() if value == high]
    return (
        f"Cost: from {low:g} UNet samples a picture ({_listed(cheap)}) to {high:g} "
        f"({_listed(dear)})."
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    """Names that hold commas themselves, so semicolons part them."""
    listed = "; ".join(names[:most])
    return listed if len(names) <= most else f"{listed}; and {len(names) - most} more"
