"""The same work by other means: PyTorch, diffusers and plain ONNX Runtime beside this runtime."""
