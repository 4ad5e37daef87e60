"""A process that obtains an export through a storage that hangs in the middle of a file.

Arguments: address, home, how many bytes may be read in all. Prints `hangs` when it got that far.
"""

import sys
import threading
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fastface_trt.serving.storage.distribution import obtain


class HangingFileSystem(LocalFileSystem):
    """A directory whose files are read in small pieces, until so many bytes were read."""

    protocol = "hanging"
    left = 0

    def open(self, path, mode="rb", **kwargs):
        file = super().open(path, mode, **kwargs)
        read = file.f.read

        class Hanging:
            def read(self, size):
                block = read(min(size, 64_000))
                HangingFileSystem.left -= len(block)
                if HangingFileSystem.left < 0:
                    print("hangs", flush=True)
                    threading.Event().wait()
                return block

            def seek(self, place):
                file.seek(place)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

        return Hanging()


if __name__ == "__main__":
    address, home, HangingFileSystem.left = sys.argv[1], sys.argv[2], int(sys.argv[3])
    fsspec.register_implementation("hanging", HangingFileSystem)
    print(obtain(address, home=Path(home)).folder, flush=True)
