"""The report of a run: one HTML file with everything in it, and the same figures as files.

The page asks for nothing outside itself, so it can be mailed, kept, and read without a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import isnan
from pathlib import Path
from shlex import quote
from typing import Any, Final

from fastface_trt.engines.files import storage_errors, write_text_durably
from fastface_trt.errors import MissingDependency
from fastface_trt.evaluation.axes import find_axes, value_text
from fastface_trt.evaluation.figures import RunFigure, choose_figures
from fastface_trt.evaluation.findings import Extremes, extremes, findings
from fastface_trt.evaluation.intervals import Interval
from fastface_trt.evaluation.pictures import data_uri, picture_uri, side_for
from fastface_trt.evaluation.run_view import PictureView, RunView, SettingView, read_view
from fastface_trt.evaluation.sheets import Sheet, choose_sheets, draw_sheet, shown
from fastface_trt.evaluation.style import DARK, LIGHT, encode

REPORT: Final = "report.html"
PLOTS: Final = "plots"
_TEMPLATE: Final = "report.html"
_FACE_SIDE: Final = 128


def write_report(out: Path) -> Path:
    """Write `report.html` and `plots/*.png` of the run in folder `out`; return the page's path.

    A run that is not finished gives a report of what there is, which says so. Raises
    `InvalidRequest` when `out` holds no run, `MissingDependency` without jinja2 or matplotlib,
    `StorageError`.
    """
    run = read_view(out)
    figures, sheets = choose_figures(run), choose_sheets(run)
    files_to_write: dict[str, bytes] = {}
    shown_figures = []
    for figure in figures:
        files_to_write[f"{figure.key}.png"] = encode(figure.draw(LIGHT))
        shown_figures.append(_figure(figure))
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
            title=run.title,
            facts=_facts(run),
            findings=[sentence.partition(": ") for sentence in findings(run)],
            scores=_scores(run),
            differences=_differences(run),
            figures=figures,
            sheets=[embed.sheet(sheet) for sheet in sheets],
            extremes=[embed.extremes(one) for one in examples],
            command=_command(run),
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
                    "cells": [
                        self._picture(cell.result, cell.text, column)
                        for cell, column in zip(row.cells, sheet.columns, strict=True)
                    ],
                }
                for row in sheet.rows
            ],
        }

    def extremes(self, one: Extremes) -> dict[str, Any]:
        return {
            "setting": one.setting.name,
            "groups": [
                {
                    "name": name,
                    "items": [
                        self._picture(result, shown(result).text, one.setting.name)
                        | {"face": self._face(self._run.face(result.person))}
                        for result in results
                    ],
                }
                for name, results in (("Highest ID", one.best), ("Lowest ID", one.worst))
            ],
        }

    def _picture(self, result: PictureView | None, text: str, setting: str) -> dict[str, Any]:
        if result is None or result.picture is None:
            return {"uri": None, "text": text, "alt": "", "note": ""}
        return {
            "uri": picture_uri(result.picture, self._side),
            "text": text,
            "alt": f"{result.person}, “{result.prompt}”, {setting}",
            "note": f"pair {result.pair}, seed {result.seed}",
        }

    def _face(self, path: Path | None) -> str | None:
        if path is None:
            return None
        if path not in self._faces:
            self._faces[path] = picture_uri(path, _FACE_SIDE)
        return self._faces[path]


def _figure(figure: RunFigure) -> dict[str, str]:
    return {
        "key": figure.key,
        "heading": figure.heading,
        "caption": figure.caption,
        "light": data_uri(encode(figure.draw(LIGHT), "webp"), "image/webp"),
        "dark": data_uri(encode(figure.draw(DARK), "webp"), "image/webp"),
    }


def _facts(run: RunView) -> list[tuple[str, str]]:
    """What was run, as names and values."""
    about = run.about
    finished = sum(map(len, run.results.values()))
    facts = [
        ("Experiment", about.get("experiment")),
        ("Export", about.get("export")),
        ("Checkpoint", about.get("checkpoint")),
        ("Backend", about.get("backend")),
        ("Date", about.get("date")),
        ("Settings", len(run.settings)),
        ("Pairs per setting", run.pairs),
        ("Pictures", f"{finished} of {run.pairs * len(run.settings)} finished"),
        ("Seed", about.get("seed")),
        ("Baseline", run.baseline.name if run.baseline else None),
        ("Data", about.get("data")),
        ("Machine", _listed(about.get("machine"))),
        ("Versions", _listed(about.get("versions"))),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _listed(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values or "")
    return ", ".join(
        f"{str(key).replace('_', ' ')} {value_text(value)}"
        for key, value in values.items()
        if value not in (None, "", {}, [])
    )


def _scores(run: RunView) -> dict[str, Any]:
    """The table of means: heads with a note each, and rows of (text, number to sort by)."""
    axes = find_axes(run)
    heads: list[tuple[str, str]] = [("setting", "")]
    # An axis whose value names the setting would be the same column twice.
    names = [
        name for name in axes if any(value_text(s.axes.get(name)) != s.name for s in run.settings)
    ]
    heads += [(axes[name].label, "") for name in names]
    heads.append(("n", "finished pairs"))
    heads += [(judge.axis_label, judge.what) for judge in run.judges]
    heads += [("UNet samples", "per picture"), ("seconds", "per picture, in its batch")]
    rows = []
    for setting in run.settings:
        results = run.results[setting.name].values()
        row: list[tuple[str, Any]] = [(setting.name, setting.name)]
        for name in names:
            value = setting.axes.get(name)
            numbers = axes[name].scalars
            known = name in setting.axes
            text = value_text(value) if known else "–"
            row.append((text, axes[name].scalar(value) if known and numbers else text))
        row.append((str(len(results)), len(results)))
        row += [_cell(run.mean(setting.name, judge.name)) for judge in run.judges]
        for values in ([r.unet_samples for r in results], [r.seconds for r in results]):
            mean = Interval.of(values).mean
            row.append(("–", "") if isnan(mean) else (f"{mean:.3g}", mean))
        rows.append({"baseline": setting is run.baseline, "cells": row})
    return {"heads": heads, "rows": rows}


def _differences(run: RunView) -> dict[str, Any] | None:
    """The table of paired differences to the baseline, None without anything to compare."""
    baseline = run.baseline
    others = [s for s in run.settings if run.results[s.name] and s is not baseline]
    if baseline is None or not others:
        return None
    judges = [judge for judge in run.judges if run.has(judge.name)]
    rows = [_difference_row(run, setting, baseline, judges) for setting in others]
    heads = [("setting", "")] + [(judge.axis_label, judge.what) for judge in judges]
    return {"heads": heads, "rows": rows, "baseline": baseline.name}


def _difference_row(
    run: RunView, setting: SettingView, baseline: SettingView, judges: Sequence[Any]
) -> list[tuple[str, Any, str]]:
    row: list[tuple[str, Any, str]] = [(setting.name, setting.name, "")]
    for judge in judges:
        one = run.difference(setting.name, baseline.name, judge.name)
        verdict = ""
        if one.excludes_zero:
            verdict = "better" if (one.mean > 0) == judge.higher_is_better else "worse"
        text, key = _cell(one, sign=True)
        row.append((text, key, verdict))
    return row


def _cell(interval: Interval, *, sign: bool = False) -> tuple[str, Any]:
    """Text (mean, then the interval in brackets) and the number to sort by."""
    if isnan(interval.mean):
        return "–", ""
    return interval.text(sign=sign), interval.mean


def _command(run: RunView) -> str:
    about = run.about
    words = ["fastface-trt", "evaluate", str(about.get("experiment", ""))]
    for option, key in (
        ("--export", "export"),
        ("--backend", "backend"),
        ("--pairs", "pairs"),
        ("--seed", "seed"),
    ):
        if about.get(key) is not None:
            words += [option, str(about[key])]
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
