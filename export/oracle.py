"""The PyTorch oracle: the UNet in eager PyTorch behind the same call as an engine.

It runs the eager arithmetic of `attention` with torch's own quantile, so it is a reference for
engines of any backend, in float32 or float64.
"""

import numpy as np
import torch

from fastface_trt.engines.closing import Closing
from fastface_trt.engines.contract import NOISE_PREDICTION
from fastface_trt.engines.device import HostDevice, Tensor
from fastface_trt.engines.engine import host_arrays
from fastface_trt.engines.manifest import DType, ModuleSpec, TensorSpec
from fastface_trt.export.model import Model
from fastface_trt.export.modules import UNetModule, unet_export

_NUMPY_NAMES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
}


class TorchUNet(Closing):
    """A diffusers UNet with its adapter attached, called with numpy arrays like an engine."""

    def __init__(self, unet: Model, tokens: int = 4) -> None:
        export = unet_export(unet, tokens=tokens, latent_size=(16, 16), fixed_size=False)
        self._module = UNetModule(unet).eval()
        self._torch_device = unet.device
        self.device = HostDevice()
        self.request_counts = None

        def spec(name: str, dtype: torch.dtype) -> TensorSpec:
            return TensorSpec(name=name, dtype=_NUMPY_NAMES[dtype], shape=export.shapes[name])

        inputs = tuple(spec(name, tensor.dtype) for name, tensor in export.inputs.items())
        outputs = (spec(NOISE_PREDICTION, torch.float32),)
        self.spec = ModuleSpec.model_construct(
            name="unet", inputs=inputs, outputs=outputs, files=()
        )

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The noise prediction; inputs as in `fastface_trt.engines.contract`."""
        with torch.no_grad():
            tensors = {
                name: torch.from_numpy(np.ascontiguousarray(array)).to(self._torch_device)
                for name, array in host_arrays(self.spec, inputs).items()
            }
            return {NOISE_PREDICTION: self._module(**tensors).cpu().numpy()}

    def close(self) -> None:
        """Nothing to free beyond the module itself."""
