"""TensorRT and TensorRT-RTX engines, two flavours of one Python API behind one code path.

`builder` has a plan built in a child process (`plan`) or gives a built one other weights, `engine`
runs one. What only one flavour has is a capability in `flavour`.
"""
