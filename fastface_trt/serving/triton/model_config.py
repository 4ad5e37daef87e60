"""A typed description of the part of Triton's `ModelConfig` that we use, and its text form.

Names, nesting and enums are those of `model_config.proto` in triton-inference-server/common. Fields
at their default are left out, as protobuf does.

The model's inputs and outputs: what a KServe v2 client sends and gets.

Shape legend: B pictures of one request, H × W pixels.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any


class DataType(Enum):
    """The types of our tensors; the values are those of the proto."""

    TYPE_UINT8 = 2
    TYPE_UINT64 = 5
    TYPE_INT32 = 8
    TYPE_FP32 = 11
    TYPE_STRING = 13


class InstanceKind(Enum):
    """Where an instance runs: `ModelInstanceGroup.Kind`."""

    KIND_GPU = 1
    KIND_CPU = 2


class TimeoutAction(Enum):
    """What becomes of a request that waited too long: `ModelQueuePolicy.TimeoutAction`."""

    REJECT = 0
    DELAY = 1


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


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """`count` processes of the model, for each of `gpus` (all, where none is named) or the CPU."""

    kind: InstanceKind
    count: int = 1
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How long and how many requests may wait in Triton; 0 stands for no limit."""

    timeout_action: TimeoutAction = TimeoutAction.REJECT
    default_timeout_microseconds: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0


@dataclass(frozen=True, slots=True)
class DynamicBatching:
    """How Triton collects requests before it hands them over together."""

    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()


@dataclass(frozen=True, slots=True)
class TransactionPolicy:
    """Whether a request may get any number of responses."""

    decoupled: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model of the python backend; `parameters` become `ModelParameter.string_value`."""

    name: str
    max_batch_size: int
    input: tuple[TensorConfig, ...]
    output: tuple[TensorConfig, ...]
    instance_group: tuple[InstanceGroup, ...]
    dynamic_batching: DynamicBatching = DynamicBatching()
    model_transaction_policy: TransactionPolicy = TransactionPolicy()
    parameters: Mapping[str, str] = field(default_factory=dict)
    backend: str = "python"

    def to_text(self) -> str:
        """The config as `config.pbtxt` holds it."""
        return "\n".join(_message(self, "")) + "\n"


def _message(message: Any, indent: str) -> Iterator[str]:
    for one in fields(message):
        value = getattr(message, one.name)
        if isinstance(value, Mapping):
            yield from _parameters(one.name, value, indent)
        elif isinstance(value, tuple) and value and not is_dataclass(value[0]):
            yield f"{indent}{one.name}: [ {', '.join(map(_scalar, value))} ]"
        elif isinstance(value, tuple):
            for item in value:
                yield from _nested(one.name, item, indent)
        elif one.name == "dynamic_batching":  # which, even empty, switches it on
            yield from _nested(one.name, value, indent)
        elif value != one.default:
            if is_dataclass(value):
                yield from _nested(one.name, value, indent)
            else:
                yield f"{indent}{one.name}: {_scalar(value)}"
        elif one.name in (
            "backend",
            "timeout_action",
            "count",
        ):  # these defaults are ours, or worth seeing
            yield f"{indent}{one.name}: {_scalar(value)}"


def _nested(name: str, message: Any, indent: str) -> Iterator[str]:
    yield f"{indent}{name} {{"
    yield from _message(message, indent + "  ")
    yield f"{indent}}}"


def _parameters(name: str, values: Mapping[str, str], indent: str) -> Iterator[str]:
    for key, text in sorted(values.items()):
        value = f"{{ string_value: {_scalar(text)} }}"
        yield f"{indent}{name} {{ key: {_scalar(key)} value: {value} }}"


def _scalar(value: bool | int | str | Enum) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    # JSON's escapes of ASCII text are protobuf's too; beyond ASCII protobuf takes UTF-8 as it is.
    return json.dumps(value, ensure_ascii=False)


PROMPT, PARAMETERS, SEED = "PROMPT", "PARAMETERS", "SEED"
FACE, FACE_FILE = "FACE", "FACE_FILE"
FACE_EMBEDDING, FACE_CROP_BGR = "FACE_EMBEDDING", "FACE_CROP_BGR"
IMAGE, IMAGE_PARAMETERS = "IMAGE", "IMAGE_PARAMETERS"
STEP, PREVIEW = "STEP", "PREVIEW"

EMBEDDING_SIZE, CROP_SIDE = 512, 224


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
PARAMETERS: a JSON object, see `requests.Asked`. SEED: 0 to 2⁶⁴−1. Pictures of different sizes may
share one of Triton's batches, since the python backend gets requests one by one."""

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
