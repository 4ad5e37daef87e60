"""Element types: the name used here for each, and what every library calls it.

A name such as float16 is numpy's and ONNX's word in lower case. What a module takes and returns is
of a `DType`; weights inside a graph may be of further types.
"""

from typing import Final, Literal, NamedTuple, TypeAlias

DType: TypeAlias = Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8"]
"""Element types of inputs and outputs."""


class _Names(NamedTuple):
    """An element type elsewhere; empty or None where a library has no name that is used here.

    typestr: of numpy's and the CUDA array interface. dlpack: DLDataTypeCode and bits.
    """

    bytes: int
    onnx: int
    typestr: str = ""
    dlpack: tuple[int, int] | None = None
    onnxruntime: str = ""
    tensorrt: str = ""


_INPUTS_AND_OUTPUTS: Final[dict[DType, _Names]] = {
    "float32": _Names(4, 1, "<f4", (2, 32), "tensor(float)", "FLOAT"),
    "float16": _Names(2, 10, "<f2", (2, 16), "tensor(float16)", "HALF"),
    "bfloat16": _Names(2, 16, "", (4, 16), "tensor(bfloat16)", "BF16"),
    "int64": _Names(8, 7, "<i8", (0, 64), "tensor(int64)", "INT64"),
    "int32": _Names(4, 6, "<i4", (0, 32), "tensor(int32)", "INT32"),
    "uint8": _Names(1, 2, "|u1", (1, 8), "tensor(uint8)", "UINT8"),
}
_WEIGHTS_ONLY: Final[dict[str, _Names]] = {
    "float64": _Names(8, 11),
    "float8_e4m3fn": _Names(1, 17, tensorrt="FP8"),
    "int8": _Names(1, 3, tensorrt="INT8"),
    "bool": _Names(1, 9),
}
_ALL: Final[dict[str, _Names]] = {str(k): v for k, v in _INPUTS_AND_OUTPUTS.items()} | _WEIGHTS_ONLY

ITEM_BYTES: Final[dict[DType, int]] = {
    name: names.bytes for name, names in _INPUTS_AND_OUTPUTS.items()
}
TYPESTR: Final[dict[str, str]] = {
    name: names.typestr for name, names in _INPUTS_AND_OUTPUTS.items() if names.typestr
}
"""bfloat16 has none: numpy lacks it."""

FROM_TYPESTR: Final[dict[str, DType]] = {
    names.typestr: name for name, names in _INPUTS_AND_OUTPUTS.items() if names.typestr
}
DLPACK: Final[dict[DType, tuple[int, int]]] = {
    name: names.dlpack for name, names in _INPUTS_AND_OUTPUTS.items() if names.dlpack
}
FROM_DLPACK: Final[dict[tuple[int, int], DType]] = {code: name for name, code in DLPACK.items()}
FROM_ONNX: Final[dict[int, str]] = {names.onnx: name for name, names in _ALL.items()}
"""By TensorProto.DataType."""

FROM_ONNXRUNTIME: Final[dict[str, DType]] = {
    names.onnxruntime: name for name, names in _INPUTS_AND_OUTPUTS.items()
}
TENSORRT: Final[dict[str, str]] = {
    name: names.tensorrt for name, names in _ALL.items() if names.tensorrt
}
"""Names of tensorrt.DataType."""

FROM_TENSORRT: Final[dict[str, str]] = {there: name for name, there in TENSORRT.items()}

AS_INTEGERS: Final = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
"""What numpy holds the types as that it lacks."""

WEIGHTS: Final = frozenset(
    ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "int8", "uint8")
)
"""Types that training or quantisation gives to weights; other integers are axes and shapes."""
