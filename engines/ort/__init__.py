"""ONNX Runtime: engines on a CPU and on its GPU providers."""
