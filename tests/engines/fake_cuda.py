"""A simulated CUDA driver behind the names and signatures of the real binding.

Every name that the code looks up is looked up on `cuda.bindings.driver`, and every call is counted
against the real function's parameters, so a misspelt name or a missing argument fails here as it
would on a GPU. Memory, streams and graphs are simulated strictly:

- device memory has bounds, is never reused, and using it after it was freed is an error;
- work on a stream is *deferred* until something waits for the stream, so a staging buffer that is
  overwritten too early, or a result that is read too soon, gives wrong numbers;
- a recording stream refuses what CUDA refuses, and a graph replays the recorded work as it was.
"""

import ctypes
import inspect
import threading

from cuda.bindings import driver as real_driver

from tests.engines.fake_cuda_handles import FakeStream, Handle, documented_values
from tests.engines.simulated_memory import Cuda, SimulatedMemory

_GLOBAL = real_driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL


class FakeCuda(SimulatedMemory):
    """Put it into `sys.modules["cuda.bindings.driver"]`. `memory` is the GPU's, in bytes."""

    def __init__(self, memory=2**33, compute_capability=(12, 0), name="Simulated GPU"):
        self.calls = []
        self.fail = {}
        self.sticky = None
        self._capability, self._name = compute_capability, name
        super().__init__(memory)
        self._handles = {}
        self.default_stream = FakeStream()
        self._contexts = 0
        self._current = threading.local()

    # What tests ask

    def names(self, start=0):
        return [name for _, name, _ in self.calls[start:]]

    def leaks(self):
        """Everything that was made and not given back."""
        blocks = [f"{b.content.nbytes} bytes" for b in self._blocks.values() if b.readable]
        pinned = [f"{len(part)} pinned bytes" for part in self._pinned.values()]
        handles = [repr(h) for h in self._handles.values() if h.alive]
        return blocks + pinned + handles + ["context"] * self._contexts

    def external_stream(self):
        """A stream that another library made."""
        return self._new(FakeStream())

    def external_event(self):
        """An event that another library made."""
        event = self._new(Handle("event"))
        event.timed = False
        return event

    def event_of(self, event):
        found = self._handles.get(int(event))
        if found is None or found.kind != "event" or not found.alive:
            raise Cuda("CUDA_ERROR_INVALID_HANDLE")
        return found

    def stream_of(self, number):
        if number in (0, 1):
            return self.default_stream
        stream = self._handles.get(number)
        if not isinstance(stream, FakeStream) or not stream.alive:
            raise Cuda("CUDA_ERROR_INVALID_HANDLE")
        return stream

    def submit(self, stream, work):
        """Queue `work` on a stream, or record it."""
        if stream.recording is not None:
            stream.recording.append(work)
        else:
            stream.queue.append(work)
            stream.submitted += 1

    # The module

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        real = getattr(real_driver, name)
        if inspect.isclass(real):
            return real
        implementation = getattr(type(self), f"_{name}", None)
        if implementation is None:
            raise NotImplementedError(f"the simulated driver has no {name}")
        parameters = len(inspect.signature(real).parameters)
        returned = documented_values(real)

        def call(*arguments):
            if len(arguments) != parameters:
                raise TypeError(f"{name} takes {parameters} arguments, got {len(arguments)}")
            with self._lock:
                self.calls.append((threading.get_ident(), name, arguments))
                error = self.sticky or self.fail.pop(name, None)
                if error is None:
                    try:
                        values = implementation(self, *arguments)
                        values = values if isinstance(values, tuple) else (values,)
                        return (
                            real_driver.CUresult.CUDA_SUCCESS,
                            *(v for v in values if v is not None),
                        )
                    except Cuda as problem:
                        error = str(problem)
                return (getattr(real_driver.CUresult, error), *[None] * returned)

        return call

    def _needs_context(self):
        if not getattr(self._current, "context", None):
            raise Cuda("CUDA_ERROR_INVALID_CONTEXT")

    def _not_recording(self):
        """Calls that break a recording of the calling thread, or a strict one of any thread."""
        strict = getattr(self._current, "capture_mode", _GLOBAL) == _GLOBAL
        for stream in self._handles.values():
            if not isinstance(stream, FakeStream) or stream.recorder is None:
                continue
            if stream.recorder == threading.get_ident() or (strict and stream.strict):
                stream.broken = True
                raise Cuda("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def _drain(self, stream, until=None):
        """Do what was submitted, up to a count: an event covers what came before it, no more."""
        try:
            while stream.done < (stream.submitted if until is None else until):
                stream.done += 1
                stream.queue.popleft()()
        except Cuda as problem:  # on a GPU nothing works after that
            self.sticky = str(problem)
            raise

    def _new(self, handle):
        self._handles[handle.number] = handle
        return handle

    def _gone(self, handle, kind):
        if not isinstance(handle, Handle) or not handle.alive or handle.kind != kind:
            raise Cuda("CUDA_ERROR_INVALID_HANDLE")
        handle.alive = False

    # Device and context

    def _cuInit(self, flags): ...

    def _cuDriverGetVersion(self):
        return 13020

    def _cuDeviceGet(self, ordinal):
        if ordinal != 0:
            raise Cuda("CUDA_ERROR_INVALID_DEVICE")
        return ordinal

    def _cuDeviceGetName(self, length, device):
        return self._name.encode().ljust(length, b"\0")

    def _cuDeviceGetAttribute(self, attribute, device):
        kinds = real_driver.CUdevice_attribute
        return {
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self._capability[0],
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self._capability[1],
        }[attribute]

    def _cuDevicePrimaryCtxRetain(self, device):
        self._contexts += 1
        return "primary context"

    def _cuDevicePrimaryCtxRelease(self, device):
        if not self._contexts:
            raise Cuda("CUDA_ERROR_INVALID_CONTEXT")
        self._contexts -= 1

    def _cuCtxSetCurrent(self, context):
        self._current.context = context

    def _cuCtxPushCurrent(self, context):
        stack = getattr(self._current, "stack", [])
        self._current.stack = [*stack, getattr(self._current, "context", None)]
        self._current.context = context

    def _cuCtxPopCurrent(self):
        popped = self._current.context
        *self._current.stack, self._current.context = self._current.stack
        return popped

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        before = getattr(self._current, "capture_mode", _GLOBAL)
        self._current.capture_mode = mode
        return before

    # Streams and events

    def _cuStreamCreate(self, flags):
        self._needs_context()
        assert flags == int(real_driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return self._new(FakeStream())

    def _cuStreamDestroy(self, stream):
        self._drain(stream)  # CUDA finishes what is queued, too
        self._gone(stream, "stream")

    def _cuStreamSynchronize(self, stream):
        self._needs_context()
        if stream.recording is not None:
            stream.broken = True
            raise Cuda("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self._drain(self.stream_of(int(stream)))

    def _cuEventCreate(self, flags):
        self._needs_context()
        event = self._new(Handle("event"))
        event.timed = flags != int(real_driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        return event

    def _cuEventDestroy(self, event):
        self._gone(event, "event")

    def _cuEventRecord(self, event, stream):
        stream = self.stream_of(int(stream))
        self.event_of(event).after = (stream, stream.submitted)

    def _cuEventSynchronize(self, event):
        self._needs_context()
        self._drain(*event.after)

    def _cuEventElapsedTime(self, start, end):
        """Milliseconds: a piece of work lasts one on the simulated GPU, and waiting nothing."""
        self._needs_context()
        if not (start.alive and start.timed and end.alive and end.timed):
            raise Cuda("CUDA_ERROR_INVALID_HANDLE")
        (stream, first), (other, last) = start.after, end.after
        assert stream is other, "events of two streams are not compared here"
        if stream.done < last:
            raise Cuda("CUDA_ERROR_NOT_READY")
        return float(last - first)

    def _cuStreamWaitEvent(self, stream, event, flags):
        earlier, count = self.event_of(event).after
        self.submit(self.stream_of(int(stream)), lambda: self._drain(earlier, count))

    # Memory

    def _cuMemGetInfo(self):
        self._needs_context()
        return self._memory - self.held(), self._memory

    def _cuMemAlloc(self, size):
        self._needs_context()
        self._not_recording()
        return real_driver.CUdeviceptr(self.allocate(size))

    def _cuMemFree(self, address):
        self._needs_context()
        self._not_recording()
        for stream in self._handles.values():  # it waits for the whole device
            if isinstance(stream, FakeStream) and stream.alive:
                self._drain(stream)
        self.release(int(address))

    def _cuMemPoolCreate(self, properties):
        kind = real_driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert properties.allocType == kind
        pool = self._new(Handle("pool"))
        pool.addresses = set()
        return pool

    def _cuMemPoolSetAttribute(self, pool, attribute, value):
        assert int(value) == 2**64 - 1

    def _cuMemPoolTrimTo(self, pool, keep):
        self._needs_context()

    def _cuMemPoolDestroy(self, pool):
        # What is left of it stays until it is freed: `leaks` tells.
        self._gone(pool, "pool")

    def _cuMemAllocFromPoolAsync(self, size, pool, stream):
        self._needs_context()
        assert stream.recording is None, "an allocation would be recorded"
        assert size > 0
        address = self.allocate(size)
        pool.addresses.add(address)
        return real_driver.CUdeviceptr(address)

    def _cuMemFreeAsync(self, address, stream):
        assert stream.recording is None, "a free would be recorded"
        block = self._blocks.get(int(address))
        if block is None or not block.alive:
            raise Cuda("CUDA_ERROR_INVALID_VALUE")
        block.alive = False

        def free():
            block.readable = False

        self.submit(self.stream_of(int(stream)), free)

    def _cuMemAllocHost(self, size):
        self._needs_context()
        self._not_recording()
        part = ctypes.create_string_buffer(size)
        self._pinned[ctypes.addressof(part)] = part
        return ctypes.addressof(part)

    def _cuMemFreeHost(self, address):
        # What is still queued would copy from freed memory.
        for stream in self._handles.values():
            assert not (isinstance(stream, FakeStream) and stream.queue and stream.alive)
        if self._pinned.pop(address, None) is None:
            raise Cuda("CUDA_ERROR_INVALID_VALUE")

    def _copy(self, stream, target, source):
        """Both are functions that find the bytes, now to check them and later to copy them."""
        target(), source()

        def copy():
            target()[...] = source()

        self.submit(self.stream_of(int(stream)), copy)

    def _device(self, address, size):
        self._span(address, size, "alive")
        return lambda: self._span(address, size, "readable")

    def _cuMemcpyHtoDAsync(self, target, source, size, stream):
        pinned = lambda: self._pinned_span(source, size)  # noqa: E731
        self._copy(stream, self._device(target, size), pinned)

    def _cuMemcpyDtoHAsync(self, target, source, size, stream):
        pinned = lambda: self._pinned_span(target, size)  # noqa: E731
        self._copy(stream, pinned, self._device(source, size))

    def _cuMemcpyDtoDAsync(self, target, source, size, stream):
        self._copy(stream, self._device(target, size), self._device(source, size))

    def _cuMemcpy2DAsync(self, copy, stream):
        width, height = copy.WidthInBytes, copy.Height
        assert width <= copy.srcPitch
        assert width <= copy.dstPitch
        for row in range(height):
            target = int(copy.dstDevice) + row * copy.dstPitch
            source = int(copy.srcDevice) + row * copy.srcPitch
            self._copy(stream, self._device(target, width), self._device(source, width))

    def _cuMemsetD8Async(self, address, value, size, stream):
        target = self._device(address, size)

        def fill():
            target()[...] = value

        self.submit(self.stream_of(int(stream)), fill)

    # Graphs

    def _cuStreamBeginCapture(self, stream, mode):
        assert mode == real_driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.record(stream, strict=False)

    def record(self, stream, *, strict):
        """Begin a recording; a strict one is what `CU_STREAM_CAPTURE_MODE_GLOBAL` makes."""
        stream.strict = strict
        stream.recording, stream.broken = [], False
        stream.recorder = threading.get_ident()

    def _cuStreamEndCapture(self, stream):
        work, stream.recording, stream.recorder = stream.recording, None, None
        if stream.broken:
            raise Cuda("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        graph = self._new(Handle("graph"))
        graph.work = work
        return graph

    def _cuGraphInstantiate(self, graph, flags):
        executable = self._new(Handle("executable graph"))
        executable.work = list(graph.work)
        return executable

    def _cuGraphDestroy(self, graph):
        self._gone(graph, "graph")

    def _cuGraphLaunch(self, executable, stream):
        if not executable.alive:
            raise Cuda("CUDA_ERROR_INVALID_HANDLE")
        for work in executable.work:
            self.submit(self.stream_of(int(stream)), work)

    def _cuGraphExecDestroy(self, executable):
        self._gone(executable, "executable graph")
