"""`embedding`: where C and C++ programs find headers and sources."""

import click

from fastface_trt.embedding.paths import CMAKE_DIR, INCLUDES, sources


@click.command()
@click.option("--includes", is_flag=True, help="A compiler flag for the headers: -I…")
@click.option("--cmake-dir", is_flag=True, help="The folder for CMake's add_subdirectory.")
@click.option("--sources", "want_sources", is_flag=True, help="The C++ files, one per line.")
def embedding(includes: bool, cmake_dir: bool, want_sources: bool) -> None:
    """Print where the C library's files lie; fastface_trt/embedding/README.md says how to use it.

    Without an option the CMake folder.
    """
    if includes:
        click.echo(f"-I{INCLUDES}")
    if want_sources:
        for file in sources():
            click.echo(str(file))
    if cmake_dir or not (includes or want_sources):
        click.echo(str(CMAKE_DIR))
