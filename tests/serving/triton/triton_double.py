"""A double of `triton_python_backend_utils`, as strict as the C++ of triton-inference-server's
python_backend (src/pb_stub.cc, pb_tensor.cc, infer_response.cc, response_sender.cc).

What is wrong there is wrong here: other argument types (TypeError, as pybind11 raises), unknown
flags, a second response of a model that is not decoupled, a response after the final one, a
question about cancellation after it (the server frees what it would ask), tensors that are not
contiguous, empty names, types without a Triton name.
"""

import json
import threading
import types

import numpy as np

FINAL = 1
CODES = (
    "UNKNOWN",
    "INTERNAL",
    "NOT_FOUND",
    "INVALID_ARG",
    "UNAVAILABLE",
    "UNSUPPORTED",
    "ALREADY_EXISTS",
    "CANCELLED",
)
NAMES = {
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.uint16): "UINT16",
    np.dtype(np.uint32): "UINT32",
    np.dtype(np.uint64): "UINT64",
    np.dtype(np.int8): "INT8",
    np.dtype(np.int16): "INT16",
    np.dtype(np.int32): "INT32",
    np.dtype(np.int64): "INT64",
    np.dtype(np.float16): "FP16",
    np.dtype(np.float32): "FP32",
    np.dtype(np.float64): "FP64",
    np.dtype(np.object_): "BYTES",
}


class TritonModelException(Exception):
    pass


def _typed(value, kind, what):
    if not isinstance(value, kind):
        raise TypeError(f"incompatible function arguments: {what} is {type(value).__name__}")
    return value


class TritonError:
    def __init__(self, message, code=1):
        self._message = _typed(message, str, "message")
        self._code = _typed(code, int, "code")

    def code(self):
        return self._code

    def message(self):
        return self._message


for _number, _name in enumerate(CODES):
    setattr(TritonError, _name, _number)


class _Capsule:
    """Lets numpy take a capsule that was made without `max_version`, as Triton asks for it."""

    def __init__(self, capsule, device):
        self.capsule, self.device = capsule, device

    def __dlpack__(self, **options):
        return self.capsule

    def __dlpack_device__(self):
        return self.device


