"""Launching the decoupled-attention kernels on tensors in device memory.

    kernel = AttentionKernel("sm_90", head_size=64, dtype="float16")
    kernel(stream, q, k, v, manipulation, ip_scale, out, workspace)

Nothing is allocated and nothing waits: the caller owns the workspace, and both launches go onto the
caller's stream, so a call can be captured into a CUDA graph. The meaning of the result is that of
`fastface::DecoupledAttention`. On an H100 it was within 2.1e-4 of float64 in fp16, and took 25 to
57 µs for three rows of SDXL.

Shape legend: B = R·G rows, R requests, G branches, H heads, N positions, T image tokens, for which
kernels are compiled (4 unless told otherwise), D head size, P parameter columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from math import prod
from typing import Any, Final, Protocol

import numpy as np

from fastface_trt.engines.contract import MANIPULATION_COLUMNS
from fastface_trt.engines.kernels.compile import (
    OUTPUT_KERNEL,
    STATISTICS_KERNEL,
    USUAL_TOKENS,
    check_head_size,
    check_tokens,
    compile_kernels,
)
from fastface_trt.errors import InvalidRequest, MissingDependency, install_hint

TOKENS: Final = USUAL_TOKENS
"""Image tokens that the tuned kernels are for: one 16-byte vector of the map per position."""

STATISTICS_THREADS: Final = 512
OUTPUT_THREADS: Final = 256
OUTPUT_POSITIONS: Final = 512
"""Threads of a block of either launch, and positions that a block of the second works on."""

STATISTICS_PER_HEAD: Final = 3
"""Minimum, maximum and quantile per token, the rows of the second part of the workspace."""

_ALIGNMENT = 16
_GRID_Y_LIMIT = 65535


class DeviceMemory(Protocol):
    """A dense, row-major tensor in device memory: address, shape, and a dtype such as float16."""

    @property
    def address(self) -> int:
        """Device pointer, a multiple of 16."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""
        ...

    @property
    def dtype(self) -> str:
        """Name of the element type."""
        ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """R, B, H, N and D of one call."""

    requests: int
    rows: int
    heads: int
    positions: int
    head_size: int


def workspace_bytes(rows: int, heads: int, positions: int, tokens: int = TOKENS) -> int:
    """Bytes of scratch memory for a call: the maps [B,H,N,T] and [B,H,3,T], both float32.

    It need not be zeroed, and calls on one stream may share it.
    """
    return rows * heads * (positions + STATISTICS_PER_HEAD) * tokens * 4


