"""The report of a run: one HTML file with everything in it, and the same figures as files.

The page asks for nothing outside itself, so it can be mailed, kept, and read without a network: its
pictures are data URIs, scaled down so that it stays small. It begins with what the run says, in
sentences that say no more than its numbers do (a difference is one only where its paired 95 %
interval excludes 0), and shows contact sheets, α × β grids, and strips of per-step effects. A sheet
is data: the page shows it as a table of pictures, `draw_sheet` as one PNG.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from math import isnan, nan
from pathlib import Path
from shlex import quote
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from fastface_trt.engines.files import storage_errors, write_text_durably
from fastface_trt.errors import MissingDependency, install_hint
from fastface_trt.evaluation.attention import read_attention
from fastface_trt.evaluation.axes import Axis, Group, group_along, value_text
from fastface_trt.evaluation.figures import alpha_beta_group, choose_figures
from fastface_trt.evaluation.judges import Column
from fastface_trt.evaluation.results import PictureResult
from fastface_trt.evaluation.run_view import (
    RunView,
    SettingView,
    axis_label,
    interval_text,
    read_view,
    verdict,
)
from fastface_trt.evaluation.tables import caution
from fastface_trt.measure.statistics import Interval
from fastface_trt.measure.style import DARK, LIGHT, encode
from fastface_trt.runtime.images import contact_sheet

EXAMPLES = 4
"""Best and worst pictures to show."""

_BYTES_PER_PIXEL: Final = 0.22  # of a photo-like picture as WebP at quality 82
_BUDGET_BYTES: Final = 3_600_000  # of all pictures of a page, before base64 makes 4/3 of it
_LARGEST, _SMALLEST = 448, 96
PEOPLE_IN_SHEET: Final = 6
COLUMNS_IN_SHEET: Final = 8
STRIPS: Final = 3
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


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingDependency(
            f"Reports need {error.name}.", f"Install it with: {install_hint('evaluate')}"
        ) from None
    text = (files(__package__) / "templates" / _TEMPLATE).read_text(encoding="utf-8")
    # Prompts and names come from files of others: everything is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text)


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
        ("Machine", _fields_text(record.machine)),
        ("Versions", _fields_text(record.versions)),
    ]
    return [(name, value) for name, value in facts if value]


def _fields_text(values: Mapping[str, Any]) -> str:
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


def plot_uri(png: bytes) -> str:
    """A plot as a data URI: lossless WebP takes a third of a PNG's bytes."""
    buffer = BytesIO()
    with Image.open(BytesIO(png)) as picture:
        picture.convert("RGB").save(buffer, "webp", lossless=True, quality=50, method=2)
    return data_uri(buffer.getvalue(), "image/webp")


def picture_uri(path: Path, side: int) -> str | None:
    """The picture as a data URI, at most `side` pixels on a side; None when it cannot be read."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    # Artefacts show most in small pictures, which cost little anyway.
    picture.save(buffer, "webp", quality=92 if max(picture.size) <= 160 else 82, method=4)
    return data_uri(buffer.getvalue(), "image/webp")


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes as a data URI."""
    return f"data:{media_type};base64,{b64encode(data).decode('ascii')}"


def side_for(count: int) -> int:
    """Side in pixels at which `count` pictures keep a page within its budget."""
    side = (_BUDGET_BYTES / _BYTES_PER_PIXEL / max(count, 1)) ** 0.5
    return int(min(_LARGEST, max(_SMALLEST, side)))


@dataclass(frozen=True, slots=True)
class Extremes:
    """The pictures of one setting that the identity judge likes best and least."""

    setting: SettingView
    best: tuple[PictureResult, ...]
    worst: tuple[PictureResult, ...]


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
    return [*sentences, *caution(fewest), _cost(run)]


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


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture with a line under it; `path` is None where there is no picture."""

    path: Path | None = None
    text: str = "no picture"
    alt: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A label with an optional face in front of the cells."""

    label: str
    face: Path | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Sheet:
    """Pictures under column labels; `corner` says what the first column is."""

    key: str
    heading: str
    caption: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def pictures(self) -> int:
        """How many pictures it shows."""
        return sum(cell.path is not None for row in self.rows for cell in row.cells)


def choose_sheets(run: RunView) -> list[Sheet]:
    """The sheets that axes and kept pictures allow: α × β, per-step strips, then all settings."""
    if not _pairs_with_pictures(run, run.settings):
        return []
    sheets = []
    found = alpha_beta_group(run)
    if found is not None:
        sheets += _grid(run, *found)
    for axis in run.axes.values():
        if axis.per_step:
            sheets += _strips(run, axis)
    return sheets + _contact_sheets(run)


def draw_sheet(sheet: Sheet, side: int = 160) -> Image.Image:
    """The sheet as one picture with cells of `side` pixels; missing pictures are grey."""
    return contact_sheet(
        [[_opened(cell, side) for cell in row.cells] for row in sheet.rows],
        column_labels=sheet.columns,
        cell=side,
        first_column=[_first(row, side) for row in sheet.rows],
        first_label=sheet.corner,
    )


def picture_cell(run: RunView, result: PictureResult | None, setting: str) -> Cell:
    """A cell with the picture's own scores under it; `setting` is how to call its setting."""
    path = run.picture(result)
    if result is None or path is None:
        return Cell()
    identity, clip = result.metrics.get("id"), result.metrics.get("clip")
    if identity is None:
        text = "no face found" if result.metrics.get("ffc") else ""
    else:
        text = f"ID {identity:.2f}" + ("" if clip is None else f" · clip {clip:.2f}")
    alt = f"{result.person}, “{result.prompt}”, {setting}"
    return Cell(path, text, alt, f"pair {result.pair}, seed {result.seed}")


