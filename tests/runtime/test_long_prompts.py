"""Prompts beyond 75 tokens, in windows: against transformers' encoders and diffusers' pipeline."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from fastface_trt import FastFace
from fastface_trt.checkpoints import MINI
from fastface_trt.engines import contract
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.weights import CheckpointWeights
from fastface_trt.mini.folders import CHECKPOINT, SAMPLE_FACES
from fastface_trt.runtime.conditioning import Conditioner
from fastface_trt.runtime.prompt_syntax import Fragment
from fastface_trt.runtime.sampling import INITIAL_LATENTS, standard_noise
from fastface_trt.runtime.tokenizer import ClipTokenizer

FACE = SAMPLE_FACES / "ada.png"
LONG = "photo; person in a garden, smiling! " + " ".join(f"w{i}" for i in range(40))
NEGATIVE = "fog, rain"
SIDE = 96


@pytest.fixture(scope="module")
def fastface():
    with FastFace.load("mini") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionXLPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    loaded.unet = CheckpointWeights(ExportOptions(MINI)).unet()  # with the adapter's LoRA
    with torch.no_grad():  # the export stores its weights in fp16
        for weights in loaded.unet.parameters():
            weights.copy_(weights.half().float() if weights.numel() >= 256 else weights)
    return loaded


@torch.no_grad()
def embedded(pipeline, prompt, windows):
    """Windows of 75 tokens by transformers, concatenated along the positions; the first pooled."""
    states = []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        rows = [ids[at : at + 75] for at in range(0, windows * 75, 75)]
        full = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]
        padded = [row + [tokenizer.pad_token_id] * (77 - len(row)) for row in full]
        out = encoder(torch.tensor(padded), output_hidden_states=True)
        states.append(out.hidden_states[-2].flatten(0, 1))
    return torch.cat(states, -1)[None], out.text_embeds[:1]


def test_windows_hold_75_tokens_of_transformers_each():
    for name in ("tokenizer", "tokenizer_2"):
        theirs = CLIPTokenizer.from_pretrained(CHECKPOINT / name)
        ours = ClipTokenizer.from_folder(CHECKPOINT / name)
        for text in (LONG, "笑顔 😀 " * 30, "!" * 100, "x" * 75, "x" * 76, ""):
            ids = theirs(text, add_special_tokens=False).input_ids
            windows = ours.windows(((Fragment(text),),), 1, 99)
            assert len(windows) == max(1, -(-len(ids) // 75))
            kept = [list(row[1 : 1 + 75]) for row in windows.input_ids]
            assert list(itertools.chain(*kept))[: len(ids)] == ids
            assert (windows.input_ids[:, 0] == theirs.bos_token_id).all()
            last = windows.input_ids[-1]
            end = len(ids) - 75 * (len(windows) - 1) + 1
            assert last[end] == theirs.eos_token_id
            assert (last[end + 1 :] == theirs.pad_token_id).all()
            assert windows.cut == ""


def test_a_section_begins_a_window_and_what_has_no_room_is_cut():
    tokenizer = ClipTokenizer.from_folder(CHECKPOINT / "tokenizer")
    sections = ((Fragment("a", 1.3), Fragment("b")), (), (Fragment("c" * 80),), ())
    all_of_it = tokenizer.windows(sections, 1, 9)
    assert len(all_of_it) == 4
    assert all_of_it.weights[0, :4].tolist() == [1, pytest.approx(1.3), 1, 1]
    assert all_of_it.input_ids[1, 1] == tokenizer.eos_id  # the empty section
    two = tokenizer.windows(sections, 1, 2)
    assert len(two) == 2
    assert two.cut == "c" * 80
    assert tokenizer.windows(sections, 1, 3).cut == "c" * 5
    assert len(tokenizer.windows(sections, 6, 9)) == 6


def test_states_of_long_prompts_are_those_of_the_windows(fastface, pipeline):
    conditioner = Conditioner(fastface._modules)
    for prompt, windows in ((LONG, 2), ("word " * 30, 2), ("fog", 1)):
        text, pooled = embedded(pipeline, prompt, windows)
        found = conditioner.text(prompt)
        np.testing.assert_allclose(found.text, text[0], atol=1e-4 * float(text.abs().max()))
        np.testing.assert_allclose(found.pooled, pooled[0], atol=1e-4 * float(pooled.abs().max()))


@pytest.mark.parametrize(
    ("prompt", "negative"), [(LONG, NEGATIVE), (NEGATIVE, LONG)], ids=["prompt", "negative"]
)
def test_a_long_prompt_gives_the_latents_of_diffusers(fastface, pipeline, prompt, negative):
    # Without the face (λ = 0) branch i is branch u, so that α = β = g is classifier-free guidance.
    steps, guidance, seed = 4, 2.5, 3
    traces = []
    result = fastface(
        prompt,
        FACE,
        negative_prompt=negative,
        ip_adapter_scale=0,
        alpha=guidance,
        beta=guidance,
        seed=seed,
        steps=steps,
        on_step=lambda trace: traces.append(trace.latents),
    )
    assert result.warnings == []
    noise = standard_noise(seed, 0, INITIAL_LATENTS, traces[0].shape)
    text, pooled = embedded(pipeline, prompt, 2)
    negative_text, negative_pooled = embedded(pipeline, negative, 2)
    expected = pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_text,
        negative_pooled_prompt_embeds=negative_pooled,
        guidance_scale=guidance,
        num_inference_steps=steps,
        height=SIDE,
        width=SIDE,
        latents=torch.from_numpy(noise)[None],
        output_type="latent",
        cross_attention_kwargs={
            "image_tokens": torch.zeros(2, 4, text.shape[-1]),
            contract.IP_ADAPTER_SCALE: torch.zeros(1, 3),
            contract.MANIPULATION: torch.zeros(1, 3, len(contract.MANIPULATION_COLUMNS)),
        },
    ).images[0]
    bound = 1e-4 * float(expected.abs().max())
    np.testing.assert_allclose(traces[-1], expected, atol=bound)


def test_no_negative_prompt_is_zeros_as_long_as_the_prompt(fastface):
    conditioner = Conditioner(fastface._modules)
    request = fastface.request(LONG)
    conditions = conditioner.conditions(request, conditioner.image_tokens(None))
    assert {one.text.shape[0] for one in conditions.values()} == {154}
    assert not conditions["u"].text.any()
    long_negative = replace(request, prompt="photo", negative_prompt=LONG)
    conditions = conditioner.conditions(long_negative, conditioner.image_tokens(None))
    assert {one.text.shape[0] for one in conditions.values()} == {154}
    empty = conditioner.text("").text
    np.testing.assert_array_equal(conditions["t"].text[77:154], empty)


def test_prompts_of_other_lengths_beside_it_change_no_bit(fastface):
    requests = [
        replace(fastface.request(prompt, preset="dcg"), seed=7)
        for prompt in ("photo; person in a garden", LONG, "word " * 30)
    ]
    together = fastface.generate(requests, [FACE] * 3)
    for request, image in zip(requests, together.images, strict=True):
        (alone,) = fastface.generate([request], [FACE]).images
        np.testing.assert_array_equal(np.asarray(image), np.asarray(alone))


def test_an_export_of_77_positions_cuts_as_before(fastface, monkeypatch):
    unet = fastface.manifest.modules["unet"]
    fixed = tuple(
        one.model_copy(update={"shape": (one.shape[0], 77, one.shape[2])})
        if one.name == "encoder_hidden_states"
        else one
        for one in unet.inputs
    )
    monkeypatch.setitem(
        fastface.manifest.modules, "unet", unet.model_copy(update={"inputs": fixed})
    )
    conditioner = Conditioner(fastface._modules)
    assert conditioner.most_windows == 1 < contract.MAX_WINDOWS
    assert conditioner.text(LONG).text.shape[0] == 77
    assert conditioner.cut_from(LONG)
    assert LONG.endswith(conditioner.cut_from(LONG))
    monkeypatch.setattr(fastface.stages, "_conditioner", conditioner)
    (warning,) = fastface(LONG, FACE, steps=1).warnings
    assert warning.startswith("The prompt is longer than 75 tokens; this was cut: ")
    assert warning.endswith("Exported again it may have 225.")
