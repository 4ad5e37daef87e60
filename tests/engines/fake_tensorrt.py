"""A simulated TensorRT runtime behind the names of the real binding, over the simulated driver.

Its classes guard themselves: an attribute or an argument count that `tensorrt_rtx`'s class of the
same name does not have is an error, and as flavour "tensorrt" so are the names that only TensorRT-
RTX has. A stand-in plan is JSON that names the module's ONNX file and the profiles; running it runs
ONNX Runtime on the CPU between buffers in simulated device memory, when the stream gets there.
"""

import json
import re
from collections import Counter
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import tensorrt_rtx as real_trt

from fastface_trt.engines.manifest import BuildReport
from fastface_trt.engines.tensorrt.plan import PLAN
from fastface_trt.engines.tensorrt.profiles import make_profiles

RTX_ONLY = {
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "IRuntimeCache",
    "create_runtime_cache",
    "cuda_graph_strategy",
    "dynamic_shapes_kernel_specialization_strategy",
    "set_runtime_cache",
}
TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int64": "INT64",
    "int32": "INT32",
    "uint8": "UINT8",
}
SCRATCH_BYTES = 1000
WEIGHT_BYTES = 4096


def write_stand_in(builder, module, source, target):
    """What a stub builder writes as `target`/engine.plan."""
    content = {
        "onnx": str((Path(source) / module.files[0].path).absolute()),
        "module": json.loads(module.model_dump_json()),
        "profiles": [json.loads(p.model_dump_json()) for p in make_profiles(module, builder)],
    }
    (target / PLAN).write_text(json.dumps(content))
    return BuildReport()


@lru_cache
def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def arities(docstring, name):
    """(least, most) arguments, self not counted, of every overload in a pybind docstring."""
    found = []
    for arguments in re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", docstring or "", re.M):
        parts = [p for p in re.split(r",(?![^\[<(]*[\]>)])", arguments) if p.strip()]
        optional = sum("=" in p for p in parts)
        if "*args" not in arguments:
            found.append((len(parts) - 1 - optional, len(parts) - 1))
    return found


class Guarded:
    """Lets through only what the real class has; `_real` is its name."""

    _real = ""
    _module: "FakeTensorRT"

    def __getattribute__(self, name):
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        real = self._check(name)
        value = object.__getattribute__(self, name)
        overloads = arities(getattr(real, "__doc__", ""), name) if callable(value) else []
        if not overloads:
            return value

        def call(*arguments):
            if not any(low <= len(arguments) <= high for low, high in overloads):
                raise TypeError(f"{self._real}.{name} got {len(arguments)} arguments: {overloads}")
            self._module.calls.append((f"{self._real}.{name}", arguments))
            return value(*arguments)

        return call

    def __setattr__(self, name, value):
        if not name.startswith("_"):
            real = self._check(name)
            if not isinstance(real, property) or real.fset is None:
                raise AttributeError(f"{self._real}.{name} cannot be set")
            self._module.calls.append((f"{self._real}.{name} =", (value,)))
            name = f"_{name}"
        object.__setattr__(self, name, value)

    def _check(self, name):
        if self._module.flavour == "tensorrt" and name in RTX_ONLY:
            raise AttributeError(f"TensorRT's {self._real} has no {name}")
        return getattr(getattr(real_trt, self._real), name)


class FakeTensorRT:
    """Put it into `sys.modules["tensorrt_rtx"]` or `["tensorrt"]`, over a `FakeCuda`."""

    def __init__(self, cuda, flavour="tensorrt-rtx"):
        self.cuda, self.flavour = cuda, flavour
        self.calls = []
        self.refuse_capture = False
        self.kernels = b""  # what the runtime cache of this machine holds
        self.__version__ = real_trt.__version__ if flavour == "tensorrt-rtx" else "11.4.0.1"
        self.Runtime = lambda logger: Runtime(self, logger)

    def __getattr__(self, name):
        if name.startswith("_") or (self.flavour == "tensorrt" and name in RTX_ONLY):
            raise AttributeError(name)
        return getattr(real_trt, name)

    def counts(self):
        return Counter(name for name, _ in self.calls)


class Runtime(Guarded):
    _real = "Runtime"

    def __init__(self, module, logger):
        self._module, self._logger = module, logger
        self._engine_host_code_allowed = False

    @property
    def engine_host_code_allowed(self):
        return self._engine_host_code_allowed

    def deserialize_cuda_engine(self, buffer):
        content = bytes(memoryview(buffer))
        try:
            plan = json.loads(content)
        except ValueError:
            self._logger.log(real_trt.ILogger.ERROR, "magicTag failed. Check the file")
            return None
        assert not self._engine_host_code_allowed
        return CudaEngine(self._module, plan)


class CudaEngine(Guarded):
    _real = "ICudaEngine"

    def __init__(self, module, plan):
        self._module, self._plan = module, plan
        self._io = [(t, True) for t in plan["module"]["inputs"]]
        self._io += [(t, False) for t in plan["module"]["outputs"]]
        self._by_name = {t["name"]: (t, is_input) for t, is_input in self._io}
        self._weights = module.cuda.allocate(WEIGHT_BYTES)
        self._weight_streaming_budget_v2 = 0

    def __del__(self):
        self._module.cuda.release(self._weights)

    num_io_tensors = property(lambda self: len(self._io))
    num_optimization_profiles = property(lambda self: len(self._plan["profiles"]))
    device_memory_size_v2 = property(lambda self: self._plan.get("scratch", SCRATCH_BYTES))

    def get_tensor_name(self, index):
        return self._io[index][0]["name"]

    def get_tensor_mode(self, name):
        mode = real_trt.TensorIOMode
        return mode.INPUT if self._by_name[name][1] else mode.OUTPUT

    def get_tensor_dtype(self, name):
        return getattr(real_trt.DataType, TYPES[self._by_name[name][0]["dtype"]])

    def get_tensor_location(self, name):
        return real_trt.TensorLocation.DEVICE

    def get_weight_streaming_automatic_budget(self):
        return 12345

    def create_runtime_config(self):
        return RuntimeConfig(self._module)

    def create_execution_context(self, config):
        assert config._strategy == real_trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._module.flavour == "tensorrt-rtx":
            # On a real GPU this is where kernels are compiled and remembered.
            config._cache._content = config._cache._content or b"kernels " + self._module.kernels
        return ExecutionContext(self)


