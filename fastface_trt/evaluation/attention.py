"""What the image tokens attend to: A and f(A) inside the exported UNet, over a whole generation.

The maps come out of the ONNX graph itself: a copy of the UNet that also returns them takes the
place of the UNet's engine while one picture is made on ONNX Runtime. So they are what was computed,
not what another implementation would have computed. They are drawn before and after manipulation,
as in figures 4 and 5 of the paper, with their numbers beside them.

Shape legend: B rows of a UNet call (the branches of one request), H heads, N query positions,
T image tokens, y × x latent grid of a block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt.engines import contract
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.device import Device, Tensor
from fastface_trt.engines.engine import Closing, Engine, EngineBuilder, Progress
from fastface_trt.engines.files import storage_errors, verify_files, write_text_durably
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.errors import (
    EngineFailed,
    ExportIncomplete,
    InvalidRequest,
    MissingDependency,
    UnknownName,
    install_hint,
)
from fastface_trt.measure.style import (
    LIGHT,
    Theme,
    add_legend,
    colour_bar,
    dress,
    empty_figure,
    encode,
    name_axes,
    new_figure,
    title,
)
from fastface_trt.runtime.export_folder import Export, ModuleSet
from fastface_trt.runtime.face import FaceAnalyzer
from fastface_trt.runtime.guidance import FACE, TEXT_AND_FACE
from fastface_trt.runtime.picture_file import write_picture
from fastface_trt.runtime.pipeline import FaceInput, FastFace
from fastface_trt.runtime.request import GenerationRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastface_trt.verify.marked_outputs import MarkableModule

Maps = NDArray[np.float32]
_BEFORE: Final = ("Softmax", re.compile(r"a_BHTN(_\d+)?"))
_AFTER: Final = ("Where", re.compile(r"f(_\d+)?"))
"""Operator and name of A and of f(A) in the body of `DecoupledAttention` (export/functions.py);
inlining numbers the names."""

NUMBERS = "attention.json"
BINS: Final = 50
_CELL: Final = 1.25  # inches per map


@dataclass(frozen=True)
class BlockMaps:
    """A and f(A) of one decoupled block in one step, float32 [B,H,N,T], rows as in `branches`.

    `shape` is the block's latent grid (y, x) with y · x = N, positions row by row.
    """

    block: str
    step: int
    branches: tuple[str, ...]
    shape: tuple[int, int]
    before: Maps
    after: Maps

    @property
    def face_branch(self) -> str:
        """The branch to look at: the last of this step that sees the face."""
        seen = [branch for branch in self.branches if branch in (FACE, TEXT_AND_FACE)]
        return (seen or list(self.branches))[-1]

    def grids(self, *, after: bool, branch: str | None = None) -> Maps:
        """One map per token, averaged over heads, float32 [T,y,x]; default: `face_branch`."""
        maps_BHNT = self.after if after else self.before
        row = self.branches.index(branch or self.face_branch)
        grids: Maps = maps_BHNT[row].mean(0).T.reshape(-1, *self.shape)
        return grids


@dataclass(frozen=True)
class AttentionRun:
    """One generated picture with the maps of the chosen blocks and steps, step by step."""

    request: GenerationRequest
    preset: str
    parameters: Mapping[str, Any]  # what a picture file of it carries
    picture: Image.Image
    maps: tuple[BlockMaps, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that were watched, in the UNet's order."""
        return tuple(dict.fromkeys(one.block for one in self.maps))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were watched, from 0."""
        return tuple(dict.fromkeys(one.step for one in self.maps))

    def at(self, block: str, step: int) -> BlockMaps:
        """The maps of one block and step; raise `KeyError` for one that was not watched."""
        for one in self.maps:
            if (one.block, one.step) == (block, step):
                return one
        raise KeyError((block, step))


def decoupled_blocks(export: str | Path = "mini") -> tuple[str, ...]:
    """Names of the decoupled blocks of an export's UNet, such as `up_blocks.0.attentions.1`.

    Raises `MissingDependency` without the export extra, `ExportIncomplete`, `ManifestError`.
    """
    return tuple(attention_tensors(open_unet(Export.open(export))))


def choose_blocks(known: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Blocks that match a pattern (`up_blocks.0*`, or a whole name), in the UNet's order.

    Without patterns the first block of down and the last of up, which have the finest grids. A
    pattern that matches nothing raises `UnknownName`.
    """
    if not patterns:
        down = [block for block in known if block.startswith("down")]
        up = [block for block in known if block.startswith("up")]
        return tuple(down[:1] + up[-1:]) or tuple(known[:1])
    for pattern in patterns:
        if not any(fnmatchcase(block, pattern) for block in known):
            raise UnknownName("decoupled block", pattern, known)
    return tuple(b for b in known if any(fnmatchcase(b, pattern) for pattern in patterns))


