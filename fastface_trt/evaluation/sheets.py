"""Pictures of a run in rows and columns: contact sheets, α × β grids, strips of per-step effects.

A sheet is data; the report shows it as a table of pictures, `draw_sheet` as one PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from fastface_trt.evaluation.axes import Axis, Group, group_along, value_text
from fastface_trt.evaluation.figures import alpha_beta_group
from fastface_trt.evaluation.results import PictureResult
from fastface_trt.evaluation.run_view import RunView, SettingView
from fastface_trt.grid import contact_sheet

PEOPLE_IN_SHEET: Final = 6
COLUMNS_IN_SHEET: Final = 8
STRIPS: Final = 3


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
