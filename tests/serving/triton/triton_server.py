"""A Triton server's part around one model instance: config, loading, checks, memory, responses.

The config is parsed with the real protobuf message of `tritonclient`.
"""

import contextlib
import importlib.util
import json
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from tests.serving.triton import triton_double

WAIT_SECONDS = 60
NUMPY = {
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT32": np.int32,
    "TYPE_FP32": np.float32,
    "TYPE_STRING": np.object_,
}


def read_config(folder):
    """The `ModelConfig` message of a model's folder; a wrong name or enum is a ParseError."""
    return text_format.Parse(
        (folder / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig()
    )


def config_json(config):
    """The message as Triton hands it to models: proto names, sizes as numbers."""
    values = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for tensor in values["input"] + values["output"]:
        tensor["dims"] = [int(size) for size in tensor["dims"]]
    return json.dumps(values)


@dataclass
class Sent:
    """What one request got: responses in order, (arrays, error) each; `ended` after the final."""

    sender: object = None
    responses: list = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def receive(self, arrays, error, final):
        with self.arrived:
            if arrays is not None or error is not None:
                self.responses.append((arrays, error))
            if final:
                self.ended.set()
            self.arrived.notify_all()

    def wait(self):
        """The arrays of the last response; raises what the model sent as an error."""
        assert self.ended.wait(WAIT_SECONDS), "no final response"
        arrays, error = self.responses[-1]
        if error is not None:
            raise Refused(error)
        return arrays


class Refused(Exception):
    def __init__(self, error):
        super().__init__(error.message())
        self.code = triton_double.CODES[error.code()]


class Instance:
    """One instance of the model in `repository`; a context manager that finalizes it."""

    def __init__(self, repository, *, kind="CPU", device="0", model=None):
        self.folder = Path(repository) / "fastface"
        self.config = read_config(self.folder)
        self.pb_utils = triton_double.make_module()
        self._lock = threading.Lock()
        with self._stub():
            self.model = model or self._load().TritonPythonModel()
            completed = self.model.auto_complete_config(
                self.pb_utils.ModelConfig(config_json(self.config))
            )
            self.model.initialize(
                {
                    "model_config": json.dumps(completed.as_dict()),
                    "model_instance_kind": kind,
                    "model_instance_name": "fastface_0_0",
                    "model_instance_device_id": device,
                    "model_repository": str(self.folder),
                    "model_version": "1",
                    "model_name": "fastface",
                }
            )

    def _load(self):
        spec = importlib.util.spec_from_file_location(
            "fastface_model", self.folder / "1" / "model.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @contextlib.contextmanager
    def _stub(self):
        """Where `import triton_python_backend_utils` works, as only in Triton's own processes."""
        sys.modules["triton_python_backend_utils"] = self.pb_utils
        try:
            yield
        finally:
            del sys.modules["triton_python_backend_utils"]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.model.finalize()

    def execute(self, *batch, outputs=(), gpu=()):
        """Hand over a batch of requests (arrays by input name); returns a `Sent` for each."""
        decoupled = self.config.model_transaction_policy.decoupled
        sent, requests = [], []
        for arrays in batch:
            self.check(arrays)
            one = Sent()
            one.sender = triton_double.InferenceResponseSender(
                decoupled=decoupled, outputs=outputs, receive=self._checked(one)
            )
            tensors = [
                (triton_double.Tensor.on_gpu if name in gpu else triton_double.Tensor)(
                    name, array.copy()
                )
                for name, array in arrays.items()
            ]
            requests.append(triton_double.InferenceRequest(tensors, one.sender))
            sent.append(one)
        with self._lock:  # Triton calls one instance from one thread
            returned = self.model.execute(list(requests))
        assert returned is None, "a model that uses senders returns None"
        for request in requests:
            request.release()
        return sent

    def check(self, arrays):
        """What Triton's core refuses before the model sees it."""
        known = {tensor.name: tensor for tensor in self.config.input}
        for name, array in arrays.items():
            if name not in known:
                raise ValueError(f"unexpected inference input '{name}'")
            kind = model_config_pb2.DataType.Name(known[name].data_type)
            if array.dtype != NUMPY[kind]:
                raise ValueError(f"{name} is {array.dtype}, expected {kind}")
            if not _fits(array.shape[1:], known[name].dims):
                raise ValueError(f"unexpected shape {array.shape} for input '{name}'")
            if array.shape[0] > self.config.max_batch_size:
                raise ValueError(f"batch {array.shape[0]} exceeds the maximum")
        missing = [n for n, t in known.items() if not t.optional and n not in arrays]
        if missing:
            raise ValueError(f"expected inputs {missing}")

    def _checked(self, one):
        known = {tensor.name: tensor for tensor in self.config.output}

        def receive(arrays, error, final):
            for name, array in (arrays or {}).items():
                kind = model_config_pb2.DataType.Name(known[name].data_type)
                assert array.dtype == NUMPY[kind], (name, array.dtype)
                assert _fits(array.shape[1:], known[name].dims), (name, array.shape)
            one.receive(arrays, error, final)

        return receive


def _fits(shape, dims):
    return len(shape) == len(dims) and all(
        size == wanted or wanted == -1 for size, wanted in zip(shape, dims, strict=True)
    )


def text(*values):
    """BYTES [B,1]."""
    return np.array([v.encode() if isinstance(v, str) else v for v in values], np.object_)[:, None]
