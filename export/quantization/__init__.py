"""8-bit modules: which layers, which ranges, and the ONNX nodes that say so.

NVIDIA ModelOpt watches the PyTorch UNet while our own pipeline runs it (`ranges`), and we write
QuantizeLinear and DequantizeLinear into the graph that the exporter made anyway (`graph`), found by
the PyTorch module that every node names. ModelOpt's own ONNX quantiser would have to run the graph
with its functions in ONNX Runtime, renames what it touches, and its `onnx` extra asks for other
versions of onnx and onnxruntime than the rest of this package.

The UNet's layers are quantised, nine tenths of the work of a picture; on request its self and text
attention, and the convolutions of the VAE's decoder. The products of image attention stay in
float16, because their maps go through the manipulation, whose statistics 8 bits would bend.
"""
