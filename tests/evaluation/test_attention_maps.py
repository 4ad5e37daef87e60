"""Maps from the exported UNet are those of the eager arithmetic, on the same inputs."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastface_trt.engines.contract import KINDS, MANIPULATION_COLUMNS
from fastface_trt.errors import EngineFailed, InvalidRequest, UnknownName
from fastface_trt.evaluation import (
    attention as attention_maps,
)
from fastface_trt.evaluation import (
    attention as watched_unet,
)
from fastface_trt.evaluation.attention import (
    attention_numbers,
    block_grid,
    choose_blocks,
    collect_attention,
    decoupled_blocks,
    read_attention,
    write_attention,
)
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.request import GenerationRequest

BLOCKS = ("down_blocks.2.attentions.0.0", "up_blocks.1.attentions.1.0")
PROMPT = "photo; person on a beach, smiling"


@pytest.fixture(scope="module")
def unet():
    """The mini UNet in PyTorch, float64, with the fp16 weights that its export stores."""
    from fastface_trt.checkpoints import find_checkpoint
    from fastface_trt.export.modules import UNetModule
    from fastface_trt.export.options import ExportOptions
    from fastface_trt.export.weights import CheckpointWeights

    return UNetModule(
        CheckpointWeights(ExportOptions(find_checkpoint("mini"))).unet().half().double()
    )


def collected(monkeypatch, **fields):
    """A run, and the inputs of every UNet call in it."""
    calls = []
    call = watched_unet.WatchedUnet.__call__

    def remember(self, **inputs):
        calls.append({name: np.array(value) for name, value in inputs.items()})
        return call(self, **inputs)

    monkeypatch.setattr(watched_unet.WatchedUnet, "__call__", remember)
    run = collect_attention(SAMPLE_FACES / "ada.png", PROMPT, seed=3, threads=1, **fields)
    return run, calls


def eager_attention_inputs(monkeypatch, unet, inputs):
    """q, k and the parameter rows of every decoupled block, in order, from PyTorch in float64."""
    import torch

    from fastface_trt.export import attention

    seen = []
    plain = attention.decoupled_attention

    def remember(q, k, v, rows, scale):
        seen.append((q.numpy(), k.numpy(), rows.numpy()))
        return plain(q, k, v, rows, scale)

    monkeypatch.setattr(attention, "decoupled_attention", remember)
    with torch.no_grad():
        unet(**{name: torch.from_numpy(value).double() for name, value in inputs.items()})
    monkeypatch.setattr(attention, "decoupled_attention", plain)
    return dict(zip(decoupled_blocks(), seen, strict=True))


def manipulated(a_BHNT, rows_RP):
    """f(A) by Eq. 7 in numpy, Eq. 8 to 10 by the exporter's eager arithmetic, in float64."""
    import torch

    from fastface_trt.export.attention import _softmask

    (row,) = (dict(zip(MANIPULATION_COLUMNS, one, strict=True)) for one in rows_RP)
    kind = KINDS[int(row["kind"])]
    if kind == "off":
        return a_BHNT
    if kind == "scale_power":
        return np.minimum(row["scale"] * a_BHNT ** row["power"], row["upper_bound"])
    columns = {k: torch.tensor([v]).double()[:, None, None, None, None] for k, v in row.items()}
    return _softmask(torch.from_numpy(a_BHNT[None]), columns, torch.ones(()))[0].numpy()


@pytest.mark.parametrize("preset", ["am1+dcg", "am2+dcg"])
def test_maps_are_those_of_eager_attention(monkeypatch, unet, preset):
    run, calls = collected(monkeypatch, preset=preset, blocks=BLOCKS, steps=(1, 3))
    assert (run.blocks, run.steps, len(calls)) == (BLOCKS, (1, 3), 4)
    for step in run.steps:
        eager = eager_attention_inputs(monkeypatch, unet, calls[step])
        for block in BLOCKS:
            q_BHND, k_BHTD, rows = eager[block]
            logits = q_BHND @ k_BHTD.swapaxes(2, 3) / q_BHND.shape[3] ** 0.5
            a_BHNT = np.exp(logits - logits.max(-1, keepdims=True))
            a_BHNT /= a_BHNT.sum(-1, keepdims=True)
            maps = run.at(block, step)
            assert len(maps.branches) == len(a_BHNT)
            # float32 through the whole UNet before these attentions.
            np.testing.assert_allclose(maps.before, a_BHNT, atol=2e-5)
            np.testing.assert_allclose(maps.after, manipulated(a_BHNT, rows), atol=2e-4)


