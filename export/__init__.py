"""Export: from an SDXL checkpoint and an adapter to ONNX modules. The only importer of torch.

In the order of one export: `options`, `sources` and `weights` (models on disk), `adapters` (the
face), `attention` and `functions` (decoupled attention, eager and as ONNX), `modules` (what is
exported), `onnx_writer` (one module), `exporter` (all of them and the manifest). `oracle` runs the
same UNet in PyTorch.
"""

from importlib.util import find_spec

from fastface_trt.errors import MissingDependency, install_hint


class TorchMissing(MissingDependency, ImportError):
    """Nothing of this package can be imported; an `ImportError` for who says more than this."""


if find_spec("torch") is None:
    missing = TorchMissing("Exporting needs torch.", f"Install it with: {install_hint('export')}")
    missing.name = "torch"
    raise missing