class AttentionKernel:
    """The two kernels for one GPU architecture (`sm_90`), head size, dtype and T `tokens`.

    Compiled in about a second when made; loaded into the current CUDA context by the first call.
    Raises what `compile_kernels` raises.
    """

    def __init__(
        self,
        architecture: str,
        head_size: int = 64,
        dtype: str = "float16",
        *,
        tokens: int = TOKENS,
    ) -> None:
        check_head_size(head_size)
        check_tokens(tokens)
        self.head_size, self.dtype, self.tokens = head_size, dtype, tokens
        compiled = compile_kernels(architecture, head_size, dtype, "cubin", tokens=tokens)
        self._image = compiled.code

    def __call__(
        self,
        stream: int,
        q_BHND: Any,
        k_BHTD: Any,
        v_BHTD: Any,
        manipulation_RP: Any,
        ip_scale_R: Any,
        out_BHND: Any,
        workspace: Any,
        *,
        token_mask_BT: Any = None,
        softmask: bool = True,
    ) -> None:
        """Put λ · f(A) V' of Eq. 6 into `out_BHND`, on the CUDA stream of handle `stream`.

        Tensors are `DeviceMemory` or offer `__cuda_array_interface__`; `manipulation_RP` and
        `ip_scale_R` are float32, `workspace` is of any shape and dtype with at least
        `workspace_bytes`. `token_mask_BT`, float32, says which tokens there are (engines.contract)
        and is not for 4 tokens. With `softmask` False the first launch is left out: right only if
        no row of `manipulation_RP` is of that kind, and done with 4 tokens alone. Raises
        `InvalidRequest` for what does not fit, before anything is launched, and `MissingDependency`
        without cuda-python.
        """
        tensors = [_memory(x) for x in (q_BHND, k_BHTD, v_BHTD, manipulation_RP, ip_scale_R)]
        out, scratch = _memory(out_BHND), _memory(workspace)
        mask = None if token_mask_BT is None else _memory(token_mask_BT)
        sizes = self._check([*tensors, out, scratch], mask)
        q, k, v, manipulation, ip_scale = (tensor.address for tensor in tensors)
        head_rows = sizes.rows * sizes.heads
        maps = scratch.address
        statistics = maps + head_rows * sizes.positions * self.tokens * 4
        usual = self.tokens == TOKENS
        further = () if usual else (0 if mask is None else mask.address,)
        # The kernels take C ints; a plain Python int would be passed as a pointer.
        counts = [np.int32(n) for n in (sizes.requests, sizes.rows, sizes.heads, sizes.positions)]
        core, first, second = self._loaded
        on = _Stream(stream)
        if softmask or not usual:
            config = core.LaunchConfig(grid=(head_rows,), block=(STATISTICS_THREADS,))
            core.launch(on, config, first, q, k, manipulation, *counts, maps, statistics, *further)
        blocks = -(-sizes.positions // OUTPUT_POSITIONS)
        config = core.LaunchConfig(grid=(blocks, head_rows), block=(OUTPUT_THREADS,))
        inputs = (q, k, v, manipulation, ip_scale, maps, statistics)
        core.launch(on, config, second, *inputs, *counts, out.address, *further)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        try:
            core = import_module("cuda.core")
        except ImportError as error:
            raise MissingDependency(
                f"The attention kernel cannot be launched: {error}.",
                install_hint("kernels"),
            ) from None
        code = core.ObjectCode.from_cubin(self._image)
        return core, code.get_kernel(STATISTICS_KERNEL), code.get_kernel(OUTPUT_KERNEL)

    def _check(self, tensors: Sequence[DeviceMemory], mask: DeviceMemory | None = None) -> Sizes:
        """Sizes of a call with q, k, v, manipulation, ip_scale, the output and the workspace."""
        q, k, v, manipulation, ip_scale, out, workspace = tensors
        if len(q.shape) != 4 or not all(q.shape) or q.shape[3] != self.head_size:
            raise InvalidRequest(
                f"q is {_text(q.shape)}; this attention kernel takes [B, H, N, {self.head_size}].",
                "Make an AttentionKernel of that head size.",
            )
        rows, heads, positions, size = q.shape
        requests = ip_scale.shape[0] if ip_scale.shape else 0
        if requests == 0 or rows % requests or rows * heads > _GRID_Y_LIMIT:
            raise InvalidRequest(
                f"{rows} rows of {heads} heads do not divide into {requests} requests.",
                "Send the branches of every request, and one parameter row for each request.",
            )
        tokens = (rows, heads, self.tokens, size)
        if mask is not None and self.tokens == TOKENS:
            raise InvalidRequest(
                f"An attention kernel for {TOKENS} image tokens takes no mask.", "Leave it out."
            )
        masks = [] if mask is None else [("the mask", mask, (rows, self.tokens), "float32")]
        for name, tensor, shape, dtype in (
            ("q", q, q.shape, self.dtype),
            ("k", k, tokens, self.dtype),
            ("v", v, tokens, self.dtype),
            ("manipulation", manipulation, (requests, len(MANIPULATION_COLUMNS)), "float32"),
            ("ip_scale", ip_scale, (requests,), "float32"),
            ("the output", out, q.shape, self.dtype),
            ("the workspace", workspace, workspace.shape, workspace.dtype),
            *masks,
        ):
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise InvalidRequest(
                    f"{name} is {tensor.dtype} {_text(tensor.shape)} and has to be "
                    f"{dtype} {_text(shape)}.",
                    f"The kernel reads dense tensors of one dtype, with {self.tokens} image "
                    "tokens.",
                )
            if tensor.address % _ALIGNMENT or not tensor.address:
                raise InvalidRequest(
                    f"{name} lies at address {tensor.address:#x}, which is no multiple of 16.",
                    "Use the start of an allocation.",
                )
        needed = workspace_bytes(rows, heads, positions, self.tokens)
        given = prod(workspace.shape) * _item_bytes(workspace.dtype)
        if given < needed:
            raise InvalidRequest(
                f"The workspace holds {given} bytes and {needed} are needed.",
                "Size it with workspace_bytes.",
            )
        return Sizes(requests, rows, heads, positions, size)


@dataclass(frozen=True, slots=True)
class _Memory:
    address: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream handle in the form that cuda.core takes from other libraries."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def _memory(tensor: Any) -> DeviceMemory:
    interface = getattr(tensor, "__cuda_array_interface__", None)
    if interface is None:
        memory: DeviceMemory = tensor
        return memory
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    if interface.get("strides") not in (None, _dense(shape, dtype.itemsize)):
        raise InvalidRequest(
            f"A tensor of shape {_text(shape)} is not dense.", "Copy it into row-major order."
        )
    return _Memory(interface["data"][0], shape, dtype.name)


def _dense(shape: Sequence[int], item: int) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) * item for axis in range(len(shape)))


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
