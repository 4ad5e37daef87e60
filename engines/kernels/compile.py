"""NVRTC: from the CUDA sources beside this file to PTX or machine code, on any machine.

NVRTC comes as a wheel (`nvidia-cuda-nvrtc`, 58 MB) and needs neither a GPU nor a driver nor a
toolkit. It is called through `cuda.bindings.nvrtc`, since `cuda.core.Program` asks the driver for
its version after every compilation to PTX. The sources include nothing from the toolkit.

PTX is for engines that carry the kernel along: TensorRT's plugins take nothing else, and a driver
compiles it for its own GPU. PTX of an NVRTC newer than the driver is refused by the driver. Machine
code (cubin) is for launching here and now: it runs on its own architecture only, and on any driver
of the same CUDA major version.
"""

import re
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal

from fastface_trt.errors import BuildFailed, InvalidRequest, MissingDependency, install_hint

ARCHITECTURES: Final = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Ampere (A100, RTX 30), Ada, Hopper, Blackwell (B200, RTX 50): what tests compile and we ship."""

DTYPES: Final = ("float16", "float32")
"""Element types of q, k, v and the output that a compilation can choose."""

STATISTICS_KERNEL: Final = "decoupled_attention_statistics"
OUTPUT_KERNEL: Final = "decoupled_attention"

_SOURCE: Final = "decoupled_attention.cu"
_HEADERS: Final = (
    "attention_map.cuh",
    "row_statistics.cuh",
    "manipulated_output.cuh",
    "many_tokens.cuh",
)

USUAL_TOKENS: Final = 4
"""Image tokens that the tuned kernels are for; others are looped over."""

MOST_TOKENS: Final = 256
"""Shared memory holds seven numbers of each."""

Target = Literal["ptx", "cubin"]


@dataclass(frozen=True)
class CompiledKernels:
    """Both kernels for one architecture (`sm_90`), head size and dtype; `log` is the compiler's.

    `code` is PTX text or a cubin image, as `target` says; kernels have C names in it.
    """

    architecture: str
    head_size: int
    dtype: str
    target: Target
    code: bytes
    log: str


def compile_kernels(
    architecture: str,
    head_size: int = 64,
    dtype: str = "float16",
    target: Target = "ptx",
    *,
    heads_last: bool = False,
    tokens: int = USUAL_TOKENS,
) -> CompiledKernels:
    """Compile the decoupled-attention kernels; takes about a second, keeps nothing on disk.

    `head_size` is D, a multiple of 8 from 8 to 128; `dtype` one of `DTYPES`; with `heads_last` q is
    [B,N,H·D] and the output may be added to another tensor, else q is [B,H,N,D]. For another T than
    4 `tokens` the launches take a mask as well, see `many_tokens.cuh`. Raises
    `InvalidRequest` for other values, `MissingDependency` without NVRTC, and `BuildFailed` with the
    compiler's log when it refuses the source or does not know the architecture.
    """
    check_head_size(head_size)
    check_tokens(tokens)
    if dtype not in DTYPES:
        raise InvalidRequest(
            f"The attention kernel has no variant for {dtype}.", f"Use {' or '.join(DTYPES)}."
        )
    if not re.fullmatch(r"sm_\d+[af]?", architecture):
        raise InvalidRequest(
            f"{architecture!r} is not a GPU architecture.", f"Known: {', '.join(ARCHITECTURES)}."
        )
    virtual = architecture.replace("sm_", "compute_") if target == "ptx" else architecture
    options = [
        f"--gpu-architecture={virtual}",
        "--std=c++17",
        f"--define-macro=HEAD_SIZE={head_size}",
        f"--define-macro=FLOAT32={int(dtype == 'float32')}",
        f"--define-macro=HEADS_LAST={int(heads_last)}",
        f"--define-macro=TOKENS={tokens}",
    ]
    if target == "cubin":
        options.append("--ptxas-options=-v")  # registers and spills, into the log
    code, log = _nvrtc(options, target)
    return CompiledKernels(architecture, head_size, dtype, target, code, log)


def check_head_size(head_size: int) -> None:
    """Raise `InvalidRequest` unless the kernels can be compiled for this D."""
    if head_size % 8 or not 8 <= head_size <= 128:
        raise InvalidRequest(
            f"The attention kernel has no variant for heads of {head_size} elements.",
            "It needs a multiple of 8 from 8 to 128; use the engine without the kernel.",
        )


def check_tokens(tokens: int) -> None:
    """Raise `InvalidRequest` unless the kernels can be compiled for this T."""
    if not 2 <= tokens <= MOST_TOKENS:
        raise InvalidRequest(
            f"The attention kernel has no variant for {tokens} image tokens.",
            f"It takes 2 to {MOST_TOKENS}; use the engine without the kernel.",
        )


def _nvrtc(options: list[str], target: Target) -> tuple[bytes, str]:
    nvrtc = _bindings()

    def call(result: tuple[Any, ...], log: str = "") -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildFailed(
                f"NVRTC cannot compile {_SOURCE} with {' '.join(options)}: {log or status.name}",
                "Update nvidia-cuda-nvrtc, or use the engine without the kernel.",
            )
        return values[0] if values else None

    source, *headers = (
        resources.files(__package__).joinpath(name).read_bytes() for name in (_SOURCE, *_HEADERS)
    )
    names = [name.encode() for name in _HEADERS]
    created = nvrtc.nvrtcCreateProgram(source, _SOURCE.encode(), len(headers), headers, names)
    program = call(created)
    try:
        done = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        log = _read(call, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        text = log.rstrip(b"\0").decode(errors="replace").strip()
        call(done, text)
        if target == "ptx":
            code = _read(call, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")
        else:
            code = _read(call, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        return code, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(call: Any, program: Any, size: Any, get: Any) -> bytes:
    buffer: bytes = b"\0" * call(size(program))  # the binding writes into it
    call(get(program, buffer))
    return buffer


def _bindings() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library, which has a wheel of its own
    except Exception as error:  # ImportError, or whatever the loader throws
        raise MissingDependency(
            f"The CUDA run-time compiler cannot be loaded: {str(error).splitlines()[0]}",
            install_hint("kernels"),
        ) from None
    return nvrtc
