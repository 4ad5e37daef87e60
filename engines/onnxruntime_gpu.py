"""ONNX Runtime on a GPU: inputs and outputs are bound to device memory, nothing passes the host.

A session computes on one stream for its whole life, so an engine has a stream of its own and calls
from several threads take turns. Events order it with the streams of the threads that call it.
"""

from collections.abc import Callable, Mapping
from math import prod
from threading import Lock
from typing import Any

import numpy as np

from fastface_trt.engines.closing import Closing
from fastface_trt.engines.cuda.device import CudaDevice
from fastface_trt.engines.device import DeviceTensor, Tensor
from fastface_trt.engines.engine import check_inputs
from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.errors import EngineFailed

ProviderOptions = dict[str, str]


class BoundEngine(Closing):
    """One module in a session of a GPU execution provider.

    Outputs belong to the caller, unlike those of other GPU engines. `run_options` are those of
    every run, `make_session` is given the provider options that put the session on our stream.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        device: CudaDevice,
        run_options: Any,
        make_session: Callable[[ProviderOptions], Any],
    ) -> None:
        self.spec = spec
        self.device = device
        self.request_counts = None
        device.stream()  # a thread's first call needs the context
        self._lock = Lock()
        self._stream = device.driver.stream_create()
        self._event = device.driver.event_create()
        self._run_options = run_options
        # Waiting belongs to whoever downloads a result.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._session: Any = make_session(
                {
                    "device_id": "0",
                    "has_user_compute_stream": "1",
                    "user_compute_stream": str(int(self._stream)),
                }
            )
        except BaseException:
            self._session = None
            self._free()
            raise

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Put one run on the GPU; names, shapes and dtypes are those of `spec`.

        Takes tensors of `device` or numpy arrays, which it uploads. Raises `InvalidRequest` and
        `EngineMismatch` for inputs that do not fit, `EngineFailed` when ONNX Runtime fails or the
        engine is closed.
        """
        ready = check_inputs(self.spec, inputs)
        device, stream = self.device, self.device.stream()
        on_gpu = {
            name: tensor if isinstance(tensor, DeviceTensor) else device.upload(tensor)
            for name, tensor in ready.items()
        }
        shapes = output_shapes(self.spec, {name: t.shape for name, t in on_gpu.items()})
        outputs = {t.name: device.empty(shapes[t.name], t.dtype) for t in self.spec.outputs}
        for tensor in on_gpu.values():
            stream.reads(tensor.memory)
        with self._lock:
            if self._session is None:
                raise EngineFailed(f"The engine of {self.spec.name} is closed.", "Load it again.")
            binding = self._session.io_binding()
            for bind, tensors in ((binding.bind_input, on_gpu), (binding.bind_output, outputs)):
                for name, tensor in tensors.items():
                    bind(
                        name=name,
                        device_type="cuda",
                        device_id=0,
                        element_type=np.dtype(tensor.dtype),
                        shape=tensor.shape,
                        buffer_ptr=tensor.address,
                    )
            device.driver.stream_follow(self._stream, stream.handle, self._event)
            try:
                self._session.run_with_iobinding(binding, self._run_options)
            except Exception as error:
                raise EngineFailed(
                    f"ONNX Runtime failed in {self.spec.name}: {' '.join(str(error).split())}",
                    "If memory ran out, ask for fewer or smaller pictures at once.",
                ) from error
            finally:
                device.driver.stream_follow(stream.handle, self._stream, self._event)
        return dict(outputs)

    def close(self) -> None:
        """Free the session and its stream, after all queued runs; twice is harmless."""
        with self._lock:
            session, self._session = self._session, None
            if session is not None:
                del session
                self._free()

    def _free(self) -> None:
        if not self.device.closed:
            self.device.stream()
            driver = self.device.driver
            driver.stream_synchronize(self._stream)
            driver.event_destroy(self._event)
            driver.stream_destroy(self._stream)


def output_shapes(
    spec: ModuleSpec, inputs: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's outputs from those of its inputs; sizes are names such as 8*height."""
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        for dimension, size in zip(tensor.shape, inputs[tensor.name], strict=True):
            if isinstance(dimension, str):
                sizes[dimension] = size

    def value(dimension: int | str) -> int:
        if isinstance(dimension, int):
            return dimension
        factors = dimension.split("*")
        return prod(int(f) if f.isdigit() else sizes[f] for f in factors)

    return {t.name: tuple(value(dimension) for dimension in t.shape) for t in spec.outputs}
