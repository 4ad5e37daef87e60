"""Comparing a backend with ONNX Runtime: whole modules, and the tensor where they part."""
