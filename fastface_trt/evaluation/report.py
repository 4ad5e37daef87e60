"""The report of a run: one HTML file with everything in it, and the same figures as files.

The page asks for nothing outside itself, so it can be mailed, kept, and read without a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import isnan, nan
from pathlib import Path
from shlex import quote
from typing import Any, Final

from fastface_trt.engines.files import storage_errors, write_text_durably
from fastface_trt.errors import MissingDependency
from fastface_trt.evaluation.attention_figures import read_attention
from fastface_trt.evaluation.axes import value_text
from fastface_trt.evaluation.figures import choose_figures
from fastface_trt.evaluation.findings import Extremes, extremes, findings
from fastface_trt.evaluation.judges import Column
from fastface_trt.evaluation.pictures import picture_uri, plot_uri, side_for
from fastface_trt.evaluation.run_view import (
    RunView,
    SettingView,
    axis_label,
    interval_text,
    read_view,
    verdict,
)
from fastface_trt.evaluation.sheets import Cell, Sheet, choose_sheets, draw_sheet, picture_cell
from fastface_trt.evaluation.statistics import Interval
from fastface_trt.evaluation.style import DARK, LIGHT, encode

REPORT: Final = "report.html"
PLOTS: Final = "plots"
ATTENTION: Final = "attention"
"""Folder of a run into which `evaluate attention --out` may write, for the report to show."""

_TEMPLATE: Final = "report.html"
_FACE_SIDE: Final = 128
_ATTENTION_WIDTH: Final = 1600


def write_report(out: Path) -> Path:
    """Write `report.html` and `plots/*.png` of the run in folder `out`; return the page's path.

    Figures that `evaluate attention --out RUN/attention` wrote are shown, too. A run that is not
    finished gives a report of what there is, which says so. Raises
    `InvalidRequest` when `out` holds no run, `MissingDependency` without jinja2 or matplotlib,
    `StorageError`.
    """
    run = read_view(out)
    figures, sheets = choose_figures(run), choose_sheets(run)
    files_to_write: dict[str, bytes] = {}
    shown_figures = []
    for figure in figures:
        light = encode(figure.draw(LIGHT))
        files_to_write[f"{figure.key}.png"] = light
        shown_figures.append(
            {
                "heading": figure.heading,
                "caption": figure.caption,
                "light": plot_uri(light),
                "dark": plot_uri(encode(figure.draw(DARK))),
            }
        )
    for heading, caption, path in read_attention(out / ATTENTION):
        uri = picture_uri(path, _ATTENTION_WIDTH)
        if uri is not None:
            shown_figures.append(
                {"heading": heading, "caption": caption, "light": uri, "dark": uri}
            )
    page = render(run, shown_figures, sheets)
    with storage_errors(out):
        (out / PLOTS).mkdir(exist_ok=True)
        for name, data in files_to_write.items():
            (out / PLOTS / name).write_bytes(data)
        for sheet in sheets:
            draw_sheet(sheet).save(out / PLOTS / f"{sheet.key}.png")
        write_text_durably(out / REPORT, page)
    return out / REPORT


def render(run: RunView, figures: Sequence[Mapping[str, str]], sheets: Sequence[Sheet]) -> str:
    """The page. `figures` hold heading, caption, and the data URIs `light` and `dark`."""
    examples = extremes(run)
    counted = sum(sheet.pictures for sheet in sheets)
    counted += sum(len(one.best) + len(one.worst) for one in examples)
    embed = _Embedder(run, side_for(counted))
    return str(
        _template().render(
            run=run,
            title=run.record.title,
            facts=_facts(run),
            findings=[sentence.partition(": ") for sentence in findings(run)],
            scores=_scores(run),
            differences=_differences(run),
            figures=figures,
            sheets=[embed.sheet(sheet) for sheet in sheets],
            extremes=[embed.extremes(one) for one in examples],
            command=_command(run),
            judge_label=axis_label,
        )
    )


class _Embedder:
    """Turns sheets into plain values for the template, pictures as data URIs."""

    def __init__(self, run: RunView, side: int) -> None:
        self._run, self._side = run, side
        self._faces: dict[Path, str | None] = {}

    def sheet(self, sheet: Sheet) -> dict[str, Any]:
        return {
            "heading": sheet.heading,
            "caption": sheet.caption,
            "corner": sheet.corner,
            "columns": sheet.columns,
            "rows": [
                {
                    "label": row.label,
                    "face": self._face(row.face),
                    "cells": [self._picture(cell) for cell in row.cells],
                }
                for row in sheet.rows
            ],
        }

    def extremes(self, one: Extremes) -> dict[str, Any]:
        return {
            "setting": one.setting.label,
            "groups": [
                {
                    "name": name,
                    "items": [
                        self._picture(picture_cell(self._run, result, one.setting.label))
                        | {"face": self._face(self._run.face(result.person))}
                        for result in results
                    ],
                }
                for name, results in (("Highest ID", one.best), ("Lowest ID", one.worst))
            ],
        }

    def _picture(self, cell: Cell) -> dict[str, Any]:
        uri = None if cell.path is None else picture_uri(cell.path, self._side)
        return {"uri": uri, "text": cell.text, "alt": cell.alt, "note": cell.note}

    def _face(self, path: Path | None) -> str | None:
        if path is None:
            return None
        if path not in self._faces:
            self._faces[path] = picture_uri(path, _FACE_SIDE)
        return self._faces[path]


def _facts(run: RunView) -> list[tuple[str, str]]:
    """What was run, as names and values."""
    record = run.record
    finished = sum(map(len, run.results.values()))
    facts = [
        ("Experiment", record.experiment),
        ("Export", record.export),
        ("Checkpoint", record.checkpoint),
        ("Backend", record.backend),
        ("Data", record.data),
        ("Date", record.date),
        ("Settings", str(len(run.settings))),
        ("Pairs per setting", str(record.pairs)),
        ("Pictures", f"{finished} of {record.pairs * len(run.settings)} finished"),
        ("Seed", str(record.seed)),
        ("Baselines", ", ".join(setting.label for setting in run.baselines)),
        ("Machine", _listed(record.machine)),
        ("Versions", _listed(record.versions)),
    ]
    return [(name, value) for name, value in facts if value]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{str(key).replace('_', ' ')} {value_text(value)}"
        for key, value in values.items()
        if value not in (None, "", {}, [])
    )


def _scores(run: RunView) -> dict[str, Any]:
    """The table of means: heads with a note each, and rows of (text, number to sort by)."""
    heads = [("setting", ""), ("n", "finished pairs")]
    heads += [(axis_label(judge), judge.what) for judge in run.judges]
    heads += [("UNet samples", "per picture"), ("seconds", "per picture, in its batch")]
    rows = []
    for setting in run.settings:
        results = run.results[setting.name].values()
        row: list[tuple[str, Any]] = [_name_cell(run, setting), (str(len(results)), len(results))]
        row += [_cell(run.mean(setting, judge.name)) for judge in run.judges]
        for values in ([r.unet_samples for r in results], [r.seconds for r in results]):
            mean = sum(values) / len(values) if values else nan
            row.append(("–", "") if isnan(mean) else (f"{mean:.3g}", mean))
        rows.append({"baseline": setting in run.baselines, "name": setting.name, "cells": row})
    return {"heads": heads, "rows": rows}


def _differences(run: RunView) -> dict[str, Any] | None:
    """The table of paired differences to the baselines, None without anything to compare."""
    if not run.compared:
        return None
    judges = [judge for judge in run.judges if run.has(judge.name)]
    several = len(run.baselines) > 1
    heads = [("setting", "")] + [(axis_label(judge), judge.what) for judge in judges]
    if several:
        heads.insert(1, ("baseline", "what it is compared with"))
    rows = [_difference_row(run, setting, judges, several) for setting in run.compared]
    title = "their baselines" if several else run.baselines[0].label
    return {"heads": heads, "rows": rows, "baseline": title}


def _difference_row(
    run: RunView, setting: SettingView, judges: Sequence[Column], several: bool
) -> list[tuple[str, Any, str]]:
    row = [(*_name_cell(run, setting), "")]
    baseline = run.baseline_of(setting)
    if several and baseline is not None:
        row.append((*_name_cell(run, baseline), ""))
    for judge in judges:
        one = run.difference(setting, judge.name)
        text, key = _cell(one, sign=True)
        row.append((text, key, {1: "better", -1: "worse", 0: ""}[verdict(one, judge)]))
    return row


def _name_cell(run: RunView, setting: SettingView) -> tuple[str, Any]:
    """A setting's label, sorted by its place in the run."""
    return setting.label, f"{run.settings.index(setting):06d}"


def _cell(interval: Interval, *, sign: bool = False) -> tuple[str, Any]:
    """Text (mean, then the interval in brackets) and the number to sort by."""
    if isnan(interval.mean):
        return "–", ""
    return interval_text(interval, sign=sign), interval.mean


def _command(run: RunView) -> str:
    record = run.record
    words = ["fastface-trt", "evaluate", record.experiment]
    for option, value in (
        ("--export", record.export),
        ("--backend", record.backend),
        ("--data", record.data),
        ("--pairs", record.pairs),
        ("--batch", record.batch),
        ("--keep", record.keep),
    ):
        words += [option, str(value)]
    return " ".join(quote(word) for word in [*words, "--out", run.folder.name, "--report"])


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingDependency(
            f"Reports need {error.name}.", "Install it with: pip install 'fastface-trt[evaluate]'."
        ) from None
    text = (files(__package__) / "templates" / _TEMPLATE).read_text(encoding="utf-8")
    # Prompts and names come from files of others: everything is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text)
