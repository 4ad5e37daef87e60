"""The model's inputs and outputs in Triton: what a KServe v2 client sends and gets.

Shape legend: B pictures of one request, H × W pixels.
"""

from dataclasses import dataclass
from enum import Enum

PROMPT, PARAMETERS, SEED = "PROMPT", "PARAMETERS", "SEED"
FACE, FACE_FILE = "FACE", "FACE_FILE"
FACE_EMBEDDING, FACE_CROP_BGR = "FACE_EMBEDDING", "FACE_CROP_BGR"
IMAGE, IMAGE_PARAMETERS = "IMAGE", "IMAGE_PARAMETERS"
STEP, PREVIEW = "STEP", "PREVIEW"
EMBEDDING_SIZE, CROP_SIDE = 512, 224


class DataType(Enum):
    """The types of our tensors; the values are those of the proto."""

    TYPE_UINT8 = 2
    TYPE_UINT64 = 5
    TYPE_INT32 = 8
    TYPE_FP32 = 11
    TYPE_STRING = 13


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """A `ModelInput` or `ModelOutput`; `dims` leave out the batch, −1 is any size.

    `optional` and `allow_ragged_batch` are of inputs only.
    """

    name: str
    data_type: DataType
    dims: tuple[int, ...]
    allow_ragged_batch: bool = False
    optional: bool = False


def _text(name: str, *, optional: bool) -> TensorConfig:
    return TensorConfig(name, DataType.TYPE_STRING, (1,), optional=optional)


INPUTS = (
    _text(PROMPT, optional=False),
    TensorConfig(FACE, DataType.TYPE_UINT8, (-1, -1, 3), allow_ragged_batch=True, optional=True),
    _text(FACE_FILE, optional=True),
    TensorConfig(FACE_EMBEDDING, DataType.TYPE_FP32, (EMBEDDING_SIZE,), optional=True),
    TensorConfig(FACE_CROP_BGR, DataType.TYPE_UINT8, (CROP_SIDE, CROP_SIDE, 3), optional=True),
    _text(PARAMETERS, optional=True),
    TensorConfig(SEED, DataType.TYPE_UINT64, (1,), optional=True),
)
"""PROMPT: text in UTF-8. The face is one of FACE (RGB pixels), FACE_FILE (the bytes of a PNG, JPEG,
WebP, BMP or TIFF file), or FACE_EMBEDDING with FACE_CROP_BGR (a `Face` that was analysed before).
PARAMETERS: a JSON object, see `served.Parameters`. SEED: 0 to 2⁶⁴−1. Pictures of different sizes
may share one of Triton's batches, since the python backend gets requests one by one."""
OUTPUTS = (
    TensorConfig(IMAGE, DataType.TYPE_UINT8, (-1, -1, 3)),
    TensorConfig(IMAGE_PARAMETERS, DataType.TYPE_STRING, (1,)),
)
"""IMAGE: RGB, uint8 [B,H,W,3]. IMAGE_PARAMETERS: JSON [B,1] with `parameters` (what a PNG of ours
stores), `warnings` and `seconds`."""
STEP_OUTPUTS = (
    TensorConfig(STEP, DataType.TYPE_INT32, (2,)),
    TensorConfig(PREVIEW, DataType.TYPE_UINT8, (-1, -1, 3)),
)
"""Of a decoupled model only. STEP: [1,2], the step that is done, counted from 1, and how many there
are. PREVIEW: small RGB [1,h,w,3] of the latents, where PARAMETERS asks for previews."""
