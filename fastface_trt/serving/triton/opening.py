"""From the arguments of Triton at a model's start to a `ServedModel` that takes requests."""

import json
import os
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from fastface_trt.engines.children import leave_with_starter
from fastface_trt.engines.cuda.driver import Driver
from fastface_trt.errors import BackendUnavailable, EngineFailed
from fastface_trt.serving.batching.opening import open_batcher
from fastface_trt.serving.triton.repository import TritonSettings
from fastface_trt.serving.triton.served import ServedModel
from fastface_trt.serving.triton.tensors import INPUTS, OUTPUTS, STEP_OUTPUTS

VISIBLE = "CUDA_VISIBLE_DEVICES"


def open_model(
    args: Mapping[str, str],
    pb_utils: Any,
) -> ServedModel:
    """The model that Triton's `args` describe, ready for requests.

    Opens engines, builds none, and ends this process with Triton's. Raises `FastFaceError`.
    """
    leave_with_starter()
    config = json.loads(args["model_config"])
    folder = Path(args["model_repository"], args["model_version"])
    parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
    settings = TritonSettings.from_parameters(parameters, folder)
    if args.get("model_instance_kind") == "GPU":
        keep_to_gpu(int(args["model_instance_device_id"]), os.environ)
    worker = open_batcher(settings, build=False)
    return ServedModel(
        worker,
        worker.manifest,
        pb_utils,
        capacity=settings.max_running + int(config["max_batch_size"]),
        decoupled=pb_utils.using_decoupled_model_transaction_policy(config),
        drain_seconds=settings.drain_seconds,
    )


def complete_config(config: Any) -> Any:
    """`config` (a `pb_utils.ModelConfig`), after Triton compared our tensors with its own.

    A config whose inputs or outputs were changed by hand raises ValueError at loading, not in the
    middle of a request.
    """
    decoupled = config.as_dict().get("model_transaction_policy", {}).get("decoupled", False)
    for tensor in INPUTS:
        config.add_input(
            {
                "name": tensor.name,
                "data_type": tensor.data_type.name,
                "dims": list(tensor.dims),
                "optional": tensor.optional,
            }
        )
    for tensor in OUTPUTS + (STEP_OUTPUTS if decoupled else ()):
        config.add_output(
            {
                "name": tensor.name,
                "data_type": tensor.data_type.name,
                "dims": list(tensor.dims),
            }
        )
    config.set_dynamic_batching()
    return config


def keep_to_gpu(
    ordinal: int, environment: MutableMapping[str, str], make_driver: Callable[[], Any] = Driver
) -> None:
    """Let this process see GPU `ordinal` only, of those that it sees; engines run on its first.

    Raises `BackendUnavailable` where CUDA was opened before and therefore still sees the others.
    """
    seen = environment.get(VISIBLE, "")
    environment[VISIBLE] = seen.split(",")[ordinal].strip() if seen else str(ordinal)
    try:
        make_driver().device(1)
    except EngineFailed:
        return  # there is no second one
    raise BackendUnavailable(
        f"CUDA runs in this process already, so the instance cannot keep to GPU {ordinal}.",
        "Run one Triton server for each GPU: docker run --gpus device=N.",
    )