def test_a_plain_run_changes_neither_maps_nor_picture(monkeypatch):
    from fastface_trt import FastFace

    run, _ = collected(monkeypatch, preset="plain", blocks=BLOCKS, steps=(2,))
    with FastFace.load("mini", threads=1) as fastface:
        plain = fastface(PROMPT, SAMPLE_FACES / "ada.png", preset="plain", seed=3)
    difference = np.abs(np.int16(run.picture) - np.int16(plain.images[0]))
    assert difference.max() <= 1  # outputs change what is fused, so a rounding may flip
    assert len(run.maps) == 2
    for maps in run.maps:
        np.testing.assert_array_equal(maps.before, maps.after)


def test_grids_have_the_layout_of_the_picture():
    """A token that attends only to one cell shows in that cell, row by row."""
    weights = np.zeros((1, 2, 6, 1), np.float32)
    weights[0, :, 4, 0] = 1, 0
    maps = attention_maps.BlockMaps("b", 0, ("ti",), (2, 3), weights, weights)
    expected = np.zeros((1, 2, 3))
    expected[0, 1, 1] = 0.5
    np.testing.assert_array_equal(maps.grids(after=False), expected)


def test_block_grid_halves_rounding_up():
    assert block_grid((24, 24), 144) == (12, 12)
    assert block_grid((20, 12), 15) == (5, 3)
    assert block_grid((10, 6), 6) == (3, 2)
    with pytest.raises(EngineFailed):
        block_grid((24, 24), 143)


def test_choice_of_blocks():
    known = decoupled_blocks()
    assert choose_blocks(known, ()) == (known[0], known[-1])
    assert choose_blocks(known, ("up_blocks.0*",)) == tuple(
        block for block in known if block.startswith("up_blocks.0.")
    )
    with pytest.raises(UnknownName, match="decoupled block"):
        choose_blocks(known, ("sideways*",))


def test_a_step_beyond_the_last_is_refused():
    with pytest.raises(InvalidRequest, match="no step 4"):
        collect_attention(SAMPLE_FACES / "ada.png", PROMPT, steps=(4,))


def test_files_of_the_command(tmp_path):
    from fastface_trt.cli.main import cli

    out = tmp_path / "attention"
    arguments = [
        "evaluate",
        "attention",
        "--face",
        str(SAMPLE_FACES / "ada.png"),
        "--prompt",
        "photo; person on a $beach$, smiling",
    ]
    arguments += ["--blocks", BLOCKS[0], "--steps", "0,2", "--out", str(out)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    written = {path.name for path in out.iterdir()}
    assert written == {
        "picture.png",
        f"maps-{BLOCKS[0]}.png",
        f"histogram-{BLOCKS[0]}.png",
        "maps.npz",
        "attention.json",
    }
    numbers = json.loads((out / "attention.json").read_text())
    with np.load(out / "maps.npz") as arrays:
        for entry in numbers["maps"]:
            after = arrays[f"{entry['block']}/step{entry['step']}/after"][-1]
            for token, summary in enumerate(entry["after"]):
                assert summary["mean"] == pytest.approx(float(after[..., token].mean()), rel=1e-5)
                assert summary["max"] == pytest.approx(float(after[..., token].max()), rel=1e-6)
    assert [entry["step"] for entry in numbers["maps"]] == [0, 2]
    figures = read_attention(out)
    assert [path.name for *_, path in figures] == [
        f"maps-{BLOCKS[0]}.png",
        f"histogram-{BLOCKS[0]}.png",
    ]
    assert all("person on a $beach$, smiling, seed 0, am1" in caption for _, caption, _ in figures)
    assert read_attention(tmp_path) == []


def test_numbers_are_of_the_branch_with_face_and_prompt():
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 3, 2, 6, 4), dtype=np.float32)
    maps = attention_maps.BlockMaps("b", 1, ("u", "i", "ti"), (2, 3), before, after)
    request = GenerationRequest("photo; person", steps=4)
    run = attention_maps.AttentionRun(
        request, "am1", {"seed": 0}, Image.new("RGB", (8, 8)), (maps,)
    )
    (entry,) = attention_numbers(run)["maps"]
    assert entry["branch"] == "ti"
    assert entry["before"][1]["mean"] == pytest.approx(float(before[2, ..., 1].mean()))
    assert entry["after"][3]["median"] == pytest.approx(float(np.median(after[2, ..., 3])))
    no_text = attention_maps.BlockMaps("b", 1, ("u", "t", "i"), (2, 3), before, after)
    assert no_text.face_branch == "i"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    from fastface_trt.errors import StorageError

    maps = np.full((1, 1, 6, 4), 0.25, np.float32)
    block = attention_maps.BlockMaps("b", 0, ("ti",), (2, 3), maps, maps)
    request = GenerationRequest("photo; person", steps=4)
    run = attention_maps.AttentionRun(request, "am1", {}, Image.new("RGB", (8, 8)), (block,))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_attention(run, tmp_path / "file")
