import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.make_hostile import FOLDER, hostile

MAX_PIXELS = 4_000_000
BYTES_PER_PIXEL = 20  # as `decode_picture` says
GOOD = {  # strange, and yet pictures: whatever is wrong with them is not about pixels
    "jpg-exif-bomb",
    "jpg-many-segments",
    "png-exif-bomb",
    "png-exif-of-itself",
    "png-profile-bomb",
    "png-text-bombs",
    "png-xmp-bomb",
    "png-bomb-within-cap",
    "png-many-frames",
    "webp-exif-bomb",
}
GOOD_LOCALLY = {
    "bmp-good",
    "bmp-good-from-the-top",
    "tiff-deflate-bomb",
    "tiff-fields-of-everything",
    "tiff-good",
    "tiff-good-big",
}
REFUSED_FOR_SIZE = {
    "jpg-bomb-of-size",
    "png-bomb-of-size",
    "png-largest-size",
    "png-negative-size",
    "webp-bomb-of-size",
    "webp-bomb-of-size-lossy",
    "webp-canvas-of-16384",
    "webp-lossless-empty",
    "webp-canvas-of-2-to-24",
}


def read(door):
    script = Path(__file__).with_name("read_hostile.py")
    command = [sys.executable, script, door, str(MAX_PIXELS), FOLDER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    if door == "server":  # libtiff, which it does not let in, writes there
        assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report():
    return read("server")


@pytest.fixture(scope="module")
def local():
    return read("local")


def test_the_corpus_is_what_its_script_makes():
    assert {path.name for path in FOLDER.iterdir()} == set(hostile())
    assert max(path.stat().st_size for path in FOLDER.iterdir()) < 8_000


def outcomes_of(report):
    """What became of each file, and the names of those that were read."""
    outcomes = report["outcomes"]
    assert set(outcomes) == set(hostile())
    assert {name: one for name, one in outcomes.items() if isinstance(one, dict)} == {}
    return outcomes, {name for name, one in outcomes.items() if isinstance(one, list)}


def test_every_one_is_read_or_refused(report):
    _, read = outcomes_of(report)
    assert read >= GOOD
    others = read - _pictures_in_disguise()
    assert not any(name.startswith(("other-", "tiff-", "bmp-")) for name in others)


def test_the_local_door_reads_more_formats_and_refuses_the_same(report, local):
    of_server, read_by_server = outcomes_of(report)
    outcomes, read = outcomes_of(local)
    for name in hostile():
        if name.startswith(("png-", "jpg-", "webp-")):
            assert (name in read) == (name in read_by_server), (outcomes[name], of_server[name])
    assert read >= GOOD_LOCALLY
    assert {name for name in read if name.startswith(("tiff-", "bmp-"))} - GOOD_LOCALLY <= {
        "tiff-packbits-of-noise"
    }
    assert local["grown"] < BYTES_PER_PIXEL * MAX_PIXELS + 20_000_000


def test_refusals_tell_nothing_of_this_machine(report):
    words = {one for one in report["outcomes"].values() if isinstance(one, str)}
    for word in words:
        for internal in ("PIL", "Errno", "0x", "chunk", "decoder", "object", "/", "zlib", "Python"):
            assert internal not in word
    sizes = {name for name, one in report["outcomes"].items() if "at most" in str(one)}
    assert sizes == REFUSED_FOR_SIZE


def test_memory_stays_within_what_the_pixel_cap_allows(report):
    assert report["grown"] < BYTES_PER_PIXEL * MAX_PIXELS + 20_000_000
    assert report["left"] < 20_000_000


def _pictures_in_disguise():
    return {"other-png-then-zip.png", "other-html-in-jpeg.jpg"}
