"""Where the header files, sources and CMake files of the C library lie."""

from pathlib import Path
from typing import Final

CMAKE_DIR: Final = Path(__file__).resolve().parent
"""Folder for CMake's `add_subdirectory`."""
INCLUDES: Final = CMAKE_DIR / "include"
"""Folder of `fastface_trt.h` (C) and `fastface.hpp` (C++)."""


def sources() -> tuple[Path, ...]:
    """Files to compile where CMake is not used; they need pybind11 and `INCLUDES`."""
    return tuple(sorted((CMAKE_DIR / "src").glob("*.cpp")))
