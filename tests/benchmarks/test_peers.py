"""The peers make the same picture, follow the authors' recording, and only equals are timed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.peers import attention
from benchmarks.peers.__main__ import make_peers, make_work, peers_for, report
from benchmarks.peers.equality import difference
from benchmarks.peers.loop import Conditions, denoise
from benchmarks.peers.measure import compare_peers, run_rounds
from benchmarks.peers.work import Made, Unready
from fastface_trt import FastFace
from fastface_trt.engines.device import HostDevice
from fastface_trt.measure.statistics import Ratio
from fastface_trt.verify.replay import Recording, make_sample
from tests.conftest import GOLDEN

PIPELINE = GOLDEN / "pipeline"


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads of torch wait for each other by spinning, for seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recording():
    return Recording(PIPELINE / "cases.json", PIPELINE / "tensors.safetensors")


@pytest.fixture(scope="module")
def recorded_unets():
    """The recording's UNet with the peer's processors, by LoRA scale."""
    from fastface_trt.export.adapters import attach_adapter, read_adapter
    from fastface_trt.export.sources import load_unet_folder

    made = {}

    def unet(lora_scale):
        if lora_scale not in made:
            model = load_unet_folder(PIPELINE / "model" / "unet")
            adapter = read_adapter(next((PIPELINE / "model").glob("*.safetensors")))
            attach_adapter(model, adapter, lora_scale=lora_scale)
            attention.attach(model)
            made[lora_scale] = model.eval()
        return made[lora_scale]

    return unet


@pytest.mark.parametrize(
    "name",
    [
        case["name"]
        for case in json.loads((PIPELINE / "cases.json").read_text())
        # The others draw noise on the way, which a scheduler's class takes from its own generator.
        if case["scheduler"]["class"] in ("DDIMScheduler", "EulerDiscreteScheduler")
    ],
)
def test_the_loop_follows_the_authors_recording(recording, recorded_unets, name):
    import diffusers

    (case,) = recording.select([name])
    tokens = recording.require(name, "iptokens")[[0, 1]]  # of no face, of the face
    sample = make_sample(case, recording, tokens, "full", HostDevice())
    unet = recorded_unets(float(case.get("faceid_lora_scale", 1.0)))
    attention.configure(unet, sample.request.manipulation, sample.request.ip_scales())
    config = dict(case["scheduler"])
    scheduler = getattr(diffusers, config.pop("class"))(**config)
    told = [sample.conditions[branch] for branch in ("u", "i", "ti")]
    conditions = Conditions(
        torch.from_numpy(np.stack([condition.text for condition in told])),
        torch.from_numpy(np.stack([condition.pooled for condition in told])),
        torch.from_numpy(np.stack([sample.time_ids] * 3)),
        torch.from_numpy(np.stack([condition.image_tokens for condition in told])),
    )

    def predict(sample, timestep, conditions, numbers):
        return unet(
            sample,
            timestep,
            conditions.text,
            added_cond_kwargs={
                "text_embeds": conditions.pooled,
                "time_ids": conditions.time_ids,
            },
            cross_attention_kwargs={"image_tokens": conditions.image_tokens, "numbers": numbers},
            return_dict=False,
        )[0]

    noise = torch.from_numpy(recording.require(name, "latents"))
    with torch.no_grad():
        ours = denoise(predict, sample.request, conditions, noise, scheduler).numpy()
    recorded = recording.tensors[f"{name}.step{len(sample.schedule) - 1}.latents"]
    apart = np.linalg.norm(ours - recorded) / np.linalg.norm(recorded)
    assert apart < (2e-3 if "am2" in name else 1e-3)


def test_the_exported_form_of_the_quantile_is_torchs(monkeypatch):
    a_BHNT = torch.rand(2, 3, 37, 4, generator=torch.Generator().manual_seed(0))
    for level in (0.0, 0.2, 0.65, 1.0):
        expected = torch.quantile(a_BHNT, level, dim=2, keepdim=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
            ours = attention.quantile(a_BHNT, torch.tensor(level))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def mini():
    with FastFace.load("mini") as fastface:
        yield fastface


@pytest.fixture(scope="module")
def peers(mini, tmp_path_factory):
    return make_peers(mini, tmp_path_factory.mktemp("plain"))


def slow(peer):
    """Peers that compile or export for a minute before their first picture."""
    return peer.name in ("pytorch-compile", "onnxruntime-plain")


@pytest.mark.parametrize(
    ("preset", "samples"),
    [
        ("plain", [4, 4, 4, 4]),
        ("am1+dcg", [12, 4, 12, 12, 10, 10]),
        ("am2+dcg", [12, 4, 12, 12]),
    ],
)
def test_peers_make_the_same_picture(mini, peers, preset, samples):
    work = make_work(mini, preset)
    chosen = [peer for peer in peers_for(peers, work) if not slow(peer)]
    results = compare_peers(chosen, work, rounds=1, pause=0, warm_up=0)
    assert [result.unet_samples for result in results] == samples
    assert [result.problem for result in results] == [None] * len(samples)
    assert all(len(result.seconds) == 1 for result in results)
    assert {r.name: r.does for r in results}["diffusers"] == "plain"
    # Compared with another computation, not with itself.
    assert all(r.difference.latents > 0 for r in results if r.name.startswith("fastface"))


@pytest.mark.long
@pytest.mark.parametrize("preset", ["plain", "am1+dcg", "am2+dcg"])
def test_compiled_and_exported_peers_make_the_same_picture(mini, peers, preset):
    work = make_work(mini, preset)
    chosen = [peer for peer in peers if slow(peer) or peer.name == "pytorch"]
    results = compare_peers(chosen, work, rounds=1, pause=0, warm_up=0)
    exported = next(result for result in results if result.name == "onnxruntime-plain")
    assert exported.problem is None
    compiled = next(result for result in results if result.name == "pytorch-compile")
    # It may lack a C++ compiler; then it says so. What it may not do is make another picture.
    assert compiled.problem is None or compiled.problem.startswith("torch.compile failed")


def test_a_preset_replaces_guidance_and_manipulation(mini):
    work = make_work(mini, "am2+dcg")
    assert work.guided
    plain = work.with_preset("plain")
    assert not plain.guided
    assert plain.request == make_work(mini, "plain").request


class Pretend:
    """A peer that returns a constant picture."""

    def __init__(self, name, value=0.5, ready=True):
        self.name = self.label = name
        self.value, self.ready = value, ready
        self.calls = []

    def work(self, work):
        return work

    def unet_samples(self, work):
        return 1

    def prepare(self, work):
        if not self.ready:
            raise Unready("There is no compiler.")
        return 2.0

    def before(self):
        self.calls.append("before")

    def picture(self, work):
        self.calls.append("picture")

    def made(self, work):
        grey = np.full((8, 8, 3), round(255 * self.value), np.uint8)
        return Made(Image.fromarray(grey), np.full((4, 2, 2), self.value, np.float32))


def test_who_makes_another_picture_or_cannot_run_is_not_timed(mini):
    first, same, other = Pretend("first"), Pretend("same"), Pretend("other", 0.501)
    broken = Pretend("broken", ready=False)
    work = make_work(mini, "plain")
    results = compare_peers([first, same, other, broken], work, rounds=3, pause=0, warm_up=1)
    by_name = {result.name: result for result in results}
    assert by_name["same"].problem is None
    assert by_name["same"].set_up_seconds == 2.0
    assert same.calls == ["before", "picture"] * 4
    assert "latents differ by 2.0e-03" in by_name["other"].problem
    assert other.calls == []
    assert by_name["broken"].problem == "There is no compiler."
    assert (by_name["broken"].speed, by_name["other"].speed) == (None, None)
    assert by_name["first"].speed.median == 1


def test_latents_that_are_no_numbers_are_no_equality():
    grey = Image.new("RGB", (8, 8))
    made = Made(grey, np.full((4, 2, 2), np.nan, np.float32))
    assert difference(made, Made(grey, np.ones((4, 2, 2), np.float32))).problem("am1")
    shifted = Made(Image.new("RGB", (8, 8), (3, 3, 3)), np.ones((4, 2, 2), np.float32))
    problem = difference(shifted, Made(grey, np.ones((4, 2, 2), np.float32))).problem("am1")
    assert "3.00/255" in problem


def test_rounds_are_interleaved():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    before = {name: lambda name=name: order.append(name.lower()) for name in "AB"}
    seconds = run_rounds(calls, before, 3, pause=0)
    assert order == ["a", "A", "b", "B"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}


def test_a_ratio_is_taken_within_a_round():
    """A round in which the machine was ten times as slow changes no ratio."""
    ratio = Ratio.paired([1.0, 10.0, 1.2, 1.0], [0.5, 5.0, 0.6, 0.5])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    spread = Ratio.paired(list(np.linspace(1, 3, 41)), [1.0] * 41)
    assert spread.median == pytest.approx(2)
    assert 1.5 < spread.low < 2 < spread.high < 2.5


def test_the_report_says_who_was_not_timed(mini, tmp_path, capsys):
    from rich.console import Console

    work = make_work(mini, "plain")
    peers = [Pretend("first"), Pretend("other", 0.6)]
    tables = {"plain": compare_peers(peers, work, rounds=2, pause=0, warm_up=0)}
    machine = {"processor": "a processor", "cores": 2}
    report(tables, tmp_path / "out" / "peers.json", Console(width=200), {"machine": machine})
    written = json.loads((tmp_path / "out" / "peers.json").read_text())
    first, other = written["presets"]["plain"]
    assert len(first["seconds"]["rounds"]) == 2
    assert "seconds" not in other
    text = (tmp_path / "out" / "peers.md").read_text()
    assert "not timed: its latents differ" in text
    assert "not timed: its latents differ" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "peers.png").width > 500


def test_unknown_names_are_said_before_anything_runs():
    from click.testing import CliRunner

    from benchmarks.peers.__main__ import main

    result = CliRunner().invoke(main, ["--preset", "am1+dgc"])
    assert result.exit_code == 1
    assert "Did you mean 'am1+dcg'?" in result.output
    result = CliRunner().invoke(main, ["--peer", "pytorhc", "--preset", "plain"])
    assert result.exit_code == 2
    assert "pytorhc is none of: pytorch, pytorch-compile" in " ".join(result.output.split())
