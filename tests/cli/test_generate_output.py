"""`generate`'s files: tried first, written as they are made, never over one another."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.cli.main import INTERRUPTED, USER_ERROR, cli
from fastface_trt.errors import EngineFailed
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.picture_file import read_parameters
from fastface_trt.runtime.stages import Stages

FACE, PROMPT = SAMPLE_FACES / "ada.png", "фото; person in a garden"


def generate(out, *more, face=FACE, prompt=PROMPT):
    command = ("generate", "--face", face, "--prompt", prompt, "--steps", 2, "--out", out, *more)
    return CliRunner().invoke(cli, [str(word) for word in command])


def made(out, *more, **given):
    result = generate(out, "--json", *more, **given)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["files"]


def pixels(file):
    return np.asarray(Image.open(file))


def test_other_parameters_are_other_files_and_the_same_command_the_same(tmp_path):
    first = made(tmp_path, "--count", 2, "--grid")
    assert all("ada_фото-person-in-a-garden_plain_0" in name for name in first[:2])
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in tmp_path.iterdir()}
    assert len(before) == 3
    assert made(tmp_path, "--count", 2, "--grid") == first
    other_face = tmp_path.parent / f"{tmp_path.name} other" / "ada.png"
    other_face.parent.mkdir()
    other_face.write_bytes((SAMPLE_FACES / "bruno.png").read_bytes())
    others = [
        *made(tmp_path, "--alpha", 2, "--grid"),
        *made(tmp_path, face=other_face),
        *made(tmp_path, "--channel-order", "rgb"),
    ]
    assert [Path(file).name for file in others if "grid" in file] == ["grid-2.png"]
    hashes = {
        Path(file).stem.rpartition("-")[2] for file in (*first, *others) if "grid" not in file
    }
    assert [*map(len, hashes)] == [8] * (2 + 3)  # no counter was needed
    assert len([*tmp_path.iterdir()]) == 3 + 4
    for path, (inode, content) in before.items():
        assert (path.stat().st_ino, path.read_bytes()) == (inode, content)


def test_names_that_collide_get_a_counter(tmp_path):
    (tmp_path / "ada-0.png").write_text("mine")
    (tmp_path / "ada-0-2.png").mkdir()
    names = [f"ada-0-{number}.png" for number in (3, 4)]
    for _ in range(2):
        files = made(tmp_path, "--name", "{face}-{seed}", "--prompt", PROMPT, "--preset", "plain")
        assert [os.path.basename(file) for file in files] == names
    assert (tmp_path / "ada-0.png").read_text() == "mine"
    assert len([*tmp_path.iterdir()]) == 4


def test_a_picture_on_standard_output_is_alone_there():
    result = generate("-", "--format", "webp")
    assert result.exit_code == 0, result.output
    file = result.stdout_bytes
    assert int.from_bytes(file[4:8], "little") + 8 == len(file)  # RIFF's own length
    assert Image.open(io.BytesIO(file)).size == (96, 96)
    assert "UNet samples" in result.stderr


@pytest.mark.parametrize(
    ("out", "more", "says"),
    [
        ("file/out", (), "cannot be written"),
        ("file", (), "cannot be written"),
        ("/proc/nope/out", (), "cannot be written"),
        ("folder.png", (), "cannot be written"),
        ("file/me.png", (), "cannot be written"),
        ("me.gif", (), "a format that is not written"),
        ("new", ("--name", "{sed}"), "field of a name 'sed'"),
        ("new", ("--name", "../{seed}"), "path separator"),
        ("me.png", ("--name", "{seed}"), "is a file"),
        ("-", ("--count", 2), "takes one picture"),
        ("-", ("--grid",), "takes one picture"),
        ("-", ("--json",), "--json does not go with it"),
        ("-", ("--name", "{seed}"), "--name does not go with it"),
    ],
)
def test_where_pictures_go_is_tried_before_engines_are_opened(
    tmp_path, monkeypatch, out, more, says
):
    monkeypatch.setattr(FastFace, "load", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    result = generate(out, *more)
    assert result.exit_code == USER_ERROR, result.output
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 2
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.png"]


@pytest.mark.parametrize(
    ("stop", "code", "says"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "Stopped: 6 of 9 pictures are in {out}; nothing half"),
        (EngineFailed("It broke.", "Mend it."), USER_ERROR, "  6 of 9 pictures are in {out}.\n"),
    ],
)
def test_what_was_made_stays_when_a_run_stops(tmp_path, monkeypatch, stop, code, says):
    decode, done = Stages.decode, []

    def decoding(*arguments):
        if len(done) == 6:
            raise stop
        done.append(decode(*arguments))
        return done[-1]

    monkeypatch.setattr(Stages, "decode", decoding)
    out = tmp_path / "out"
    result = generate(out, "--count", 9, "--max-rows", 4, "--name", "{index}")
    assert result.exit_code == code, result.output
    assert says.format(out=out) in result.stderr
    assert "pictures 5 to 8 of 9, step 1 of 2" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == [f"{n}.png" for n in range(6)]
    for index, picture in enumerate(done):
        np.testing.assert_array_equal(pixels(out / f"{index}.png"), picture)


def test_groups_change_no_pixel_and_numbers_are_of_all(tmp_path, monkeypatch):
    """13 pictures are two groups of the 12 rows that a UNet call takes by default."""
    whole, groups = FastFace.generate, []

    def generating(*arguments, **options):
        groups.append(whole(*arguments, **options))
        return groups[-1]

    monkeypatch.setattr(FastFace, "generate", generating)
    more = ("--preset", "am1+dcg", "--count", 13, "--json")
    result = generate(tmp_path, *more)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [len(group.requests) for group in groups] == [12, 1]
    for stage, seconds in report["seconds"].items():
        assert seconds == pytest.approx(sum(group.seconds[stage] for group in groups))
    with FastFace.load() as fastface:
        at_once = fastface(
            PROMPT, FACE, preset="am1+dcg", steps=2, num_images_per_prompt=13, max_rows=12
        )
    assert report["unet_samples"] == at_once.unet_samples
    assert report["branches"] == [[[*step] for step in one] for one in at_once.branches]
    assert report["seconds"].keys() == at_once.seconds.keys()
    for index, (file, image) in enumerate(zip(report["files"], at_once.images, strict=True)):
        assert read_parameters(file)["image_index"] == index
        np.testing.assert_array_equal(pixels(file), np.asarray(image))


def test_python_saves_under_the_names_and_the_bytes_of_the_command_line(tmp_path):
    files = made(tmp_path / "cli", "--preset", "dcg", "--alpha", 2, "--seed", 5, "--count", 2)
    with FastFace.load() as fastface:
        result = fastface(
            PROMPT, FACE, preset="dcg", alpha=2, seed=5, steps=2, num_images_per_prompt=2
        )
    saved = result.save(tmp_path / "python")
    assert [path.name for path in saved] == [os.path.basename(file) for file in files]
    assert [path.read_bytes() for path in saved] == [Path(file).read_bytes() for file in files]
