"""The floor of every stage of a measured call: what its module must compute and move."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Protocol

from fastface_trt.bench.flops import OperationCount, count_module
from fastface_trt.bench.roofline import Floor, MachineRates, floor, sum_floors
from fastface_trt.engines.manifest import ExportManifest


class StageWork(Protocol):
    """What a stage did in one call of the pipeline; modules but the UNet run one row a call."""

    @property
    def name(self) -> str:
        """The module's where a module ran."""
        ...

    @property
    def label(self) -> str:
        """What tables call the stage."""
        ...

    @property
    def calls(self) -> int:
        """How often the module was called."""
        ...

    @property
    def rows(self) -> int | None:
        """Rows of all UNet calls together, None for other modules."""
        ...

    @property
    def branches(self) -> int | None:
        """UNet rows per request, None for other modules."""
        ...


def stage_floors(
    stages: Iterable[StageWork],
    manifest: ExportManifest,
    export: Path,
    rates: MachineRates,
    *,
    height: int,
    width: int,
) -> dict[str, Floor]:
    """Least time of each stage that runs a module of the export, by the stage's label.

    `height` and `width` in pixels. Stages without a module (tokenising, PNG) are left out, and so
    is what computes no products of matrices. Raises what `count_module` raises.
    """
    factor = manifest.vae_scale_factor
    size = {"height": height // factor, "width": width // factor}

    @cache
    def count(module: str, batch: int, requests: int) -> OperationCount:
        path = export / manifest.modules[module].files[0].path
        return count_module(path, size | {"batch": batch, "requests": requests})

    floors: dict[str, Floor] = {}
    for stage in stages:
        if stage.name not in manifest.modules:
            continue
        # Calls of one stage hold equally many rows, or nearly so: the floor of the mean is theirs.
        batch = max(1, round((stage.rows or stage.calls) / stage.calls))
        counted = count(stage.name, batch, max(1, batch // (stage.branches or 1)))
        if counted.flops:
            floors[stage.label] = sum_floors([floor(counted, rates)] * stage.calls)
    return floors


__all__ = ["StageWork", "stage_floors"]
