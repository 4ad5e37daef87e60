"""What a UNet is run on while its ranges are measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.engines.engine import Engine, Progress
from fastface_trt.engines.manifest import ExportManifest


class Calibration(Protocol):
    """Runs a UNet on typical inputs."""

    description: str
    """One line for the manifest: what the inputs were."""

    @property
    def latents(self) -> Sequence[NDArray[np.float32]]:
        """The latents [C,h,w] of every picture of the last run, for the VAE."""
        ...

    def run(self, unet: Engine, manifest: ExportManifest, folder: Path, progress: Progress) -> int:
        """Call `unet` on every input and return the number of rows.

        `folder` holds the other modules, exported already, and `manifest` describes them; the UNet
        is missing in both. May raise any `FastFaceError`.
        """
        ...


class RandomCalibration:
    """A few seeded random inputs, for random weights: the ranges mean as little as the weights."""

    description = "seeded standard normal inputs"

    def __init__(self, calls: int = 4, rows: int = 3, side: int = 16) -> None:
        self._calls, self._rows, self._side = calls, rows, side
        self.latents: list[NDArray[np.float32]] = []

    def run(self, unet: Engine, manifest: ExportManifest, folder: Path, progress: Progress) -> int:
        """See `Calibration`."""
        generator = np.random.default_rng(0)
        self.latents = []
        sizes = {
            "batch": self._rows,
            "requests": 1,
            "height": self._side,
            "width": self._side,
        }
        for call in range(self._calls):
            progress(f"unet: calibrating, call {call + 1} of {self._calls}")
            inputs = {
                tensor.name: generator.standard_normal(
                    [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
                ).astype(tensor.dtype)
                for tensor in unet.spec.inputs
            }
            self.latents += list(inputs[contract.SAMPLE].astype(np.float32))
            inputs[contract.TIMESTEP][:] = generator.integers(0, 1000)
            inputs[contract.TIME_IDS][:] = [
                manifest.height,
                manifest.width,
                0,
                0,
                manifest.height,
                manifest.width,
            ]
            inputs[contract.MANIPULATION][:] = 0
            unet(**inputs)
        return self._calls * self._rows
