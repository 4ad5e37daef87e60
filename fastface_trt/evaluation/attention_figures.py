"""Figures of attention maps before and after manipulation, and their numbers (figures 4 and 5).

Shape legend: H heads, N query positions, T image tokens, y × x latent grid of a block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastface_trt.engines.files import storage_errors, write_text_durably
from fastface_trt.evaluation.attention_maps import AttentionRun, BlockMaps
from fastface_trt.evaluation.style import (
    LIGHT,
    Theme,
    colour_bar,
    dress,
    dress_legend,
    encode,
    new_figure,
    title,
)
from fastface_trt.runtime.picture_file import write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = "attention.json"
BINS: Final = 50
_CELL: Final = 1.25  # inches per map


def maps_figure(run: AttentionRun, block: str, theme: Theme = LIGHT) -> Figure:
    """The picture, and per step each token's map before and after, averaged over heads.

    All maps of one side share a colour scale, so that steps and tokens compare.
    """
    rows = [run.at(block, step) for step in run.steps]
    tokens, heads = rows[0].before.shape[3], rows[0].before.shape[1]
    figure = new_figure(2.8 + _CELL * 2 * tokens + 1.6, 1.0 + _CELL * len(rows), theme)
    ratios = [2.8, _CELL * tokens + 0.8, _CELL * tokens + 0.8]
    parts: Any = figure.subfigures(1, 3, width_ratios=ratios)
    left, middle, right = parts
    for part in (left, middle, right):
        part.set_facecolor(theme.paper)
    _picture(left, run, theme)
    for part, after, name, quantity in (
        (middle, False, "A, before", "weight of the token (softmax)"),
        (right, True, "f(A), after", "weight after manipulation"),
    ):
        grids = [one.grids(after=after) for one in rows]
        top = max(float(grid.max()) for grid in grids)
        panels = part.subplots(len(rows), tokens, squeeze=False)
        for row, (one, grid) in enumerate(zip(rows, grids, strict=True)):
            for token in range(tokens):
                axes = panels[row][token]
                image = axes.imshow(grid[token], vmin=0, vmax=top, cmap=theme.sequence)
                axes.set_xticks([])
                axes.set_yticks([])
                if row == 0:
                    axes.set_title(f"token {token}")
                if token == 0:
                    axes.set_ylabel(f"step {one.step}")
                if row == len(rows) - 1:
                    axes.set_xlabel("x, latent cells", fontsize=7)
                dress(axes, theme, grid=False)
        part.suptitle(name, color=theme.ink, fontsize=11)
        colour_bar(part, image, panels, quantity, theme)
    y, x = rows[0].shape
    branches = "/".join(dict.fromkeys(one.face_branch for one in rows))
    title(
        figure,
        f"Image tokens in {block} ({y}×{x} positions), branch {branches}, mean of {heads} heads, "
        f"n = 1 picture",
        theme,
    )
    return figure


def histogram_figure(run: AttentionRun, block: str, theme: Theme = LIGHT) -> Figure:
    """Histograms of A and f(A) per step and token, over heads and positions."""
    rows = [run.at(block, step) for step in run.steps]
    tokens = rows[0].before.shape[3]
    figure = new_figure(1.0 + 2.3 * tokens, 1.2 + 1.55 * len(rows), theme)
    panels = figure.subplots(len(rows), tokens, sharex=True, sharey=True, squeeze=False)
    sides = [_sides(one) for one in rows]
    bins = np.linspace(0, max(float(after.max()) for _, after in sides), BINS + 1)
    for row, (one, (before, after)) in enumerate(zip(rows, sides, strict=True)):
        for token in range(tokens):
            axes = panels[row][token]
            axes.hist(
                before[..., token].ravel(), bins, color=theme.colour(0), alpha=0.45, label="A"
            )
            axes.hist(
                after[..., token].ravel(),
                bins,
                color=theme.colour(1),
                histtype="step",
                linewidth=1.4,
                label="f(A)",
            )
            axes.set_yscale("log")
            if row == 0:
                axes.set_title(f"token {token}")
            if token == 0:
                axes.set_ylabel(f"step {one.step}\ncount")
            if row == len(rows) - 1:
                axes.set_xlabel("weight of the token")
            dress(axes, theme)
    dress_legend(panels[0][-1].legend(loc="upper right"), theme)
    heads, positions = before.shape[:2]
    title(
        figure,
        f"A before and after f in {block}, n = {heads * positions} per panel "
        f"({heads} heads × {positions} positions)",
        theme,
    )
    return figure


def attention_numbers(run: AttentionRun) -> dict[str, Any]:
    """Parameters and, per block, step and token, mean, minimum, quartiles and maximum of both."""
    return {
        "schema_version": 1,
        "preset": run.preset,
        "parameters": dict(run.parameters),
        "maps": [
            {
                "block": one.block,
                "step": one.step,
                "branch": one.face_branch,
                "grid": list(one.shape),
                "heads": one.before.shape[1],
                "before": [_summary(before[..., t]) for t in range(before.shape[-1])],
                "after": [_summary(after[..., t]) for t in range(after.shape[-1])],
            }
            for one in run.maps
            for before, after in [_sides(one)]
        ],
    }


def write_attention(run: AttentionRun, out: Path) -> list[Path]:
    """Write the picture, two figures per block, the maps (`maps.npz`) and the numbers into `out`.

    `maps.npz` holds float32 [B,H,N,T] as `BLOCK/stepS/before` and `…/after`. Returns the files.
    Raises `StorageError`, `MissingDependency` without matplotlib.
    """
    figures = {}
    for block in run.blocks:
        figures[f"maps-{block}.png"] = encode(maps_figure(run, block))
        figures[f"histogram-{block}.png"] = encode(histogram_figure(run, block))
    arrays = {}
    for one in run.maps:
        arrays[f"{one.block}/step{one.step}/before"] = one.before
        arrays[f"{one.block}/step{one.step}/after"] = one.after
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_picture(out / "picture.png", np.asarray(run.picture), parameters=run.parameters)
        for name, data in figures.items():
            (out / name).write_bytes(data)
        np.savez_compressed(out / "maps.npz", **arrays)  # type: ignore[arg-type]
        write_text_durably(out / NUMBERS, json.dumps(attention_numbers(run), indent=1) + "\n")
    return [out / name for name in ("picture.png", *figures, "maps.npz", NUMBERS)]


def read_attention(folder: Path) -> list[tuple[str, str, Path]]:
    """Heading, caption and file of every figure that `write_attention` left in `folder`.

    Empty where nothing was written there, or where it cannot be read.
    """
    try:
        numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
        request = numbers["parameters"]
        told = f"{request['prompt']}, seed {request['seed']}, {numbers['preset']}"
    except (OSError, ValueError, KeyError, TypeError):
        return []
    figures = []
    for kind, heading, reading in (
        ("maps", "Attention maps", "Brighter positions listen more to that token of the face."),
        ("histogram", "Histograms", "How often each weight occurs before and after f."),
    ):
        for path in sorted(folder.glob(f"{kind}-*.png")):
            block = path.stem.removeprefix(f"{kind}-")
            caption = f"{reading} One picture, so an example and no statistics: {told}."
            figures.append((f"{heading} of {block}", caption, path))
    return figures


def _picture(part: Any, run: AttentionRun, theme: Theme) -> None:
    axes = part.subplots()
    axes.imshow(np.asarray(run.picture))
    axes.set_xlabel("x, pixels")
    axes.set_ylabel("y, pixels")
    dress(axes, theme, grid=False)
    axes.set_title(_wrapped(run.request.prompt), fontsize=8)


def _wrapped(text: str, width: int = 32) -> str:
    from textwrap import shorten, wrap

    # A dollar would start mathematics.
    return "\n".join(wrap(shorten(text, 160, placeholder=" …"), width)).replace("$", r"\$")


def _sides(one: BlockMaps) -> tuple[Any, Any]:
    """A and f(A) of the branch to look at, [H,N,T] each."""
    row = one.branches.index(one.face_branch)
    return one.before[row], one.after[row]


def _summary(values: Any) -> dict[str, float]:
    low, quarter, middle, three, high = (
        float(x) for x in np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    )
    return {
        "mean": float(values.mean()),
        "min": low,
        "q25": quarter,
        "median": middle,
        "q75": three,
        "max": high,
    }
