"""TensorRT and TensorRT-RTX engines, two flavours of one Python API behind one code path.

`builder` builds a plan in a child process (`worker`, `plan`), `engine` runs one, `refit` gives a
built one other weights. What only one flavour has is a capability in `flavour`.
"""
