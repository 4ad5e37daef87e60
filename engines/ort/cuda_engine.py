"""ONNX Runtime on a GPU: one session for all shapes, a binding and a CUDA graph for each of them.

A session computes on one stream for its whole life, so an engine has a stream of its own and calls
from several threads take turns. Events order it with the streams of the threads that call it.

Inputs are copied into buffers that stay where they are, and outputs come out of such buffers, so
what was bound once for a set of shapes stays bound, and ONNX Runtime replays what it recorded. It
records by itself (`enable_cuda_graph`): the first call of a set of shapes runs twice, so that its
arena has all it needs, then into the graph. Recording around its runs would be another way; there
ONNX Runtime does not know of it and queues the release of host buffers with the run, which a
replay would repeat. What its own way demands:

- it keeps graphs per thread that calls a session, with handles of cuBLAS and cuDNN, and frees them
  with the session only: all runs of a session are made by one thread of the engine's;
- it records in the mode that forbids other threads to allocate (`Driver.ignore_captures_elsewhere`
  lifts that for threads that work with `CudaDevice`; others may break a recording, which is then
  told and the shapes run without one);
- the graphs share the arena's memory, so nothing may give it back: it is never shrunk;
- it refuses a graph with control flow, or with a node on the CPU, when the session is made.

Recording did not run on a GPU so far; the session on a stream of ours did, and so did a prototype
of the recording.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any, Final

import numpy as np

from fastface_trt.engines.cuda.device import CudaDevice
from fastface_trt.engines.cuda.stream import Stream
from fastface_trt.engines.device import DeviceTensor, Tensor
from fastface_trt.engines.dtypes import ITEM_BYTES
from fastface_trt.engines.engine import Closing, check_inputs
from fastface_trt.engines.manifest import ModuleSpec, TensorSpec
from fastface_trt.engines.ort.options import ProviderOptions
from fastface_trt.errors import EngineFailed, EngineMismatch

_KEPT: Final = 64
"""Sets of shapes with buffers, and graphs of a session. A picture needs one per branch count."""

_NOT_RECORDED: Final = -1
"""The graph number with which ONNX Runtime records nothing."""

_ALIGNMENT: Final = 256

Shapes = tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class _Bound:
    """What the runs of one set of shapes share; `inputs` and `outputs` are views of `buffer`."""

    binding: Any
    run_options: Any
    inputs: dict[str, DeviceTensor]
    outputs: dict[str, DeviceTensor]
    buffer: int
    graph: int
    ran: bool = False


class BoundEngine(Closing):
    """One module in a session of a GPU execution provider.

    Outputs belong to the caller, unlike those of other GPU engines: threads share the buffers that
    they come out of. `make_session` is given the provider options that put the session on our
    stream, with `captures` those that make it record; where it refuses, it is asked once more
    without, and the device's `warn` is told. `captures` says afterwards whether runs are recorded.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        device: CudaDevice,
        new_run_options: Callable[[], Any],
        make_session: Callable[[ProviderOptions], Any],
        *,
        captures: bool,
    ) -> None:
        self.spec = spec
        self.device = device
        self.request_counts = None
        device.stream()  # a thread's first call needs the context
        self._lock = Lock()
        self._new_run_options = new_run_options
        self._stream = device.driver.stream_create()
        self._event = device.driver.event_create()
        self._last: Stream | None = None
        self._bound: OrderedDict[Shapes, _Bound] = OrderedDict()
        self._graphs = 0
        self._runner: ThreadPoolExecutor | None = None
        on_our_stream = {
            "device_id": "0",
            "has_user_compute_stream": "1",
            "user_compute_stream": str(int(self._stream)),
        }
        try:
            self._session: Any = None
            if captures:
                self._session = self._recording_session(make_session, on_our_stream)
            self.captures = self._session is not None
            if not self.captures:
                self._session = make_session(on_our_stream)
        except BaseException:
            self._free()
            raise
        if self.captures:
            self._runner = ThreadPoolExecutor(
                1, f"onnxruntime {spec.name}", initializer=device.enter_thread
            )

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Put one run on the GPU; names, shapes and dtypes are those of `spec`.

        Takes tensors of `device` or numpy arrays, which it uploads. Raises `InvalidRequest` and
        `EngineMismatch` for inputs that do not fit, `EngineFailed` when ONNX Runtime fails or the
        engine is closed.
        """
        ready = check_inputs(self.spec, inputs)
        device, stream = self.device, self.device.stream()
        shapes = tuple(tuple(ready[tensor.name].shape) for tensor in self.spec.inputs)
        follow = device.driver.stream_follow
        with self._lock:
            if self._session is None:
                raise EngineFailed(f"The engine of {self.spec.name} is closed.", "Load it again.")
            bound = self._bound_for(shapes)
            if self._last is not stream:  # another thread's run may still use the buffers
                follow(stream.handle, self._stream, self._event)
                self._last = stream
            for name, view in bound.inputs.items():
                device.copy_into(view, ready[name])
            results = {name: device.empty(t.shape, t.dtype) for name, t in bound.outputs.items()}
            follow(self._stream, stream.handle, self._event)
            try:
                self._run(shapes, bound)
                for name, view in bound.outputs.items():
                    if view.nbytes:
                        device.driver.copy_within(
                            results[name].address, view.address, view.nbytes, self._stream
                        )
            except Exception as error:
                self._forget(shapes)
                raise EngineFailed(
                    f"ONNX Runtime failed in {self.spec.name}: {' '.join(str(error).split())}",
                    "If memory ran out, ask for fewer or smaller pictures at once.",
                ) from error
            finally:
                follow(stream.handle, self._stream, self._event)
        return dict(results)

    def close(self) -> None:
        """Free the session, its stream and buffers, after all queued runs; twice is harmless."""
        with self._lock:
            session, self._session = self._session, None
            if session is None:
                return
            if self._runner is not None:
                self._runner.shutdown()
            if not self.device.closed:
                self.device.stream()
                self.device.driver.stream_synchronize(self._stream)  # graphs may still run
            while self._bound:
                self._forget(next(iter(self._bound)))
            del session
            self._free()

    def _recording_session(
        self, make_session: Callable[[ProviderOptions], Any], options: ProviderOptions
    ) -> Any:
        """A session that records CUDA graphs; None, and a warning, where ONNX Runtime cannot."""
        try:
            return make_session(options | {"enable_cuda_graph": "1"})
        except EngineMismatch as error:
            refusal = re.search(r"cannot use the .* feature .*? user\s+as (.*)", error.message)
            if refusal is None:
                raise
            self._launches_one_by_one(refusal[1])
            return None

    def _run(self, shapes: Shapes, bound: _Bound) -> None:
        run = self._session.run_with_iobinding
        if self._runner is None:
            run(bound.binding, bound.run_options)
            return
        try:
            self._runner.submit(run, bound.binding, bound.run_options).result()
        except Exception as error:
            if bound.ran or bound.graph == _NOT_RECORDED:
                raise
            # It may have been the recording that failed, and not the run.
            bound.graph, bound.run_options = _NOT_RECORDED, self._run_options(_NOT_RECORDED)
            self._runner.submit(run, bound.binding, bound.run_options).result()
            self._launches_one_by_one(" ".join(str(error).split()))
        bound.ran = True

    def _launches_one_by_one(self, why: str) -> None:
        self.device.warn(
            f"No CUDA graph of {self.spec.name}, launching kernels one by one: {why.rstrip('.')}."
        )

    def _bound_for(self, shapes: Shapes) -> _Bound:
        """The binding for these shapes, made on their first call."""
        bound = self._bound.get(shapes)
        if bound is None:
            while len(self._bound) >= _KEPT:
                # Nothing but the session's end frees a graph, so those without one go first.
                plain = (key for key, one in self._bound.items() if one.graph == _NOT_RECORDED)
                self._forget(next(plain, next(iter(self._bound))))
            bound = self._bound[shapes] = self._bind(shapes)
        self._bound.move_to_end(shapes)
        return bound

    def _bind(self, shapes: Shapes) -> _Bound:
        graph = _NOT_RECORDED
        if self.captures:
            if self._graphs < _KEPT:
                graph = self._graphs = self._graphs + 1
            elif self._graphs == _KEPT:
                self._graphs += 1  # said once
                self._launches_one_by_one(f"it has {_KEPT}, for as many sets of shapes")
        named = {t.name: shape for t, shape in zip(self.spec.inputs, shapes, strict=True)}
        outputs = output_shapes(self.spec, named)
        tensors = [
            *((t, named[t.name]) for t in self.spec.inputs),
            *((t, outputs[t.name]) for t in self.spec.outputs),
        ]
        buffer, views = self._allocate(tensors)
        binding = self._session.io_binding()
        sides = (
            (binding.bind_input, {t.name: views[t.name] for t in self.spec.inputs}),
            (binding.bind_output, {t.name: views[t.name] for t in self.spec.outputs}),
        )
        for bind, side in sides:
            for name, view in side.items():
                bind(
                    name=name,
                    device_type="cuda",
                    device_id=0,
                    element_type=np.dtype(view.dtype),
                    shape=view.shape,
                    buffer_ptr=view.address,
                )
        options = self._run_options(graph)
        return _Bound(binding, options, sides[0][1], sides[1][1], buffer, graph)

    def _allocate(
        self, tensors: list[tuple[TensorSpec, tuple[int, ...]]]
    ) -> tuple[int, dict[str, DeviceTensor]]:
        """One buffer for tensors of these shapes, and views of it by name."""
        total, offsets = 0, []
        for tensor, shape in tensors:
            offsets.append(total)
            total += -(-prod(shape) * ITEM_BYTES[tensor.dtype] // _ALIGNMENT) * _ALIGNMENT
        buffer = self.device.allocate(max(total, 1))
        return buffer, {
            tensor.name: DeviceTensor(buffer + offset, shape, tensor.dtype)
            for (tensor, shape), offset in zip(tensors, offsets, strict=True)
        }

    def _run_options(self, graph: int) -> Any:
        options = self._new_run_options()
        # Waiting belongs to whoever downloads a result.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _forget(self, shapes: Shapes) -> None:
        """Free the buffers of these shapes; their graph, if any, is never replayed again."""
        bound = self._bound.pop(shapes)
        if not self.device.closed:
            self.device.free(bound.buffer)  # waits for the GPU

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
