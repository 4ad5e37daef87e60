"""What every backend offers: an `Engine` runs one module, an `EngineBuilder` makes engine files.

The denoising loop sees only `Engine`, so it cannot tell ONNX Runtime from TensorRT or from the
PyTorch oracle.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.manifest import BuildReport, EngineManifest, ModuleSpec

Array = NDArray[Any]
Progress = Callable[[str], None]
"""Called with one line of text when a long operation enters its next phase."""


class Engine(Protocol):
    """A module that can be called, and a context manager around its resources."""

    spec: ModuleSpec

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run once. Inputs and outputs carry the names, shapes and dtypes of `spec`.

        Raises `EngineFailed` when the backend fails, `InvalidRequest` for a missing, unknown or
        wrongly shaped input. Outputs are owned by the caller.
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


def check_inputs(spec: ModuleSpec, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs of `spec` in its dtypes, in order; raise `InvalidRequest` naming the first misfit.

    Named dimensions must agree between inputs. Floating-point inputs are cast, integers are not.
    """
    from fastface_trt.errors import InvalidRequest

    unknown = inputs.keys() - {t.name for t in spec.inputs}
    missing = {t.name for t in spec.inputs} - inputs.keys()
    if unknown or missing:
        raise InvalidRequest(
            f"Module {spec.name} takes {', '.join(t.name for t in spec.inputs)}; "
            f"missing: {sorted(missing) or 'none'}, unknown: {sorted(unknown) or 'none'}."
        )
    sizes: dict[str, int] = {}
    ready: dict[str, Array] = {}
    for tensor in spec.inputs:
        array = np.asarray(inputs[tensor.name])
        fits = len(array.shape) == len(tensor.shape) and all(
            size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
            for size, dim in zip(array.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise InvalidRequest(
                f"Input {tensor.name} of module {spec.name} has shape {array.shape}, "
                f"expected {tensor.shape}" + (f" with {sizes}." if sizes else ".")
            )
        dtype = np.dtype(tensor.dtype)
        # A float given for an integer would be cut silently; what a float takes is rounded anyway.
        castable = array.dtype.kind in "fiub" if dtype.kind == "f" else array.dtype == dtype
        if not castable:
            raise InvalidRequest(
                f"Input {tensor.name} of module {spec.name} is {array.dtype}, "
                f"expected {tensor.dtype}."
            )
        # Not ascontiguousarray, which makes a scalar one-dimensional.
        ready[tensor.name] = np.asarray(array, dtype=dtype, order="C")
    return ready
