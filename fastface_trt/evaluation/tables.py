"""A run as Markdown tables and as a small JSON summary: means, intervals, paired differences."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastface_trt.engines.files import storage_errors, write_text_durably
from fastface_trt.evaluation.judges import Column
from fastface_trt.evaluation.results import (
    PictureResult,
    RunRecord,
    by_setting,
    read_results,
    read_run,
)
from fastface_trt.measure.statistics import (
    FEW_PAIRS,
    FEWEST_PAIRS,
    Interval,
    paired_difference,
)
from fastface_trt.measure.tables import Table, markdown_rows

TABLES, SUMMARY = "tables.md", "summary.json"
_SHARE = "share of pictures"
NO_FACE = "ffc"


def write_tables(folder: Path) -> Path:
    """Write `tables.md` and `summary.json` of a run, finished or not; returns the former.

    Raises `InvalidRequest` when the folder holds no run, `StorageError`.
    """
    record, results = read_run(folder), read_results(folder, torn=True)
    summary = summarise(record, results)
    with storage_errors(folder):
        write_text_durably(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        write_text_durably(folder / TABLES, tables(record, summary))
    return folder / TABLES


def summarise(record: RunRecord, results: Sequence[PictureResult]) -> dict[str, Any]:
    """Plain JSON: per setting and metric the mean, its interval and n, and the same for the
    difference to the baseline with whether it is one."""
    values = {column.name: by_setting(results, column.name) for column in record.judges}
    settings = []
    for setting in record.settings:
        own = [result for result in results if result.setting == setting.name]
        metrics: dict[str, Any] = {}
        for column in record.judges:
            of_setting = values[column.name].get(setting.name, {})
            known = [value for value in of_setting.values() if value is not None]
            if not known:
                continue
            metrics[column.name] = _plain(Interval.of(known))
            if setting.baseline not in (None, setting.name):
                baseline = values[column.name].get(str(setting.baseline), {})
                difference = paired_difference(of_setting, baseline)
                if difference is not None:
                    differs = {"differs": difference.excludes_zero}
                    metrics[column.name]["difference"] = _plain(difference) | differs
        settings.append(
            {
                "name": setting.name,
                "axes": setting.axes,
                "line": setting.line,
                "baseline": setting.baseline,
                "pictures": len(own),
                "no_face": sum(result.metrics.get(NO_FACE) == 1 for result in own),
                "unet_samples": _mean([result.unet_samples for result in own]),
                "seconds_per_picture": _mean([result.seconds for result in own]),
                "metrics": metrics,
            }
        )
    kept = ("experiment", "title", "checkpoint", "backend", "pairs", "seed", "data")
    about = record.model_dump(mode="json")
    judges = [column.model_dump() for column in record.judges]
    return {name: about[name] for name in kept} | {
        "date": record.date,
        "machine": record.machine,
        "versions": record.versions,
        "judges": judges,
        "settings": settings,
    }


def tables(record: RunRecord, summary: dict[str, Any]) -> str:
    """Markdown: what was run, the means, the differences, and what the columns are."""
    done, asked = (
        min((s["pictures"] for s in summary["settings"]), default=0),
        record.pairs,
    )
    unfinished = "" if done == asked else f" (unfinished: at least {done} are there)"
    lines = [
        f"## {record.title}",
        "",
        f"{asked} pairs per setting{unfinished}, the same people, prompts and noise in each; "
        f"data {record.data}, checkpoint {record.checkpoint}, backend {record.backend}. Means with "
        "95 % bootstrap intervals over pairs.",
        "",
        *_table(record, summary, "metrics"),
        "",
    ]
    if any(setting["baseline"] for setting in summary["settings"]):
        lines += [
            "Differences from the baseline, pair by pair; **bold** where the interval does not "
            "hold 0:",
            "",
            *(line for sentence in caution(done) for line in (sentence, "")),
            *_table(record, summary, "difference"),
            "",
        ]
    lines += [f"- {column.label}: {column.what}." for column in record.judges]
    return "\n".join(lines) + "\n"


def caution(pairs: int) -> list[str]:
    """What is to be said of differences over so few pairs; nothing of enough."""
    if pairs < FEWEST_PAIRS:
        chance = min(1.0, 2 / 2**pairs)
        return [
            f"So few pairs ({pairs}) say nothing about differences: all have one sign by chance in "
            f"{100 * chance:.3g} % of runs. Take --pairs {FEW_PAIRS} or more."
        ]
    if pairs < FEW_PAIRS:
        return [
            f"With as few as {pairs} pairs, bootstrap intervals come out too narrow, so take "
            "these differences as hints."
        ]
    return []


def _table(record: RunRecord, summary: dict[str, Any], what: str) -> list[str]:
    columns = record.judges
    titles = [f"{column.label}, {_unit(column)}" for column in columns]
    heads = ("setting", "baseline") if what == "difference" else ("setting",)
    headings = (*heads, *titles, "no face", "UNet samples")
    rows: list[tuple[str, ...]] = []
    for setting in summary["settings"]:
        names = [setting["name"], setting["baseline"]][: len(heads)]
        if len(heads) > 1 and names[0] == names[1]:
            continue
        cells = [_cell(column, setting["metrics"].get(column.name), what) for column in columns]
        counts = [f"{setting['no_face']} of {setting['pictures']}", f"{setting['unet_samples']:g}"]
        rows.append((*names, *cells, *counts))
    return list(markdown_rows(Table("", headings, tuple(rows), words=len(heads))))


def _cell(column: Column, metric: dict[str, Any] | None, what: str) -> str:
    difference = what == "difference"
    found = metric if metric is None or not difference else metric.get("difference")
    if found is None:
        return "–"
    interval = Interval(found["mean"], found["low"], found["high"], found["n"])
    share = column.unit == _SHARE
    text = interval.text(100 if share else 1, 1 if share else 3, "+" if difference else "-")
    return f"**{text}**" if difference and found["differs"] else text


def _unit(column: Column) -> str:
    arrow = "↑" if column.higher_is_better else "↓"
    return f"{'%' if column.unit == _SHARE else column.unit} {arrow}"


def _plain(interval: Interval) -> dict[str, Any]:
    return {
        "mean": round(interval.mean, 6),
        "low": round(interval.low, 6),
        "high": round(interval.high, 6),
        "n": interval.n,
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3) if values else 0.0