def _contact_sheets(run: RunView) -> list[Sheet]:
    pairs = _pairs_with_pictures(run, run.done)[:PEOPLE_IN_SHEET]
    lines: dict[str | None, list[SettingView]] = {}
    for setting in run.done:
        lines.setdefault(setting.line, []).append(setting)
    if all(3 <= len(line) <= COLUMNS_IN_SHEET for line in lines.values()):
        parts = list(lines.values())  # one curve of the figures per sheet
    else:
        starts = range(0, len(run.done), COLUMNS_IN_SHEET)
        parts = [list(run.done[start : start + COLUMNS_IN_SHEET]) for start in starts]
    return [
        Sheet(
            f"contact-sheet-{number}" if len(parts) > 1 else "contact-sheet",
            f"Contact sheet {number} of {len(parts)}" if len(parts) > 1 else "Contact sheet",
            "Each row is one face and prompt with one noise, each column one setting. The rows "
            "are the first persons of the run, not chosen by their scores.",
            "face and prompt",
            tuple(setting.label for setting in part),
            tuple(_row(run, pair, part) for pair in pairs),
        )
        for number, part in enumerate(parts, 1)
    ]


def _grid(run: RunView, group: Group, alpha: Axis, beta: Axis) -> list[Sheet]:
    pairs = _pairs_with_pictures(run, group.settings)
    if not pairs:
        return []
    by_value = {
        (value_text(s.axes[alpha.name]), value_text(s.axes[beta.name])): s for s in group.settings
    }
    rows = []
    for a in reversed(alpha.values):
        cells = []
        for b in beta.values:
            setting = by_value.get((value_text(a), value_text(b)))
            found = run.results[setting.name].get(pairs[0]) if setting else None
            cells.append(picture_cell(run, found, setting.label if setting else ""))
        rows.append(Row(f"α = {alpha.scalar(a):g}", None, tuple(cells)))
    example = _example(run, pairs[0])
    return [
        Sheet(
            "pictures-alpha-beta",
            "Pictures over α and β",
            f"One face, prompt and noise in every cell: {example.person}, “{example.prompt}”. "
            "α grows upwards, β to the right.",
            "",
            tuple(f"β = {beta.scalar(b):g}" for b in beta.values),
            tuple(rows),
        )
    ]


def _strips(run: RunView, axis: Axis) -> list[Sheet]:
    sheets = []
    for number, group in enumerate(group_along(run, (axis.name,))):
        pairs = _pairs_with_pictures(run, group.settings)[:STRIPS]
        if len(group.settings) < 2 or not pairs:
            continue
        order = [value_text(value) for value in axis.values]
        settings = sorted(
            group.settings, key=lambda setting: order.index(value_text(setting.axes[axis.name]))
        )
        labels = [axis.text(setting.axes[axis.name]) for setting in settings]
        # What they are compared with stands in front, unless it is one of them.
        baseline = run.baseline_of(settings[-1])
        if baseline is not None and baseline not in settings:
            settings.insert(0, baseline)
            labels.insert(0, baseline.label)
        sheets.append(
            Sheet(
                f"strip-{axis.name}-{number + 1}",
                f"Effect step by step: {axis.label}"
                + ("" if group.label == "all" else f" ({group.label})"),
                "Each row is one face, prompt and noise; the columns differ only in the step at "
                "which the setting acts.",
                "face and prompt",
                tuple(labels),
                tuple(_row(run, pair, settings) for pair in pairs),
            )
        )
    return sheets


def _row(run: RunView, pair: int, settings: Sequence[SettingView]) -> Row:
    example = _example(run, pair)
    cells = tuple(
        picture_cell(run, run.results[setting.name].get(pair), setting.label)
        for setting in settings
    )
    return Row(f"{example.person}: {example.prompt}", run.face(example.person), cells)


def _example(run: RunView, pair: int) -> PictureResult:
    return next(found[pair] for found in run.results.values() if pair in found)


def _pairs_with_pictures(run: RunView, settings: Sequence[SettingView]) -> list[int]:
    """Pairs with a kept picture, those that most settings have first, a new person each first."""
    counts: dict[int, int] = {}
    for setting in settings:
        for pair, result in run.results[setting.name].items():
            if run.picture(result) is not None:
                counts[pair] = counts.get(pair, 0) + 1
    seen: dict[str, int] = {}
    turn = {}
    for pair in sorted(counts):
        person = _example(run, pair).person
        turn[pair] = seen.get(person, 0)
        seen[person] = turn[pair] + 1
    return sorted(counts, key=lambda pair: (-counts[pair], turn[pair], pair))


def _opened(cell: Cell, side: int) -> Image.Image:
    if cell.path is None:
        return _text_picture("no picture", side, "#e6e6e6")
    try:
        with Image.open(cell.path) as picture:
            return _square(picture.convert("RGB"))
    except OSError:
        return _text_picture("unreadable", side, "#e6e6e6")


def _first(row: Row, side: int) -> Image.Image:
    if row.face is not None:
        try:
            with Image.open(row.face) as picture:
                return _square(picture.convert("RGB"))
        except OSError:
            pass
    return _text_picture(row.label, side, "#ffffff")


def _square(picture: Image.Image) -> Image.Image:
    """The middle square of a picture: a face photo need not be one."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _text_picture(text: str, side: int, paper: str) -> Image.Image:
    picture = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(11, side // 13))
    draw.text((side // 2, side // 2), text[:28], fill="#404040", font=font, anchor="mm")
    return picture
