"""What this machine can do at best, and the least time that a call's stages can take on it.

The floor is the roofline model's (Williams, Waterman, Patterson 2009): a module takes at least its
operations over the machine's rate of operations, and at least its bytes over the rate of bytes.
Both rates are measured here, with the backend that is benchmarked, so that the floor is one that
this machine has been seen to reach: products of matrices of several shapes, the best of them, and
copies of arrays far larger than any cache.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Literal, Protocol

import numpy as np

from fastface_trt.bench.flops import OperationCount, count_module
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.contract import TEXT_POSITIONS
from fastface_trt.engines.device import Device, HostDevice, Tensor
from fastface_trt.engines.engine import Engine, EngineBuilder
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import ModuleSpec, TensorSpec
from fastface_trt.engines.onnx.file import check_references
from fastface_trt.errors import MissingDependency
from fastface_trt.runtime.export_folder import Export

Bound = Literal["operations", "bytes"]
RateType = Literal["float32", "float16"]
Shape = tuple[int, int, int]
"""M, K, N of a product [M,K] × [K,N]."""

HOST_SHAPES: Final[tuple[Shape, ...]] = ((512, 512, 512), (1024, 1024, 1024), (2304, 640, 2560))
DEVICE_SHAPES: Final[tuple[Shape, ...]] = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 1280, 10240),
)
COPY_BYTES: Final = 2**28


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Measured rates: floating-point operations per second of products of matrices, bytes per
    second read plus written by a copy. `best` says what gave the first, `products` all of them.
    """

    backend: str
    dtype: RateType
    flops_per_second: float
    bytes_per_second: float
    best: str
    products: dict[str, float]


@dataclass(frozen=True, slots=True)
class Floor:
    """The least seconds for `flops` operations and `bytes` moved, and which of the two binds.

    Of a sum of calls the seconds are the sum of theirs, and what binds is what bound them longest.
    """

    seconds: float
    bound: Bound
    flops: int
    bytes: int
    operation_seconds: float
    byte_seconds: float


def floor(count: OperationCount, rates: MachineRates) -> Floor:
    """The least time of one call of a module: the longer of computing and moving its data."""
    computing = count.flops / rates.flops_per_second
    moving = count.bytes / rates.bytes_per_second
    bound: Bound = "operations" if computing >= moving else "bytes"
    return Floor(max(computing, moving), bound, count.flops, count.bytes, computing, moving)


def sum_floors(floors: Iterable[Floor]) -> Floor:
    """The least time of calls one after the other, such as the modules of a stage."""
    calls = list(floors)
    by_bound: dict[Bound, float] = {"operations": 0.0, "bytes": 0.0}
    for call in calls:
        by_bound[call.bound] += call.seconds
    return Floor(
        sum(by_bound.values()),
        "operations" if by_bound["operations"] >= by_bound["bytes"] else "bytes",
        sum(call.flops for call in calls),
        sum(call.bytes for call in calls),
        sum(call.operation_seconds for call in calls),
        sum(call.byte_seconds for call in calls),
    )


def measure_rates(
    builder: EngineBuilder,
    *,
    dtype: RateType = "float32",
    shapes: Iterable[Shape] | None = None,
    copy_bytes: int = COPY_BYTES,
    seconds: float = 0.3,
) -> MachineRates:
    """Measure this machine through a backend's builder, for at least `seconds` per measurement.

    Products run in engines that are built for it in a temporary cache, in `dtype`; on the host
    numpy's are tried too. A GPU's rates leave out the copies from and to the host. Takes 4 times
    `copy_bytes` of memory at most. Raises `MissingDependency` without onnx, and the errors of
    building and running.
    """
    device = builder.device()
    on_host = isinstance(device, HostDevice)
    products: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fastface-rates-") as name:
        cache = EngineCache(Path(name) / "cache")
        for shape in shapes or (HOST_SHAPES if on_host else DEVICE_SHAPES):
            module = _write_product(Path(name), shape, dtype)
            label = f"{builder.backend} {'×'.join(map(str, shape))}"
            with cache.open(module, Path(name), builder, lambda line: None) as engine:
                products[label] = _product_rate(engine, device, shape, dtype, seconds)
            if on_host and dtype == "float32":
                products[label.replace(builder.backend, "numpy")] = _numpy_rate(shape, seconds)
    best = max(products, key=products.__getitem__)
    moved = _host_copy(copy_bytes, seconds) if on_host else _copy(device, copy_bytes, seconds)
    return MachineRates(builder.backend, dtype, products[best], moved, best, products)


def _fastest(call: Callable[[], object], wait: Callable[[], None], seconds: float) -> float:
    """Seconds of the fastest call in at least so many seconds, and at least five calls.

    The fastest, because a rate that was reached once is one that the machine has.
    """
    call()
    wait()
    best, until, calls = float("inf"), perf_counter() + seconds, 0
    while calls < 5 or perf_counter() < until:
        started = perf_counter()
        call()
        wait()
        best = min(best, perf_counter() - started)
        calls += 1
    return best


