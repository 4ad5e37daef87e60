"""NVIDIA Triton: a model repository whose python_backend model owns the loop."""
