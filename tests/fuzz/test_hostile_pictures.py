import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.make_hostile import FOLDER, hostile

MAX_PIXELS = 4_000_000
BYTES_PER_PIXEL = 35  # as `decode_picture` says
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


@pytest.fixture(scope="module")
def report():
    script = Path(__file__).with_name("read_hostile.py")
    command = [sys.executable, script, str(MAX_PIXELS), FOLDER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_the_corpus_is_what_its_script_makes():
    assert {path.name for path in FOLDER.iterdir()} == set(hostile())
    assert max(path.stat().st_size for path in FOLDER.iterdir()) < 8_000


def test_every_one_is_read_or_refused(report):
    outcomes = report["outcomes"]
    assert set(outcomes) == set(hostile())
    assert {name: one for name, one in outcomes.items() if isinstance(one, dict)} == {}
    read = {name for name, one in outcomes.items() if isinstance(one, list)}
    assert read >= GOOD
    assert not any(name.startswith("other-") for name in read - _pictures_in_disguise())


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
