"""The attention kernel on a GPU: compared with float64, timed against the ONNX subroutine.

`python -m benchmarks.attention_kernel` checks every shape and kind, times the kernel with CUDA
events (median of many runs), and ONNX Runtime's CUDA provider on the function it replaces and on
the operator that launches it, and writes one JSON file per machine. Without a GPU it says so and
exits with 1. The kernel ran on an H100; the operator and its part of this file have not been run on
a GPU: the operator is exercised in the tests with its kernels executed on the CPU.

Shape legend: B = R·G rows, R requests, G branches, H heads, N positions, D head size.
"""

import json
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.contract import FUNCTION_DOMAIN, FUNCTION_NAME, KERNEL_DOMAIN, KINDS
from fastface_trt.engines.kernels.decoupled_attention import AttentionKernel, workspace_bytes
from fastface_trt.engines.kernels.operator_library import library_in, place_library
from fastface_trt.errors import BackendUnavailable, FastFaceError, install_hint
from tests.export.reference import decoupled_attention as reference

Array = NDArray[Any]
Run = Callable[[Sequence[Array]], Array]
"""From q, k, v, manipulation and ip_scale to the output."""

POSITIONS, HEADS, ROWS, HEAD_SIZE = (256, 1024, 4096, 16384), (5, 10, 20), (1, 3, 12), 64
BRANCHES = 3
TOLERANCE = 1e-3
"""Relative L2 error against float64 on the same inputs; fp16's rounding of the output is 3e-4."""

WARM_UPS, REPEATS = 10, 50
RESULTS = Path(__file__).parent / "results"

SETTINGS: dict[str, dict[str, Any]] = {
    "off": {"kind": "off"},
    "scale_power": {"kind": "scale_power", "scale": 1.55, "power": 1.3},
    "softmask": {"kind": "softmask", "scale": 1.55, "quantile": 0.65, "sharpness": 5.0},
    "softmask with AdaIN": {
        "kind": "softmask",
        "scale": 1.55,
        "quantile": 0.65,
        "sharpness": 5.0,
        "adain_weight": 0.7,
    },
}