def collect_attention(
    face: FaceInput,
    prompt: str,
    *,
    export: str | Path = "mini",
    preset: str = "am1",
    blocks: Sequence[str] = (),
    steps: Sequence[int] | None = None,
    cache: Path | None = None,
    threads: int | None = None,
    licence_acknowledged: bool = False,
    progress: Progress = lambda line: None,
    **fields: Any,
) -> AttentionRun:
    """Generate one picture with a UNet that also returns its attention maps.

    `blocks` are patterns for `choose_blocks`, `steps` the steps to keep (from 0; None: all), and
    `fields` further fields of the request. It runs on ONNX Runtime's CPU provider; the copy of the
    UNet is built for this call and not cached. Keeps 8·B·H·N·T bytes per block and step.

    Raises `MissingDependency` without the export extra, `UnknownName` for a block,
    `InvalidRequest` for a step that the run has not, and the errors of `FastFace.generate`.
    """
    opened = Export.open(export)
    builder = OnnxRuntimeBuilder(threads=threads)
    modules = WatchedModules(opened, builder, EngineCache(cache), progress)
    faces = FaceAnalyzer.of_export(opened, licence_acknowledged=licence_acknowledged)
    # The copy's engine maps its weights from the folder, so it is closed first.
    with (
        TemporaryDirectory(prefix="fastface-attention-") as temporary,
        FastFace(modules, faces) as fastface,
    ):
        request = fastface.request(prompt, preset=preset, **fields)
        kept = _steps(request, steps)
        found = fastface.analyze(face)
        watched = modules.watch(Path(temporary), lambda known: choose_blocks(known, blocks))
        watched.keep = kept
        progress("Generating")
        result = fastface.generate([request], [found])
    _, *latent = opened.manifest.latent_shape(request.height, request.width)
    maps = tuple(
        BlockMaps(
            block,
            step,
            tuple(result.branches[0][step]),
            block_grid((latent[0], latent[1]), before.shape[2]),
            before,
            after,
        )
        for step, calls in enumerate(watched.calls)
        for block, (before, after) in calls.items()
    )
    return AttentionRun(request, preset, result.parameters[0], result.images[0], maps)


def _steps(request: GenerationRequest, steps: Sequence[int] | None) -> frozenset[int]:
    wanted = range(request.steps) if steps is None else steps
    for step in wanted:
        if not 0 <= step < request.steps:
            raise InvalidRequest(
                f"There is no step {step}.", f"Steps go from 0 to {request.steps - 1}."
            )
    return frozenset(wanted)


def block_grid(latent: tuple[int, int], positions: int) -> tuple[int, int]:
    """The grid (y, x) of a block with so many positions: latents halved, rounding up, 0 to 5 times.

    Raises `EngineFailed` when no halving gives that number.
    """
    y, x = latent
    for _ in range(6):
        if y * x == positions:
            return y, x
        y, x = (y + 1) // 2, (x + 1) // 2
    raise EngineFailed(f"{positions} positions are no halving of latents of {latent}.")