def _product_rate(
    engine: Engine, device: Device, shape: Shape, dtype: RateType, seconds: float
) -> float:
    m, k, n = shape
    x_MK = device.upload(_random((m, k), dtype))
    return 2 * m * k * n / _fastest(lambda: engine(x=x_MK), device.synchronize, seconds)


def _numpy_rate(shape: Shape, seconds: float) -> float:
    m, k, n = shape
    x_MK, w_KN = _random((m, k), "float32"), _random((k, n), "float32")
    y_MN = np.empty((m, n), np.float32)
    return 2 * m * k * n / _fastest(lambda: np.matmul(x_MK, w_KN, out=y_MN), _no_wait, seconds)


def _copy(device: Device, size: int, seconds: float) -> float:
    source = device.upload(np.zeros(size // 4, np.float32))
    kept: list[Tensor] = []

    def copy() -> None:
        kept[:] = [device.copy(source)]

    return 2 * size / _fastest(copy, device.synchronize, seconds)


def _host_copy(size: int, seconds: float) -> float:
    """A share per core: one core alone does not fill the memory's channels."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shares = [np.zeros(size // (4 * (cores or 1)), np.float32) for _ in range(cores or 1)]
    targets = [np.ones_like(share) for share in shares]
    with ThreadPoolExecutor(cores or 1) as pool:
        fastest = _fastest(lambda: list(pool.map(np.copyto, targets, shares)), _no_wait, seconds)
    return 2 * sum(share.nbytes for share in shares) / fastest


def _no_wait() -> None:
    """On the host a call returns when its work is done."""


def _random(shape: tuple[int, int], dtype: RateType) -> Any:
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


def _write_product(folder: Path, shape: Shape, dtype: RateType) -> ModuleSpec:
    """An ONNX module y = x w with the weights w inside, as a linear layer is."""
    try:
        from onnx import TensorProto, helper, numpy_helper, save
    except ImportError as error:
        raise MissingDependency(
            "Measuring a backend's rate of operations needs onnx.", "pip install onnx"
        ) from error
    m, k, n = shape
    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, [m, k])],
        [helper.make_tensor_value_info("y", kind, [m, n])],
        [numpy_helper.from_array(_random((k, n), dtype), "w")],
    )
    file = folder / f"product-{m}-{k}-{n}.onnx"
    opset = helper.make_opsetid("", 20)
    save(helper.make_model(graph, opset_imports=[opset], ir_version=9), file)
    return ModuleSpec(
        name="product",
        inputs=(TensorSpec(name="x", dtype=dtype, shape=(m, k)),),
        outputs=(TensorSpec(name="y", dtype=dtype, shape=(m, n)),),
        files=(describe_file(folder, file),),
    )


class StageWork(Protocol):
    """What a stage did in one call of the pipeline; modules but the UNet run one row a call."""

    @property
    def name(self) -> str:
        """The module's where a module ran."""
        ...

    @property
    def label(self) -> str:
        """What tables call the stage."""
        ...

    @property
    def calls(self) -> int:
        """How often the module was called."""
        ...

    @property
    def rows(self) -> int | None:
        """Rows of all UNet calls together, None for other modules."""
        ...

    @property
    def branches(self) -> int | None:
        """UNet rows per request, None for other modules."""
        ...


def stage_floors(
    stages: Iterable[StageWork],
    export: Export,
    rates: MachineRates,
    *,
    height: int,
    width: int,
) -> dict[str, Floor]:
    """Least time of each stage that runs a module of the export, by the stage's label.

    `height` and `width` in pixels. Stages without a module (tokenising, PNG) are left out, and so
    is what computes no products of matrices. Raises what `count_module` raises.
    """
    manifest = export.manifest
    size = dict(zip(("height", "width"), manifest.latent_shape(height, width)[1:], strict=True))

    @cache
    def count(module: str, batch: int, requests: int) -> OperationCount:
        graph, *data = (file.path for file in manifest.modules[module].files)
        check_references(export.folder, graph, data)
        sizes = size | {"batch": batch, "requests": requests, "text": TEXT_POSITIONS}
        return count_module(export.folder / graph, sizes)

    floors: dict[str, Floor] = {}
    for stage in stages:
        if stage.name not in manifest.modules:
            continue
        # Calls of one stage hold equally many rows, or nearly so: the floor of the mean is theirs.
        batch = max(1, round((stage.rows or stage.calls) / stage.calls))
        counted = count(stage.name, batch, max(1, batch // (stage.branches or 1)))
        if counted.flops:
            floors[stage.label] = sum_floors([floor(counted, rates)] * stage.calls)
    return floors
