"""ONNX Runtime's operator `fastface.kernels::DecoupledAttention`: a shared library and GPU code.

    files = place_library(engine_folder, head_sizes=[64], dtypes=["float16"])
    options.register_custom_ops_library(str(library_in(engine_folder)))

The library (`ort_operator.cpp`) looks for GPU code in its own folder, so that an engine carries a
cubin of its GPU and PTX for newer ones (0.36 MB a head size and dtype), where all inside the
library would be four. Both are shipped for the head sizes of SDXL and of the mini model, as one
archive of half a megabyte. NVRTC compiles other head sizes, and the machine's C++ compiler the
library where the shipped one does not fit. The shipped code is made by NVRTC 12, because drivers of
CUDA 12 refuse what NVRTC 13 makes, and the library wants glibc 2.28 and nothing else.

The CPU version is tested as it is. The same kernels and launches ran on an H100 in a prototype;
this library's CUDA version was executed on the CPU, thread by thread, and not run on a GPU.
"""

import hashlib
import io
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Final

from fastface_trt.engines.hardware import cuda_hardware
from fastface_trt.engines.kernels.compile import (
    ARCHITECTURES,
    DTYPES,
    USUAL_TOKENS,
    check_head_size,
    check_tokens,
    compile_kernels,
)
from fastface_trt.errors import BuildFailed, FastFaceError, InvalidRequest, MissingDependency

LIBRARY_NAME: Final = "libfastface_kernels.so"
SHIPPED_HEAD_SIZES: Final = (64, 16)
"""Head sizes of SDXL and of the mini model."""

_ARCHIVE: Final = "operator.tar.xz"
_HERE: Final = resources.files(__package__)
_SOURCE: Final = "ort_operator.cpp"
_PTX_FROM: Final = "sm_80"
_HOST: Final = ("linux", "x86_64")
_COMPILERS: Final = ("c++", "g++", "clang++")
_OPTIONS: Final = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-s")
_ZIG: Final = ("-m", "ziglang", "c++", "-target", "x86_64-linux-gnu.2.28")


