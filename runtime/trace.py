"""What a step callback is shown."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.device import Device, Tensor

Array: TypeAlias = NDArray[np.float32]


class StepTrace:
    """What happened to one request in one step; arrays are float32 [C,h,w].

    `job` is the request's index, `step` counts from 0 to `steps` − 1. The arrays cross from a GPU
    when they are read, each time: a callback that reads none of them costs no copy to the host.
    """

    __slots__ = (
        "_device",
        "_guided",
        "_latents",
        "_model_input",
        "_predictions",
        "job",
        "step",
        "steps",
    )

    def __init__(
        self,
        job: int,
        step: int,
        steps: int,
        device: Device,
        *,
        model_input: Tensor,
        predictions: Mapping[str, Tensor],
        guided: Tensor,
        latents: Tensor,
    ) -> None:
        self.job, self.step, self.steps = job, step, steps
        self._device = device
        self._model_input, self._predictions = model_input, predictions
        self._guided, self._latents = guided, latents

    @property
    def model_input(self) -> Array:
        """What the UNet was given, k x."""
        return self._read(self._model_input)

    @property
    def predictions(self) -> dict[str, Array]:
        """The UNet's noise prediction by branch."""
        return {branch: self._read(tensor) for branch, tensor in self._predictions.items()}

    @property
    def guided(self) -> Array:
        """The guided prediction ε of Eq. 5."""
        return self._read(self._guided)

    @property
    def latents(self) -> Array:
        """The latents after the step, x'."""
        return self._read(self._latents)

    def _read(self, tensor: Tensor) -> NDArray[Any]:
        return self._device.download(tensor).astype(np.float32, copy=False)


OnStep = Callable[[StepTrace], bool | None]
"""Called after each step of each request; returning False cancels the run."""
