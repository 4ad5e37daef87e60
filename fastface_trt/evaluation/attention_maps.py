"""What the image tokens attend to: A and f(A) inside the exported UNet, over a whole generation.

The maps come out of the ONNX graph itself: a copy of the UNet that also returns them takes the
place of the UNet's engine while one picture is made on ONNX Runtime. So they are what was computed,
not what another implementation would have computed.

Shape legend: B rows of a UNet call (the branches of one request), H heads, N query positions,
T image tokens, y × x latent grid of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.onnxruntime import OnnxRuntimeBuilder
from fastface_trt.errors import EngineFailed, InvalidRequest, UnknownName
from fastface_trt.evaluation.watched_unet import (
    Maps,
    WatchedModules,
    attention_tensors,
    open_unet,
)
from fastface_trt.export_folder import find_export
from fastface_trt.pipeline import FaceInput, FastFace
from fastface_trt.runtime.face import FaceAnalyzer
from fastface_trt.runtime.guidance import FACE, TEXT_AND_FACE
from fastface_trt.runtime.request import GenerationRequest


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
    return tuple(attention_tensors(open_unet(find_export(export))))


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
    folder = find_export(export)
    builder = OnnxRuntimeBuilder(threads=threads)
    modules = WatchedModules(folder, builder, EngineCache(cache), progress)
    manifest = modules.manifest
    local = folder / manifest.face_model
    faces = FaceAnalyzer(
        local if local.is_dir() else manifest.face_model, licence_acknowledged=licence_acknowledged
    )
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
    scale = manifest.vae_scale_factor
    latent = (request.height // scale, request.width // scale)
    maps = tuple(
        BlockMaps(
            block,
            step,
            tuple(result.branches[0][step]),
            block_grid(latent, before.shape[2]),
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