class Tensor:
    def __init__(self, name, array):
        self._name = _typed(name, str, "name")
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        _typed(array, np.ndarray, "array")
        if array.dtype not in NAMES:
            raise TritonModelException(f"NumPy dtype {array.dtype} is not supported.")
        self._gpu = False
        self._array = np.ascontiguousarray(array)
        if array.dtype == np.object_:
            for item in self._array.ravel():
                _typed(item, (bytes, str), "an element of a BYTES tensor")

    @classmethod
    def on_gpu(cls, name, array):
        tensor = cls(name, array)
        tensor._gpu = True
        return tensor

    @staticmethod
    def from_dlpack(name, tensor):
        if not _typed(name, str, "name"):
            raise TritonModelException("Tensor name cannot be an empty string.")
        if not (hasattr(tensor, "__dlpack__") and hasattr(tensor, "__dlpack_device__")):
            raise TritonModelException("Provided tensor is not supported.")
        device = tensor.__dlpack_device__()
        if device[0] != 1:
            raise TritonModelException(f"DLDevice type {device[0]} is not supported here.")
        array = np.from_dlpack(_Capsule(tensor.__dlpack__(stream=None), device))
        if not array.flags.c_contiguous:
            raise TritonModelException("DLPack tensor is not contiguous.")
        made = Tensor(name, np.empty(0, array.dtype))
        made._array = array  # the caller's memory, no copy
        return made

    def name(self):
        return self._name

    def shape(self):
        return list(self._array.shape)

    def triton_dtype(self):
        return NAMES[self._array.dtype]

    def is_cpu(self):
        return not self._gpu

    def as_numpy(self):
        if self._gpu:
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        return self._array

    def to_dlpack(self):
        if self._array.dtype == np.object_:
            raise TritonModelException("DLPack does not have support for string tensors.")
        return self._array.__dlpack__()

    def __dlpack__(self, stream=None):
        return self.to_dlpack()

    def __dlpack_device__(self):
        return (2, 0) if self._gpu else (1, 0)


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None, parameters=None):
        if not isinstance(output_tensors, list | tuple):
            raise TypeError("incompatible function arguments: output_tensors")
        for tensor in output_tensors:
            _typed(tensor, Tensor, "an output tensor")
        if error is not None:
            _typed(error, TritonError, "error")
        for key, value in (_typed(parameters, dict, "parameters") if parameters else {}).items():
            _typed(key, str, "a parameter's name")
            _typed(value, (bool, int, str), "a parameter")
        self._outputs, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._outputs

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class InferenceResponseSender:
    """What was sent is copied at once, as into Triton's shared memory, and passed to `receive`."""

    def __init__(self, *, decoupled, outputs, receive):
        self._decoupled, self._outputs, self._receive = decoupled, outputs, receive
        self._lock = threading.Lock()
        self._sent, self._closed = 0, False
        self.cancelled = threading.Event()
        self.polls = 0

    def send(self, response=None, flags=0):
        _typed(flags, int, "flags")
        if response is not None:
            _typed(response, InferenceResponse, "response")
        if flags not in (0, FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if flags == 0 and response is None:
            raise TritonModelException("Inference Response object must be provided.")
        with self._lock:
            if not self._decoupled and response is not None and self._sent:
                raise TritonModelException("Non-decoupled model cannot send more than one.")
            if not self._decoupled and response is None and not self._sent:
                raise TritonModelException("cannot send complete final before a response.")
            if self._closed:
                raise TritonModelException("Response sender has been closed.")
            self._sent += 1
            self._closed = flags == FINAL
        if response is None:
            self._receive(None, None, True)
        elif response.has_error():
            self._receive(None, response.error(), flags == FINAL)
        else:
            arrays = {
                tensor.name(): tensor.as_numpy().copy()
                for tensor in response.output_tensors()
                if not self._outputs or tensor.name() in self._outputs
            }
            self._receive(arrays, None, flags == FINAL)

    def is_cancelled(self):
        if self._closed:
            raise AssertionError("is_cancelled after the final response: the server freed it")
        self.polls += 1
        return self.cancelled.is_set()


class InferenceRequest:
    """Made by the server only; ours never makes requests to other models."""

    def __init__(self, inputs, sender, request_id=""):
        self._inputs, self._sender, self._id = inputs, sender, request_id
        self._released = False

    def _alive(self):
        if self._released:
            raise AssertionError("a request was used after execute returned")

    def inputs(self):
        self._alive()
        return list(self._inputs)

    def request_id(self):
        self._alive()
        return self._id

    def parameters(self):
        self._alive()
        return "{}"

    def is_cancelled(self):
        self._alive()
        return self._sender.is_cancelled()

    def get_response_sender(self):
        self._alive()
        return self._sender

    def release(self):
        """Take the memory back: whoever kept a view of it sees rubbish from now on."""
        self._released = True
        for tensor in self._inputs:
            if not tensor._gpu and tensor._array.dtype != np.object_:
                tensor._array.view(np.uint8)[...] = 0xA5
            elif tensor._array.dtype == np.object_:
                tensor._array[...] = b"released"


class ModelConfig:
    """Refuses what contradicts the config, as the real one's `add_input` and `add_output` do."""

    def __init__(self, text):
        self._config = json.loads(text)

    def as_dict(self):
        return self._config

    def add_input(self, tensor):
        self._add("input", tensor, {"name", "data_type", "dims", "optional"})

    def add_output(self, tensor):
        self._add("output", tensor, {"name", "data_type", "dims"})

    def set_dynamic_batching(self):
        if "sequence_batching" in self._config or "ensemble_scheduling" in self._config:
            raise ValueError("another scheduler is configured")
        self._config.setdefault("dynamic_batching", {})

    def _add(self, where, tensor, allowed):
        if set(tensor) - allowed or not {"name", "data_type", "dims"} <= set(tensor):
            raise ValueError(f"{where} has missing or unknown properties: {sorted(tensor)}")
        for known in self._config[where]:
            if known["name"] != tensor["name"]:
                continue
            for key, value in tensor.items():
                if known.get(key, False if key == "optional" else None) != value:
                    raise ValueError(f"{where} {tensor['name']}: {key} {known.get(key)} != {value}")
            return
        self._config[where].append(dict(tensor))


def make_module():
    """The module that `import triton_python_backend_utils` gives inside Triton's stub."""

    class Logger:
        lines: list[str] = []  # noqa: RUF012, one list per module

        @classmethod
        def log_error(cls, message):
            cls.lines.append(_typed(message, str, "message"))

        log_info = log_warn = log_verbose = log_error

    module = types.ModuleType("triton_python_backend_utils")
    for name, value in {
        "TritonError": TritonError,
        "TritonModelException": TritonModelException,
        "Tensor": Tensor,
        "InferenceRequest": InferenceRequest,
        "InferenceResponse": InferenceResponse,
        "ModelConfig": ModelConfig,
        "Logger": Logger,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "using_decoupled_model_transaction_policy": lambda config: bool(
            config.get("model_transaction_policy", {}).get("decoupled", False)
        ),
    }.items():
        setattr(module, name, value)
    return module