class RuntimeConfig(Guarded):
    _real = "IRuntimeConfig"

    def __init__(self, module):
        self._module, self._strategy, self._cache = module, None, None

    def set_execution_context_allocation_strategy(self, strategy):
        self._strategy = strategy

    def create_runtime_cache(self):
        return RuntimeCache(self._module)

    def set_runtime_cache(self, cache):
        self._cache = cache
        return True

    @property
    def cuda_graph_strategy(self):
        return self._cuda_graph_strategy


class RuntimeCache(Guarded):
    _real = "IRuntimeCache"

    def __init__(self, module):
        self._module, self._content = module, b""

    def deserialize(self, blob):
        fits = bytes(blob) == b"kernels " + self._module.kernels
        self._content = bytes(blob) if fits else self._content
        return fits

    def serialize(self):
        return bytearray(self._content)


class ExecutionContext(Guarded):
    _real = "IExecutionContext"

    def __init__(self, engine):
        self._module, self._engine = engine._module, engine
        self._profile, self._shapes, self._addresses = None, {}, {}
        self._device_memory, self._settled = None, False

    def set_optimization_profile_async(self, index, stream):
        self._module.cuda.stream_of(stream)
        self._profile = self._engine._plan["profiles"][index]
        return True

    def set_input_shape(self, name, shape):
        low, high = self._profile["smallest"][name], self._profile["largest"][name]
        if len(shape) != len(low) or any(
            not a <= s <= b for a, s, b in zip(low, shape, high, strict=True)
        ):
            return False
        self._settled = self._settled and self._shapes.get(name) == shape
        self._shapes[name] = shape
        return True

    def infer_shapes(self):
        return [t["name"] for t, is_input in self._engine._io if is_input and not self._known(t)]

    def get_tensor_shape(self, name):
        tensor, is_input = self._engine._by_name[name]
        return self._shapes[name] if is_input else self._output_shape(tensor)

    def get_max_output_size(self, name):
        tensor, _ = self._engine._by_name[name]
        largest = dict(self._profile["largest"])
        return prod(self._output_shape(tensor, largest)) * np.dtype(tensor["dtype"]).itemsize

    def set_tensor_address(self, name, memory):
        assert memory % 256 == 0, f"{name} is not aligned"
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory, size):
        assert memory % 256 == 0
        assert size >= self._engine._plan.get("scratch", SCRATCH_BYTES)
        self._device_memory = (memory, size)

    def execute_async_v3(self, stream_handle):
        cuda = self._module.cuda
        stream = cuda.stream_of(stream_handle)
        if stream.recording is not None and (self._module.refuse_capture or not self._settled):
            return False  # the first run after a change of shapes does work that is not recorded
        assert self._device_memory is not None, "no scratch memory"
        assert not self.infer_shapes()
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        outputs = {
            t["name"]: (self._output_shape(t), t["dtype"])
            for t, is_input in self._engine._io
            if not is_input
        }
        scratch = self._device_memory
        inputs = {t["name"]: t["dtype"] for t, is_input in self._engine._io if is_input}
        path = self._engine._plan["onnx"]
        self._buffers_exist(addresses, shapes, inputs, outputs)

        def run():
            def tensor(name, shape, dtype):
                size = prod(shape) * np.dtype(dtype).itemsize
                return cuda.read(addresses[name], size).view(dtype).reshape(shape)

            feed = {n: tensor(n, shapes[n], dtype).copy() for n, dtype in inputs.items()}
            cuda.read(*scratch)[...] = 0x5A
            results = session(path).run(list(outputs), feed)
            for (name, (shape, dtype)), result in zip(outputs.items(), results, strict=True):
                assert result.shape == tuple(shape)
                tensor(name, shape, dtype)[...] = result

        cuda.submit(stream, run)
        self._settled = True
        return True

    def _known(self, tensor):
        return tensor["name"] in self._shapes

    def _buffers_exist(self, addresses, shapes, inputs, outputs):
        """Every buffer exists and is large enough when the run is queued."""
        for name, dtype in inputs.items():
            size = prod(shapes[name]) * np.dtype(dtype).itemsize
            self._module.cuda.read(addresses[name], size)
        for name, (shape, dtype) in outputs.items():
            self._module.cuda.read(addresses[name], prod(shape) * np.dtype(dtype).itemsize)
        self._module.cuda.read(*self._device_memory)

    def _output_shape(self, tensor, shapes=None):
        """The output's shape from its named sizes, such as 4*height, and the inputs' shapes."""
        sizes = {}
        for spec in self._engine._plan["module"]["inputs"]:
            sizes |= dict(zip(spec["shape"], (shapes or self._shapes)[spec["name"]], strict=True))

        def value(size):
            if isinstance(size, int):
                return size
            return prod(int(f) if f.isdigit() else sizes[f] for f in size.split("*"))

        return tuple(value(size) for size in tensor["shape"])
