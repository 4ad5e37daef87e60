"""The command line, one file per command; `main` puts them together."""

from time import perf_counter
from typing import Final

STARTED: Final = perf_counter()
"""When the command began, by `perf_counter`, but for the interpreter's own start."""
