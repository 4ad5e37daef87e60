"""The part of Triton's `ModelConfig` that we use, typed, and its text form.

Names, nesting and enums are those of `model_config.proto` in triton-inference-server/common. Fields
at their default are left out, as protobuf does.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from fastface_trt.serving.triton.tensors import TensorConfig


class InstanceKind(Enum):
    """Where an instance runs: `ModelInstanceGroup.Kind`."""

    KIND_GPU = 1
    KIND_CPU = 2


class TimeoutAction(Enum):
    """What becomes of a request that waited too long: `ModelQueuePolicy.TimeoutAction`."""

    REJECT = 0
    DELAY = 1


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
