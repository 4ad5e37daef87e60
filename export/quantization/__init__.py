"""8-bit UNets: which layers, which ranges, and the ONNX nodes that say so.

NVIDIA ModelOpt watches the PyTorch UNet while our own pipeline runs it (`ranges`), and we write
QuantizeLinear and DequantizeLinear into the graph that the exporter made anyway (`graph`), found by
the PyTorch module that every node names. ModelOpt's own ONNX quantiser would have to run the graph
with its functions in ONNX Runtime, renames what it touches, and its `onnx` extra asks for other
versions of onnx and onnxruntime than the rest of this package.

Only the UNet is quantised: it is nine tenths of the work of a picture. Attention products stay in
float16, the text ones because TensorRT fuses them as they are, the image ones because their maps go
through the manipulation, whose statistics 8 bits would bend.
"""
