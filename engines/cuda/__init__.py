"""Device memory and streams of an NVIDIA GPU, through the CUDA driver and without torch.

`driver` wraps the calls, `stream` is what one thread works with, `device` is the `Device` that the
runtime sees, `graphs` replays an engine's work.
"""
