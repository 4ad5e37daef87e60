"""A UNet engine that also returns attention maps, in the place of the UNet that a generation uses.

Shape legend: B rows of a UNet call (the branches of one request), H heads, N query positions,
T image tokens.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.closing import Closing
from fastface_trt.engines.device import Device, Tensor
from fastface_trt.engines.engine import Engine, EngineBuilder, Progress
from fastface_trt.engines.files import storage_errors, verify_files
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import ExportIncomplete, MissingDependency
from fastface_trt.runtime.modules import ModuleSet

if TYPE_CHECKING:
    from fastface_trt.export.marked_outputs import MarkableModule

Maps = NDArray[np.float32]

_BEFORE: Final = ("Softmax", re.compile(r"a_BHTN(_\d+)?"))
_AFTER: Final = ("Where", re.compile(r"f(_\d+)?"))
"""Operator and name of A and of f(A) in the body of `DecoupledAttention` (export/functions.py);
inlining numbers the names."""


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


class WatchedModules(ModuleSet):
    """The modules of an export, with another engine in the place of the UNet once it is watched."""

    def __init__(
        self, export: Path, builder: EngineBuilder, cache: EngineCache, progress: Progress
    ) -> None:
        super().__init__(export, builder, cache, progress)
        self._say = progress
        self._unet: WatchedUnet | None = None

    def watch(self, folder: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> WatchedUnet:
        """Build a copy of the UNet in the empty `folder` that returns the maps of chosen blocks.

        Raises `MissingDependency` without the export extra, `ExportIncomplete`, `BuildFailed`,
        `StorageError`, and what `choose` raises when it is shown the names of the blocks.
        """
        markable = open_unet(self.folder)
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


def open_unet(folder: Path) -> "MarkableModule":
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


def attention_tensors(markable: "MarkableModule") -> dict[str, tuple[str, str]]:
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
