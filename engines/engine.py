"""What every backend offers: an `Engine` runs one module, an `EngineBuilder` makes engine files.

The denoising loop sees only `Engine`, so it cannot tell ONNX Runtime from TensorRT or from the
PyTorch oracle.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from typing_extensions import Self

from fastface_trt.engines.device import Array, Device, DeviceTensor, Tensor, dtype_name
from fastface_trt.engines.manifest import BuildReport, EngineManifest, ModuleSpec, TensorSpec
from fastface_trt.errors import EngineMismatch, InvalidRequest

Progress = Callable[[str], None]
"""Called with one line of text when a long operation enters its next phase."""


class Engine(Protocol):
    """A module that can be called, and a context manager around its resources."""

    spec: ModuleSpec

    @property
    def device(self) -> Device:
        """Where its tensors live."""
        ...

    @property
    def request_counts(self) -> tuple[int, ...] | None:
        """Numbers of requests that one call may hold, in rising order; None for any number."""
        ...

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once. Inputs and outputs carry the names, shapes and dtypes of `spec`.

        Both are tensors of `device`; an engine on a GPU uploads numpy inputs by itself. Outputs on
        the host are owned by the caller. Outputs on a GPU are the engine's own buffers, valid until
        this thread calls it again or it is closed: `device.copy` what must last.

        Raises `EngineFailed` when the backend fails, `InvalidRequest` for a missing, unknown or
        wrongly shaped input, `EngineMismatch` for a device tensor of another dtype.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; calling it twice is harmless."""
        ...

    def __enter__(self) -> "Engine": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class EngineBuilder(Protocol):
    """Makes engine files from one ONNX module, and opens them again."""

    backend: str

    def identity(self, module: ModuleSpec) -> Mapping[str, Any]:
        """All that changes the engine of `module` besides the module's files, as JSON values.

        Its keys are fields of `EngineManifest`: `backend`, `backend_version`, and where they
        matter `options` and `hardware`. Two builders with equal identities make interchangeable
        engines; the cache key is a hash of this and of the module's file hashes.
        """
        ...

    def check_runs_here(self) -> None:
        """Raise `BackendUnavailable` when engines of this builder cannot run on this machine.

        Asked before an engine is built in order to be opened, since a build can take minutes.
        """
        ...

    def takes(self, manifest: EngineManifest) -> bool:
        """Whether an engine that is not what this builder would make serves as well.

        It is asked about engines of exactly the module that is wanted, so only how they were built
        counts.
        """
        ...

    def build(
        self, module: ModuleSpec, source: Path, target: Path, progress: Progress
    ) -> BuildReport:
        """Write the engine's files for `module` (its files lie in `source`) into folder `target`.

        Raises `BuildFailed`. May be killed at any moment: the cache deals with what is left.
        """
        ...

    def open(self, manifest: EngineManifest, folder: Path) -> Engine:
        """Open verified engine files; raise `EngineMismatch` when they are for something else."""
        ...

    def device(self) -> Device:
        """Where the tensors of this builder's engines live; one object for all of them.

        It is opened on first use and again after it was closed. Raises `BackendUnavailable`.
        """
        ...


def check_inputs(spec: ModuleSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of `spec`, in its order; raise `InvalidRequest` naming the first misfit.

    Named dimensions must agree between inputs. Arrays on the host get the dtypes of `spec`:
    floating-point ones are cast, integers are not. A tensor in device memory is never cast; a wrong
    dtype there means modules that do not fit each other and raises `EngineMismatch`.
    """
    unknown = inputs.keys() - {t.name for t in spec.inputs}
    missing = {t.name for t in spec.inputs} - inputs.keys()
    if unknown or missing:
        raise InvalidRequest(
            f"Module {spec.name} takes {', '.join(t.name for t in spec.inputs)}; "
            f"missing: {sorted(missing) or 'none'}, unknown: {sorted(unknown) or 'none'}."
        )
    sizes: dict[str, int] = {}
    ready: dict[str, Tensor] = {}
    for tensor in spec.inputs:
        given = inputs[tensor.name]
        if not isinstance(given, DeviceTensor):
            given = np.asarray(given)
        fits = len(given.shape) == len(tensor.shape) and all(
            size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
            for size, dim in zip(given.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise InvalidRequest(
                f"Input {tensor.name} of module {spec.name} has shape {given.shape}, "
                f"expected {tensor.shape}" + (f" with {sizes}." if sizes else ".")
            )
        if isinstance(given, DeviceTensor):
            _require_dtype(spec, tensor, given)
            ready[tensor.name] = given
        else:
            ready[tensor.name] = _cast(spec, tensor, given)
    return ready


def host_arrays(spec: ModuleSpec, inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """Checked inputs of an engine on the host; raise `InvalidRequest` for one in device memory."""
    arrays: dict[str, Array] = {}
    for name, tensor in inputs.items():
        if isinstance(tensor, DeviceTensor):
            raise InvalidRequest(
                f"Input {name} of module {spec.name} lies in device memory, not on the host.",
                "Download it first.",
            )
        arrays[name] = tensor
    return arrays


def _require_dtype(spec: ModuleSpec, tensor: TensorSpec, given: DeviceTensor) -> None:
    if given.dtype != tensor.dtype:
        raise EngineMismatch(
            f"Input {tensor.name} of module {spec.name} is {tensor.dtype} and was given "
            f"{given.dtype}: the modules of this export do not fit each other on a GPU.",
            "Export the model again with this version: fastface-trt export.",
        )


def _cast(spec: ModuleSpec, tensor: TensorSpec, array: Array) -> Array:
    dtype = np.dtype(tensor.dtype)
    # A float given for an integer would be cut silently; what a float takes is rounded anyway.
    castable = array.dtype.kind in "fiub" if dtype.kind == "f" else array.dtype == dtype
    if not castable:
        raise InvalidRequest(
            f"Input {tensor.name} of module {spec.name} is {dtype_name(array)}, "
            f"expected {tensor.dtype}."
        )
    # Not ascontiguousarray, which makes a scalar one-dimensional.
    return np.asarray(array, dtype=dtype, order="C")


class Closing(ABC):
    """A context manager whose exit is `close`."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held; calling it twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
