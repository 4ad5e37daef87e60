"""CUDA kernels that can take the place of a graph's subroutine, and the ways to launch them.

ONNX Runtime gets them as a custom operator that is shipped (`operator_library`), TensorRT as
plugins (`engines/tensorrt/plugin.py`), Python from `AttentionKernel`; the last two compile them by
NVRTC and need `nvidia-cuda-nvrtc` and `cuda-python`. The kernels ran on an H100: every shape and
kind within 2.1e-4 of float64 in fp16. Tests execute them thread by thread on the CPU.
"""
