"""What a run says, in sentences computed from its numbers and never more than they say.

A difference is called one only where its paired 95 % interval excludes 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastface_trt.evaluation.intervals import Interval
from fastface_trt.evaluation.run_view import Judge, PictureView, RunView, SettingView

EXAMPLES = 4
"""Best and worst pictures to show."""


@dataclass(frozen=True, slots=True)
class Extremes:
    """The pictures of one setting that the identity judge likes best and least."""

    setting: SettingView
    best: tuple[PictureView, ...]
    worst: tuple[PictureView, ...]


def findings(run: RunView) -> list[str]:
    """Headline sentences: completeness first, then one per judge, then the cost."""
    done = [setting for setting in run.settings if run.results[setting.name]]
    if not done:
        return ["No picture is finished yet, so nothing can be said."]
    sentences = _completeness(run, done)
    judges = [judge for judge in run.judges if run.has(judge.name)]
    for judge in run.judges:
        if judge not in judges:
            sentences.append(f"{judge.label}: no finished picture has a value.")
    baseline = run.baseline
    others = [setting for setting in done if setting is not baseline]
    if baseline is None or not others:
        sentences += [
            f"{judge.label}: {run.mean(done[0].name, judge.name).text()} in {done[0].name}."
            for judge in judges
        ]
        return [*sentences, "Only one setting has pictures, so nothing is compared."]
    sentences += [_compared(run, judge, baseline, others) for judge in judges]
    sentences.append(_chance(len(judges) * len(others)))
    cost = _cost(run, done)
    return [*sentences, cost] if cost else sentences


def extremes(run: RunView) -> list[Extremes]:
    """Best and worst kept pictures by ID, of the baseline and of the setting with the highest ID.

    Only pairs whose picture was kept and shows a face count.
    """
    scored = [s for s in run.settings if run.values(s.name, "id")]
    if not scored:
        return []
    top = max(scored, key=lambda setting: run.mean(setting.name, "id").mean)
    chosen = [top] if run.baseline in (None, top) else [run.baseline, top]
    found = []
    for setting in chosen:
        if setting is None:
            continue
        kept = [
            result
            for result in run.results[setting.name].values()
            if result.picture is not None and result.metrics.get("id") is not None
        ]
        kept.sort(key=lambda result: -float(result.metrics["id"] or 0))
        if len(kept) > 1:
            half = min(EXAMPLES, len(kept) // 2)
            found.append(Extremes(setting, tuple(kept[:half]), tuple(kept[::-1][:half])))
    return found


def _completeness(run: RunView, done: Sequence[SettingView]) -> list[str]:
    missing = [s.name for s in run.settings if s not in done]
    partial = [s for s in done if len(run.results[s.name]) < run.pairs]
    sentences = []
    if missing:
        sentences.append(
            f"Not finished: {len(missing)} of {len(run.settings)} settings have no picture yet "
            f"({_listed(missing)})."
        )
    if partial:
        counts = [f"{s.name} {len(run.results[s.name])}" for s in partial]
        sentences.append(f"Not finished: of {run.pairs} pairs, {_listed(counts)} are done.")
    faces = [s for s in done if run.values(s.name, "id")]
    if run.judge("id") is not None and not faces:
        sentences.append("No face was found in any picture, so identity cannot be judged.")
    return sentences


def _compared(
    run: RunView, judge: Judge, baseline: SettingView, others: Sequence[SettingView]
) -> str:
    base = run.mean(baseline.name, judge.name)
    differences = [(s, run.difference(s.name, baseline.name, judge.name)) for s in others]
    known = [(setting, one) for setting, one in differences if one.n]
    start = f"{judge.label}: {baseline.name} has {base.text()}"
    if not known:
        return f"{start}; no other setting shares a judged pair with it."
    sign = 1 if judge.higher_is_better else -1
    better = [(s, one) for s, one in known if one.excludes_zero and sign * one.mean > 0]
    worse = [(s, one) for s, one in known if one.excludes_zero and sign * one.mean < 0]
    if not better and not worse:
        few = "the other setting" if len(known) == 1 else f"none of {len(known)} other settings"
        verb = "cannot" if len(known) == 1 else "can"
        return f"{start}; {few} {verb} be told apart from it."
    parts = [start]
    for kind, extreme, found in (("better", 1, better), ("worse", -1, worse)):
        if found:
            most = max(found, key=lambda item: extreme * sign * item[1].mean)
            count = f"{len(found)} of {len(known)} settings are {kind}, most of all "
            start = count if len(found) > 1 else f"{kind} is only "
            parts.append(f"{start}{most[0].name}: {_difference(most[1])}")
    return "; ".join(parts) + "."


def _difference(one: Interval) -> str:
    return f"{one.text(sign=True)}, n = {one.n} pairs"


def _chance(comparisons: int) -> str:
    if comparisons < 20:
        return "A difference is named only where its paired 95 % interval excludes 0."
    return (
        f"A difference is named only where its paired 95 % interval excludes 0; of {comparisons} "
        f"comparisons about {round(0.05 * comparisons)} would do so by chance alone."
    )


def _cost(run: RunView, done: Sequence[SettingView]) -> str:
    cost = {
        setting.name: Interval.of([r.unet_samples for r in run.results[setting.name].values()]).mean
        for setting in done
    }
    low, high = min(cost.values()), max(cost.values())
    if low == high:
        return f"Every setting takes {low:g} UNet samples a picture."
    cheap = [name for name, value in cost.items() if value == low]
    dear = [name for name, value in cost.items() if value == high]
    return (
        f"Cost: from {low:g} UNet samples a picture ({_listed(cheap)}) to {high:g} "
        f"({_listed(dear)})."
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