def _version() -> str:
    digest = hashlib.sha256()
    for name in sorted(entry.name for entry in _HERE.iterdir()):
        if name.endswith((".cpp", ".cu", ".cuh")):
            digest.update(name.encode() + b"\0" + _HERE.joinpath(name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


LIBRARY_VERSION: Final = _version()
"""Hash of the sources of library and kernels; part of an engine's identity."""


@dataclass(frozen=True)
class LibraryStatus:
    """Whether this machine can have the operator, in words; `hint` is empty where it can."""

    available: bool
    detail: str
    hint: str = ""


def supports(tokens: int, head_size: int, dtype: str) -> bool:
    """Whether there are kernels for T image tokens, heads of D elements, and q, k, v of `dtype`."""
    try:
        check_head_size(head_size)
        check_tokens(tokens)
    except InvalidRequest:
        return False
    return dtype in DTYPES


def library_status(architecture: str | None = None) -> LibraryStatus:
    """Where the operator would come from for a GPU such as `sm_90`; None is this machine's GPU."""
    architecture = architecture or _this_gpu()
    if sys.platform != "linux":
        return LibraryStatus(
            False,
            f"The attention operator is written for Linux, not for {sys.platform}.",
            "Use Linux or WSL 2; other engines use ONNX operators in its place.",
        )
    if architecture and _number(architecture) < _number(_PTX_FROM):
        return LibraryStatus(
            False,
            f"The attention kernels need {_PTX_FROM} or newer, and this GPU is {architecture}.",
            "Use a GPU from Ampere on; on this one engines use ONNX operators in their place.",
        )
    shipped = _shipped()
    sizes = " and ".join(map(str, SHIPPED_HEAD_SIZES))
    if LIBRARY_NAME in shipped:
        how = "PTX" if architecture and not _nearest(architecture) else "machine code"
        where = f" for {architecture} ({how})" if architecture else ""
        return LibraryStatus(
            True, f"The attention operator is shipped{where}, for heads of {sizes} elements."
        )
    compiler = _compiler()
    if compiler is None:
        return LibraryStatus(
            False,
            f"The attention operator is not shipped for {platform.machine()}, and there is no C++ "
            "compiler to build it.",
            "Install one (apt install g++); without it engines use ONNX operators in its place.",
        )
    code = "shipped" if shipped else "compiled by NVRTC"
    return LibraryStatus(
        True, f"The attention operator is built by {compiler}; its GPU code is {code}."
    )


def place_library(
    folder: Path,
    head_sizes: Sequence[int],
    dtypes: Sequence[str],
    architecture: str | None = None,
    *,
    tokens: int = USUAL_TOKENS,
) -> list[Path]:
    """Put the library, and GPU code for T, every head size D and dtype, into `folder`; the files.

    Code is machine code for `architecture` (`sm_90`; None is this machine's GPU, or every one that
    is known where there is none) and PTX that newer GPUs' drivers compile. Raises `InvalidRequest`
    for head sizes and dtypes without a kernel, `MissingDependency` where `library_status` says no
    or NVRTC is wanted and missing, and `BuildFailed` where a compiler refuses.
    """
    status = library_status(architecture)
    if not status.available:
        raise MissingDependency(status.detail, status.hint)
    for size in head_sizes:
        check_head_size(size)
    architecture = architecture or _this_gpu()
    files: dict[str, bytes] = {}
    for size, dtype in sorted({(size, dtype) for size in head_sizes for dtype in dtypes}):
        files |= _code(size, dtype, architecture, tokens)
    files[LIBRARY_NAME] = _shipped().get(LIBRARY_NAME) or _built()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def library_in(folder: Path) -> Path | None:
    """The library in an engine's folder, for `SessionOptions.register_custom_ops_library`."""
    library = folder / LIBRARY_NAME
    return library if library.is_file() else None


def code_name(
    head_size: int, dtype: str, architecture: str | None = None, tokens: int = USUAL_TOKENS
) -> str:
    """File name of a cubin, or of PTX without an architecture, as the library looks for it."""
    suffix = f"-{architecture}.cubin" if architecture else ".ptx"
    of_tokens = "" if tokens == USUAL_TOKENS else f"-{tokens}tokens"
    return f"decoupled_attention-{head_size}-{dtype}{of_tokens}{suffix}"


def _code(head_size: int, dtype: str, architecture: str | None, tokens: int) -> dict[str, bytes]:
    """Cubins and PTX by file name."""
    ptx, shipped = code_name(head_size, dtype, tokens=tokens), _shipped()
    if ptx in shipped:
        nearest = _nearest(architecture) if architecture else None
        wanted = ARCHITECTURES if architecture is None else (nearest,) if nearest else ()
        names = [code_name(head_size, dtype, one) for one in wanted]
        return {name: shipped[name] for name in (*names, ptx)}
    try:
        targets = (architecture,) if architecture else ARCHITECTURES
        return _compiled(head_size, dtype, targets, tokens)
    except MissingDependency as error:
        raise MissingDependency(
            f"Attention kernels for {tokens} image tokens and heads of {head_size} elements in "
            f"{dtype} are not shipped, and cannot be compiled: {error.message}",
            error.hint,
        ) from None


def _compiled(
    head_size: int, dtype: str, architectures: Sequence[str], tokens: int = USUAL_TOKENS
) -> dict[str, bytes]:
    files = {
        code_name(head_size, dtype, one, tokens): compile_kernels(
            one, head_size, dtype, "cubin", heads_last=True, tokens=tokens
        ).code
        for one in architectures
    }
    ptx = compile_kernels(_PTX_FROM, head_size, dtype, "ptx", heads_last=True, tokens=tokens).code
    return files | {code_name(head_size, dtype, tokens=tokens): ptx}


@lru_cache
def _shipped() -> dict[str, bytes]:
    """The shipped files by name: none if made from other sources, no library for other machines."""
    try:
        packed = _HERE.joinpath(_ARCHIVE).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
            read = {one.name: archive.extractfile(one) for one in archive.getmembers()}
            files = {name: file.read() for name, file in read.items() if file}
    except (FileNotFoundError, tarfile.TarError):  # TarError: also a Python without lzma
        return {}
    if files.pop("sources", b"").decode() != LIBRARY_VERSION:
        return {}
    if (sys.platform, platform.machine()) != _HOST:
        del files[LIBRARY_NAME]
    return files


@lru_cache
def _built() -> bytes:
    compiler = _compiler()
    assert compiler is not None, "library_status has looked"
    return _compile_library([compiler])


def _compile_library(compiler: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder, resources.as_file(_HERE) as sources:
        library = Path(folder, LIBRARY_NAME)
        command = [*compiler, *_OPTIONS, f'-DFASTFACE_SOURCES="{LIBRARY_VERSION}"']
        command += [str(sources / _SOURCE), "-o", str(library), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildFailed(
                f"{compiler[0]} cannot compile {_SOURCE}: {done.stderr.strip()[-2000:]}",
                "Use a compiler of C++17, such as g++ 9 or clang++ 10.",
            )
        return library.read_bytes()


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def _this_gpu() -> str | None:
    capability = cuda_hardware()["compute_capability"]
    return None if capability == "unknown" else f"sm_{capability.replace('.', '')}"


def _number(architecture: str) -> int:
    found = re.fullmatch(r"sm_(\d+)[af]?", architecture)
    if not found:
        raise InvalidRequest(
            f"{architecture!r} is not a GPU architecture.", f"Known: {', '.join(ARCHITECTURES)}."
        )
    return int(found[1])


def _nearest(architecture: str) -> str | None:
    """The shipped architecture whose machine code this one runs: same major version, minor ≤."""
    own = _number(architecture)
    fits = [one for one in ARCHITECTURES if own // 10 * 10 <= _number(one) <= own]
    return max(fits, key=_number, default=None)


def _ship() -> None:
    """Make the archive of the package, with the tools of `make operator-library`."""
    files = {"sources": LIBRARY_VERSION.encode()}
    files[LIBRARY_NAME] = _compile_library([sys.executable, *_ZIG])
    for size in SHIPPED_HEAD_SIZES:
        for dtype in DTYPES:
            files |= _compiled(size, dtype, ARCHITECTURES)
    with resources.as_file(_HERE) as here, tarfile.open(here / _ARCHIVE, "w:xz") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)  # no time and no owner: the same bytes each time
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        print(here / _ARCHIVE)


if __name__ == "__main__":
    try:
        _ship()
    except FastFaceError as error:
        raise SystemExit(str(error)) from None
