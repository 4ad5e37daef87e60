"""A C++ service and a plain C program with FastFace inside, built and run under sanitizers.

All are compiled with AddressSanitizer and UndefinedBehaviorSanitizer, and so is the library of
`fastface_trt/embedding/src`; the host that does everything wrong with ThreadSanitizer, too. The
picture of every call is compared with the same call in Python.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.embedding.__main__ import CMAKE_DIR
from fastface_trt.embedding.session import Session
from fastface_trt.mini import folders

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or C++ compiler"
    ),
]

HERE = Path(__file__).parent / "cpp"
PROMPT = "photo; person in a garden"
FACE = folders.SAMPLE_FACES / "ada.png"
SEEDS = range(6)


def build(folder, *options):
    """The programs of this folder's CMake file, or with `--target` in `options` one of them."""
    where = [f"-DFASTFACE_DIR={CMAKE_DIR}", f"-DPython_EXECUTABLE={sys.executable}"]
    defined = [one for one in options if one.startswith("-D")]
    for command in (
        ["-S", str(HERE), "-B", str(folder), *where, *defined],
        ["--build", str(folder), *(one for one in options if one not in defined)],
    ):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("pybind11")
    return build(tmp_path_factory.mktemp("cpp"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def fastface(cache):
    with FastFace.load(cache=cache) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def face(fastface):
    return fastface.analyze(FACE)


def run(*arguments, **environment):
    """A program under sanitizers, without this process's own settings for Python."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:exitcode=99",
        "LSAN_OPTIONS": f"suppressions={HERE / 'lsan.supp'}:print_suppressions=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        list(map(str, arguments)),
        env=kept | options | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def picture(file):
    return np.fromfile(file, np.uint8).reshape(96, 96, 3)


def expected(fastface, face, seed, **fields):
    images = fastface(PROMPT, face, preset="am1+dcg", seed=seed, **fields).images
    return np.asarray(images[0])


@pytest.fixture(scope="module")
def served(built, cache, fastface, face, tmp_path_factory):
    """The C++ service has run: its output, and the folder with its pictures."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(FACE, folder / "face.png")
    Image.open(FACE).convert("RGB").resize((384, 384)).save(folder / "large.png")
    np.asarray(Image.open(folder / "large.png")).tofile(folder / "face.rgb")
    Image.new("RGB", (256, 256), "grey").save(folder / "nobody.png")
    (face.embedding * 20).astype(np.float32).tofile(folder / "embedding.f32")
    face.crop_bgr.tofile(folder / "crop.bgr")
    Session(fastface).tokens(face).tofile(folder / "tokens.f32")
    done = run(built / "host", sys.executable, cache, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout.splitlines()


def test_everything_held(served):
    _, lines = served
    assert lines[-1] == "ended"
    assert "pictures of three threads lie in the callers' buffers" in lines
    assert "a buffer that is a byte too small is refused" in lines


def test_pictures_of_threads_are_those_of_single_runs(served, fastface, face):
    folder, _ = served
    for seed in SEEDS:
        ours = picture(folder / f"seed{seed}.rgb")
        np.testing.assert_array_equal(ours, expected(fastface, face, seed))
    assert not np.array_equal(picture(folder / "seed0.rgb"), picture(folder / "seed1.rgb"))


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("embedding", 3),
        ("dlpack", 3),
        ("tokens", 3),
        ("tokens_dlpack", 3),
        ("kept", 2),
        ("destroyed", 4),
    ],
)
def test_other_ways_to_the_same_picture(served, fastface, face, name, seed):
    folder, _ = served
    ours, theirs = picture(folder / f"{name}.rgb"), expected(fastface, face, seed)
    # An embedding that was scaled and normalised again differs in its last bits.
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("python", "environment"),
    [(sys.executable, {}), ("", {"VIRTUAL_ENV": sys.prefix}), ("", {})],
    ids=["given", "VIRTUAL_ENV", "that of its build"],
)
def test_plain_c_with_dlopen(built, cache, fastface, face, tmp_path, python, environment):
    pixels = tmp_path / "pixels.rgb"
    (library,) = built.rglob("libfastface_trt_host.so")
    done = run(built / "plain", library, python, cache, FACE, pixels, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ended"
    np.testing.assert_array_equal(picture(pixels), expected(fastface, face, 5, rescale=0.5))


def test_an_environment_that_is_not_there_is_named(built, cache, tmp_path):
    (library,) = built.rglob("libfastface_trt_host.so")
    nowhere = {"VIRTUAL_ENV": "/nowhere"}
    done = run(built / "plain", library, "", cache, FACE, tmp_path / "pixels.rgb", **nowhere)
    assert done.returncode == 1
    assert "There is no interpreter at /nowhere/bin/python" in done.stderr


def test_an_environment_without_the_package_is_named(built, cache, tmp_path):
    (library,) = built.rglob("libfastface_trt_host.so")
    bare = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    if (
        subprocess.run([bare, "-I", "-c", "import fastface_trt"], capture_output=True).returncode
        == 0
    ):
        pytest.skip("the package is installed in the base environment")
    done = run(built / "plain", library, bare, cache, FACE, tmp_path / "pixels.rgb")
    assert done.returncode == 1
    assert f"fastface-trt cannot be imported from {sys.base_prefix}" in done.stderr


def test_a_host_may_end_without_stopping(built, cache):
    """What it left open is gone with it, neither a crash nor a hang."""
    ended = run(built / "host", "abandon", sys.executable, cache, ASAN_OPTIONS="detect_leaks=0")
    assert (ended.returncode, ended.stdout) == (0, "left\n"), ended.stderr


@pytest.mark.parametrize(
    ("fault", "report"), [("overflow", "heap-buffer-overflow"), ("leak", "LeakSanitizer")]
)
def test_the_sanitizer_is_at_work(built, fault, report):
    done = run(built / "host", fault)
    assert done.returncode == 99
    assert report in done.stderr


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_eight_threads_that_do_everything_wrong_harm_nobody(built, cache, tmp_path, sanitizers):
    """Handles that are none, sizes that wrap around, calls at the wrong time; see misuse.cpp."""
    command = [built / "misuse", sys.executable, cache, FACE]
    if sanitizers == "thread":
        build(tmp_path, f"-DSANITIZERS={sanitizers}", "--target", "misuse")
        # It wants its memory where a random layout of addresses may have put something else.
        command = ["setarch", "-R", tmp_path / "misuse", *command[1:]]
    done = run(*command, TSAN_OPTIONS=f"suppressions={HERE / 'tsan.supp'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ended"
