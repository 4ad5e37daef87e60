"""CUDA kernels that can take the place of a graph's subroutine, and their compilation by NVRTC.

Optional: no engine needs them, and without `nvidia-cuda-nvrtc` and `cuda-python` only this package
is out of reach. Not run on a GPU so far; `decoupled_attention.cu` is executed thread by thread on
the CPU by its tests.
"""
