"""`fastface-trt embedding`: where C and C++ programs find headers, sources and CMake files.

Also `python -m fastface_trt.embedding`, for builds that have an interpreter and no PATH.
"""

from pathlib import Path
from typing import Final

import click

CMAKE_DIR: Final = Path(__file__).resolve().parent
"""Folder for CMake's `add_subdirectory`."""
INCLUDES: Final = CMAKE_DIR / "include"
"""Folder of `fastface_trt.h` (C) and `fastface.hpp` (C++)."""


def sources() -> tuple[Path, ...]:
    """Files to compile where CMake is not used; they need pybind11 and `INCLUDES`."""
    return tuple(sorted((CMAKE_DIR / "src").glob("*.cpp")))


@click.command()
@click.option("--includes", is_flag=True, help="A compiler flag for the headers: -I…")
@click.option("--cmake-dir", is_flag=True, help="The folder for CMake's add_subdirectory.")
@click.option("--sources", "want_sources", is_flag=True, help="The C++ files, one per line.")
def embedding(includes: bool, cmake_dir: bool, want_sources: bool) -> None:
    """Print where the C library's files lie; docs/embedding.md says how to use it.

    Without an option the CMake folder.
    """
    if includes:
        click.echo(f"-I{INCLUDES}")
    if want_sources:
        for file in sources():
            click.echo(str(file))
    if cmake_dir or not (includes or want_sources):
        click.echo(str(CMAKE_DIR))


if __name__ == "__main__":
    embedding(prog_name="python -m fastface_trt.embedding")