class WatchedModules(ModuleSet):
    """The modules of an export, with another engine in the place of the UNet once it is watched."""

    def __init__(
        self, export: Export, builder: EngineBuilder, cache: EngineCache, progress: Progress
    ) -> None:
        super().__init__(export, builder, cache, progress)
        self._say = progress
        self._unet: WatchedUnet | None = None

    def watch(self, folder: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> WatchedUnet:
        """Build a copy of the UNet in the empty `folder` that returns the maps of chosen blocks.

        Raises `MissingDependency` without the export extra, `ExportIncomplete`, `BuildFailed`,
        `StorageError`, and what `choose` raises when it is shown the names of the blocks.
        """
        markable = open_unet(self.export)
        tensors = attention_tensors(markable)
        blocks = choose(tuple(tensors))
        with storage_errors(folder):
            spec = markable.write([name for b in blocks for name in tensors[b]], folder / "onnx")
        self._say(f"Building a UNet that returns the maps of {len(blocks)} blocks")
        cache = EngineCache(folder / "engines")  # of no use to anybody afterwards
        engine = cache.open(spec, folder / "onnx", self.builder, self._say)
        names = {b: tuple(markable.output_name(name) for name in tensors[b]) for b in blocks}
        self._unet = WatchedUnet(engine, names)
        return self._unet

    def __getitem__(self, name: str) -> Engine:
        watched = self._unet if name == "unet" else None
        return watched or super().__getitem__(name)

    def close(self) -> None:
        """Close the UNet's copy with the others."""
        if self._unet is not None:
            self._unet.close()
        super().close()


class WatchedUnet(Closing):
    """A UNet engine that also returns attention maps, seen as the plain UNet by the loop.

    One request is denoised with it, so its calls are the steps in order.
    """

    def __init__(self, engine: Engine, names: Mapping[str, tuple[str, ...]]) -> None:
        outputs = tuple(t for t in engine.spec.outputs if t.name == contract.NOISE_PREDICTION)
        self.spec = engine.spec.model_copy(update={"outputs": outputs})
        self.request_counts = engine.request_counts
        self.keep: frozenset[int] = frozenset()
        self.calls: list[dict[str, tuple[Maps, Maps]]] = []
        self._engine, self._names = engine, names

    @property
    def device(self) -> Device:
        """Where its tensors live."""
        return self._engine.device

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the UNet, keep the maps of this step, return the noise prediction alone."""
        outputs = self._engine(**inputs)
        kept: dict[str, tuple[Maps, Maps]] = {}
        if len(self.calls) in self.keep:
            for block, (before, after) in self._names.items():
                a_BHTN = np.asarray(self.device.download(outputs[before]), dtype=np.float32)
                # Inside the function rows are requests × (branches · heads).
                f_BHTN = np.asarray(self.device.download(outputs[after]), dtype=np.float32)
                f_BHTN = f_BHTN.reshape(a_BHTN.shape)
                kept[block] = (a_BHTN.swapaxes(2, 3), f_BHTN.swapaxes(2, 3))
        self.calls.append(kept)
        return {contract.NOISE_PREDICTION: outputs[contract.NOISE_PREDICTION]}

    def close(self) -> None:
        """Close the engine behind it."""
        self._engine.close()


def open_unet(export: Export) -> MarkableModule:
    """The UNet of an export with its functions inlined; its files are verified first."""
    try:
        from fastface_trt.verify.marked_outputs import MarkableModule
    except ImportError as error:
        raise MissingDependency(
            f"Attention maps need {error.name}.",
            f"Install it with: {install_hint('export')}",
        ) from None
    module = export.manifest.modules["unet"]
    verify_files(export.folder, module.files)
    return MarkableModule(module, export.folder, inline=True)


def attention_tensors(markable: MarkableModule) -> dict[str, tuple[str, str]]:
    """The names of A and f(A) per decoupled block, in the UNet's order."""
    found: dict[str, dict[str, str]] = {}
    for name in markable.names:
        info = markable.info(name)
        for kind, (op, pattern) in (("before", _BEFORE), ("after", _AFTER)):
            if info.op == op and info.scope.endswith("attn2") and pattern.fullmatch(name):
                found.setdefault(_block(info.scope), {})[kind] = name
    if not found or any(len(pair) != 2 for pair in found.values()):
        raise ExportIncomplete(
            "The exported UNet has no attention maps that can be returned.",
            "It comes from an earlier version: export the model again.",
        )
    return {block: (pair["before"], pair["after"]) for block, pair in found.items()}


def _block(scope: str) -> str:
    """`unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2` without what all have."""
    return scope.removeprefix("unet.").removesuffix(".attn2").replace(".transformer_blocks.", ".")


def maps_figure(run: AttentionRun, block: str, theme: Theme = LIGHT) -> Figure:
    """The picture, and per step each token's map before and after, averaged over heads.

    All maps of one side share a colour scale, so that steps and tokens compare.
    """
    rows = [run.at(block, step) for step in run.steps]
    tokens, heads = rows[0].before.shape[3], rows[0].before.shape[1]
    figure = empty_figure(2.8 + _CELL * 2 * tokens + 1.6, 1.0 + _CELL * len(rows), theme)
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
                dress(axes, theme, grid=False)
                image = axes.imshow(grid[token], vmin=0, vmax=top, cmap=theme.sequence)
                axes.set_xticks([])
                axes.set_yticks([])
                name_axes(
                    axes,
                    f"token {token}" if row == 0 else "",
                    "x, latent cells" if row == len(rows) - 1 else "",
                    f"step {one.step}" if token == 0 else "",
                )
                axes.xaxis.label.set_fontsize(7)
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
    size = 1.0 + 2.3 * tokens, 1.2 + 1.55 * len(rows)
    figure, panels = new_figure(*size, len(rows), tokens, theme=theme, sharex=True, sharey=True)
    sides = [_sides(one) for one in rows]
    bins = np.linspace(0, max(float(after.max()) for _, after in sides), BINS + 1)
    for row, (one, (before, after)) in enumerate(zip(rows, sides, strict=True)):
        for token in range(tokens):
            axes = panels[row * tokens + token]
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
            name_axes(
                axes,
                f"token {token}" if row == 0 else "",
                "weight of the token" if row == len(rows) - 1 else "",
                f"step {one.step}\ncount" if token == 0 else "",
            )
    add_legend(panels[tokens - 1], theme=theme, loc="upper right")
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
    dress(axes, theme, grid=False)
    axes.imshow(np.asarray(run.picture))
    name_axes(axes, "", "x, pixels", "y, pixels")
    axes.set_title(_wrapped(run.request.prompt), fontsize=8, color=theme.ink)


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
