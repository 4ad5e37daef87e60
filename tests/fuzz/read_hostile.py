"""Read pictures in a process of its own: `python read_hostile.py DOOR MAX_PIXELS FOLDER`.

DOOR is `server`, or `local` for the command line, Python and Triton. Writes JSON: what became of
each file, and by how many bytes the process grew at most.
"""

import json
import sys
import tracemalloc
from pathlib import Path

from fastface_trt.errors import BadPicture
from fastface_trt.runtime.images import load_picture
from fastface_trt.serving.pictures.files import decode_picture
from fastface_trt.serving.settings import ServerSettings


def peak_bytes():
    """Resident memory of this process at most, which no other process has touched."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main(door, max_pixels, folder):
    settings = ServerSettings(max_picture_pixels=int(max_pixels))
    doors = {
        "server": lambda path: decode_picture(path.read_bytes(), settings),
        "local": lambda path: load_picture(path, max_pixels=int(max_pixels)),
    }
    before, outcomes = peak_bytes(), {}
    tracemalloc.start()
    for path in sorted(Path(folder).iterdir()):
        try:
            outcomes[path.name] = list(doors[door](path).shape)
        except BadPicture as error:
            outcomes[path.name] = str(error)
        except BaseException as error:
            outcomes[path.name] = {"crash": repr(error)}
    left = tracemalloc.get_traced_memory()[0]
    report = {"outcomes": outcomes, "grown": peak_bytes() - before, "left": left}
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