@dataclass(frozen=True)
class Case:
    """One shape and kind."""

    setting: str
    rows: int
    heads: int
    positions: int

    @property
    def requests(self) -> int:
        """Three branches per request where the rows allow it."""
        return max(1, self.rows // BRANCHES)


@dataclass(frozen=True)
class Result:
    """Times in milliseconds; ONNX Runtime's are None where its CUDA provider is not installed."""

    case: Case
    relative_error: float
    kernel_ms: float
    subroutine_ms: float | None
    operator_ms: float | None
    operator_error: float | None


def cases() -> Iterator[Case]:
    """Every shape and kind of the table."""
    for positions, heads, rows, name in product(POSITIONS, HEADS, ROWS, SETTINGS):
        yield Case(name, rows, heads, positions)


def inputs_of(case: Case, head_size: int = HEAD_SIZE) -> list[Array]:
    """Random q, k, v in fp16, and float32 parameter rows, from a fixed seed."""
    rng = np.random.default_rng(case.positions)
    shape = (case.rows, case.heads, case.positions, head_size)
    q = (2 * rng.standard_normal(shape, np.float32)).astype(np.float16)
    tokens = (2, case.rows, case.heads, 4, head_size)
    k, v = rng.standard_normal(tokens, np.float32).astype(np.float16)
    given = {"scale": 1, "power": 1, "quantile": 0.65, "sharpness": 5, "adain_weight": 1}
    row = given | {"invert_first_token": 1, "upper_bound": 10} | SETTINGS[case.setting]
    row["kind"] = KINDS.index(row["kind"])
    columns = ("kind", *given, "invert_first_token", "upper_bound")
    manipulation = np.array([[row[name] for name in columns]] * case.requests, np.float32)
    return [q, k, v, manipulation, np.full(case.requests, 0.8, np.float32)]


def relative_error(case: Case, inputs: Sequence[Array], output: Array) -> float:
    """L2 error against float64 over all requests, relative to the L2 norm of the reference."""
    difference = norm = 0.0
    for rows in np.split(np.arange(case.rows), case.requests):
        q, k, v = (tensor[rows] for tensor in inputs[:3])
        expected = reference(q, k, v, ip_scale=np.float32(0.8), **SETTINGS[case.setting])
        difference += float(np.sum((output[rows] - expected) ** 2))
        norm += float(np.sum(expected**2))
    return float(np.sqrt(difference / norm))


class Gpu:
    """CUDA device 0: memory, one stream, and event timing."""

    def __init__(self) -> None:
        try:
            from cuda import core
            from cuda.bindings import driver

            self._driver, self._options = driver, core.EventOptions(timing_enabled=True)
            self.device = core.Device(0)
            self.device.set_current()
            self.stream = self.device.create_stream()
        except (ImportError, RuntimeError, ValueError) as error:
            raise BackendUnavailable(
                "This benchmark needs an NVIDIA GPU with its driver, and there is none here "
                f"({str(error).splitlines()[0]}).",
                f"Run it on a machine with one, after {install_hint('kernels')}",
            ) from None

    def upload(self, array: Array) -> "OnGpu":
        """A copy of `array` in device memory."""
        address = int(self._call("cuMemAlloc", max(array.nbytes, 1)))
        self._call("cuMemcpyHtoD", address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return OnGpu(address, array.shape, array.dtype.name)

    def download(self, tensor: "OnGpu") -> Array:
        """The tensor as a numpy array, after everything before it has finished."""
        self.stream.sync()
        array = np.empty(tensor.shape, tensor.dtype)
        self._call("cuMemcpyDtoH", array.ctypes.data, tensor.address, array.nbytes)
        return array

    def free(self, tensors: Sequence["OnGpu"]) -> None:
        """Give memory back."""
        for tensor in tensors:
            self._call("cuMemFree", tensor.address)

    def milliseconds(self, run: Callable[[], None]) -> float:
        """Median time of `run` on the stream."""
        for _ in range(WARM_UPS):
            run()
        times = []
        for _ in range(REPEATS):
            begin = self.stream.record(options=self._options)
            run()
            end = self.stream.record(options=self._options)
            end.sync()
            times.append(end - begin)
        return statistics.median(times)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if int(status):
            raise BackendUnavailable(f"{name} failed: {status.name}.", "Free the GPU's memory.")
        return values[0] if values else None


@dataclass(frozen=True)
class OnGpu:
    """A dense tensor in device memory."""

    address: int
    shape: tuple[int, ...]
    dtype: str


class Node:
    """One node on ONNX Runtime's CUDA provider, with tensors bound to device memory."""

    def __init__(self, domain: str, rank: int, library: Path | None, **attributes: int) -> None:
        import onnxruntime
        from onnx import TensorProto, helper

        from fastface_trt.export.functions import OPSET, attention_functions

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ImportError("onnxruntime-gpu is not installed")
        half, single = TensorProto.FLOAT16, TensorProto.FLOAT
        ranks = {"q": (half, rank), "k": (half, rank), "v": (half, rank)}
        ranks |= {"m": (single, 2), "s": (single, 1)}
        values = [helper.make_tensor_value_info(n, t, [None] * r) for n, (t, r) in ranks.items()]
        output = helper.make_tensor_value_info("out", half, [None] * rank)
        node = helper.make_node(FUNCTION_NAME, [*ranks], ["out"], domain=domain, **attributes)
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(domain, 1)]
        functions = [] if library else [one.to_function_proto() for one in attention_functions(4)]
        model = helper.make_model(
            helper.make_graph([node], "g", values, [output]),
            functions=functions,
            opset_imports=imports,
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        if library:
            options.register_custom_ops_library(str(library))
        self._runtime, self._names = onnxruntime, [*ranks]
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CUDAExecutionProvider"]
        )

    def run(self, inputs: Sequence[Array]) -> tuple[Array, float]:
        """The output, and the median wall time in milliseconds of a run that is waited for."""
        binding = self._session.io_binding()
        for name, array in zip(self._names, inputs, strict=True):
            value = self._runtime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("out", "cuda", 0)
        times = []
        for _ in range(WARM_UPS + REPEATS):
            begin = perf_counter()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            times.append(1000 * (perf_counter() - begin))
        return binding.copy_outputs_to_cpu()[0], statistics.median(times[WARM_UPS:])


def heads_inside(x_BHND: Array) -> Array:
    """[B,N,H·D], the operator's layout."""
    rows, _, positions, _ = x_BHND.shape
    return np.ascontiguousarray(x_BHND.swapaxes(1, 2)).reshape(rows, positions, -1)


class OnnxRuntime:
    """What ONNX Runtime offers: the exported function, and the operator per count of heads."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self._function = Node(FUNCTION_DOMAIN, 4, None)
        place_library(folder, [HEAD_SIZE], ["float16"], architecture)
        library = library_in(folder)
        self._operators = {h: Node(KERNEL_DOMAIN, 3, library, num_heads=h) for h in HEADS}

    def times(self, case: Case, inputs: Sequence[Array]) -> tuple[float, float, float]:
        """Milliseconds of function and operator, and the operator's relative error."""
        qkv = [heads_inside(x) for x in inputs[:3]]
        output, operator_ms = self._operators[case.heads].run([*qkv, *inputs[3:]])
        output = output.reshape(*output.shape[:2], case.heads, -1).swapaxes(1, 2)
        error = relative_error(case, inputs, output)
        return self._function.run(inputs)[1], operator_ms, error


def measure(gpu: Gpu, kernel: AttentionKernel, runtime: OnnxRuntime | None, case: Case) -> Result:
    """Check and time one case."""
    inputs = inputs_of(case)
    scratch = np.zeros(workspace_bytes(case.rows, case.heads, case.positions), np.uint8)
    on_gpu = [gpu.upload(array) for array in (*inputs, np.zeros_like(inputs[0]), scratch)]
    softmask = SETTINGS[case.setting]["kind"] == "softmask"

    def run() -> None:
        kernel(int(gpu.stream.handle), *on_gpu, softmask=softmask)

    try:
        run()
        error = relative_error(case, inputs, gpu.download(on_gpu[5]))
        milliseconds = gpu.milliseconds(run)
    finally:
        gpu.free(on_gpu)
    others = runtime.times(case, inputs) if runtime else (None, None, None)
    return Result(case, error, milliseconds, *others)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="JSON file; named by GPU if left out.")
