"""What the image tokens attend to: A and f(A) inside the exported UNet, over a whole generation.

The maps come out of the ONNX graph itself: a copy of the UNet that also returns them takes the
place of the UNet's engine while one picture is made on ONNX Runtime. So they are what was computed,
not what another implementation would have computed.

Shape legend: B rows of a UNet call (the branches of one request), H heads, N query positions,
T image tokens, y × x latent grid of a block.
"""

import re
from collections.abc import Mapping, Sequence
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
from fastface_trt.engines.closing import Closing
from fastface_trt.engines.device import Device, Tensor
from fastface_trt.engines.engine import Engine, EngineBuilder, Progress
from fastface_trt.engines.files import storage_errors, verify_files
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.engines.onnxruntime import OnnxRuntimeBuilder
from fastface_trt.errors import (
    EngineFailed,
    ExportIncomplete,
    InvalidRequest,
    MissingDependency,
    UnknownName,
)
from fastface_trt.pipeline import FaceInput, FastFace, find_export
from fastface_trt.runtime.face import FaceAnalyzer
from fastface_trt.runtime.guidance import FACE, TEXT_AND_FACE
from fastface_trt.runtime.modules import ModuleSet
from fastface_trt.runtime.request import GenerationRequest

if TYPE_CHECKING:
    from fastface_trt.export.marked_outputs import MarkableModule

Maps = NDArray[np.float32]

_BEFORE: Final = ("Softmax", re.compile(r"a_BHTN(_\d+)?"))
_AFTER: Final = ("Where", re.compile(r"f(_\d+)?"))
"""Operator and name of A and of f(A) in the body of `DecoupledAttention` (export/functions.py);
inlining numbers the names."""


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
        return maps_BHNT[row].mean(0).T.reshape(-1, *self.shape)


@dataclass(frozen=True)
class AttentionRun:
    """One generated picture with the maps of the chosen blocks and steps, step by step."""

    request: GenerationRequest
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
    return tuple(_tensors(_opened(find_export(export))))


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
    markable = _opened(folder)
    tensors = _tensors(markable)
    chosen = choose_blocks(tuple(tensors), blocks)
    with TemporaryDirectory(prefix="fastface-attention-") as temporary:
        root = Path(temporary)
        with storage_errors(root):
            spec = markable.write([name for b in chosen for name in tensors[b]], root / "onnx")
        progress(f"Building a UNet that returns the maps of {len(chosen)} blocks")
        engine = EngineCache(root / "engines").open(spec, root / "onnx", builder, progress)
        names = {b: tuple(markable.output_name(name) for name in tensors[b]) for b in chosen}
        watched = _WatchedUnet(engine, names)
        modules = _WatchedModules(folder, builder, EngineCache(cache), progress, watched)
        name = modules.manifest.face_model
        local = folder / name
        faces = FaceAnalyzer(
            local if local.is_dir() else name, licence_acknowledged=licence_acknowledged
        )
        with FastFace(modules, faces) as fastface:
            request = fastface.request(prompt, preset=preset, **fields)
            wanted = tuple(range(request.steps)) if steps is None else tuple(steps)
            for step in wanted:
                if not 0 <= step < request.steps:
                    raise InvalidRequest(
                        f"There is no step {step}.", f"Steps go from 0 to {request.steps - 1}."
                    )
            watched.keep = frozenset(wanted)
            progress("Generating")
            result = fastface.generate([request], [face])
            scale = fastface.manifest.vae_scale_factor
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
    return AttentionRun(request, result.parameters[0], result.images[0], maps)


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


class _WatchedUnet(Closing):
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


class _WatchedModules(ModuleSet):
    """The modules of an export with another engine in the place of the UNet."""

    def __init__(
        self,
        export: Path,
        builder: EngineBuilder,
        cache: EngineCache,
        progress: Progress,
        unet: _WatchedUnet,
    ) -> None:
        super().__init__(export, builder, cache, progress)
        self._unet = unet

    def __getitem__(self, name: str) -> Engine:
        return self._unet if name == "unet" else super().__getitem__(name)

    def close(self) -> None:
        """Close the UNet's copy with the others."""
        self._unet.close()
        super().close()


def _opened(folder: Path) -> "MarkableModule":
    """The UNet of an export with its functions inlined; its files are verified first."""
    try:
        from fastface_trt.export.marked_outputs import MarkableModule
    except ImportError as error:
        raise MissingDependency(
            f"Attention maps need {error.name}.",
            "Install it with: pip install 'fastface-trt[export]'.",
        ) from None
    module = read_manifest(folder / EXPORT_MANIFEST, ExportManifest).modules["unet"]
    verify_files(folder, module.files)
    return MarkableModule(module, folder, inline=True)


def _tensors(markable: "MarkableModule") -> dict[str, tuple[str, str]]:
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
