"""Export: from an SDXL checkpoint and an adapter to ONNX modules. The only importer of torch.

In the order of one export: `checkpoints` (what the names mean), `options`, `sources` and `weights`
(models on disk), `adapter` and `projection` (the face), `attention` and `functions` (decoupled
attention, eager and as ONNX), `modules` (what is exported), `onnx_writer` (one module), `exporter`
(all of them and the manifest). `oracle` runs the same UNet in PyTorch.
"""