def main(out: Path | None) -> None:
    """Check and time the attention kernel on this machine's GPU."""
    with TemporaryDirectory() as folder:
        _report(out, Path(folder))


def _report(out: Path | None, folder: Path) -> None:
    try:
        gpu = Gpu()
        kernel = AttentionKernel(f"sm_{gpu.device.arch}", HEAD_SIZE, "float16")
    except FastFaceError as error:
        raise click.ClickException(str(error)) from None
    runtime, why = None, ""
    try:
        runtime = OnnxRuntime(folder, f"sm_{gpu.device.arch}")
    except ImportError as error:
        why = str(error)
    results = []
    for case in cases():
        result = measure(gpu, kernel, runtime, case)
        results.append(result)
        click.echo(f"{asdict(case)}  error {result.relative_error:.1e}  {result.kernel_ms:.4f} ms")
    report = {
        "gpu": gpu.device.name,
        "architecture": f"sm_{gpu.device.arch}",
        "machine": platform.node(),
        "head_size": HEAD_SIZE,
        "tolerance": TOLERANCE,
        "onnxruntime": why or "CUDA provider, wall time of a run with bound tensors",
        "results": [asdict(result) for result in results],
    }
    out = out or RESULTS / f"attention-kernel-{gpu.device.name.replace(' ', '-').lower()}.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    errors = ((one.relative_error, one.operator_error or 0.0) for one in results)
    wrong = [pair for pair in errors if not all(error < TOLERANCE for error in pair)]
    if wrong:
        raise click.ClickException(f"{len(wrong)} of {len(results)} cases are off; see {out}.")


if __name__ == "__main__":
    main()
