"""Weights in prompts: as A1111's formula in float64 says, and as compel computed them."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastface_trt import FastFace
from fastface_trt.errors import InvalidRequest
from fastface_trt.mini.folders import CHECKPOINT, SAMPLE_FACES
from fastface_trt.runtime.conditioning import Conditioner
from fastface_trt.runtime.prompt_syntax import MOST_WEAKENED, parse_prompt, signs_in
from fastface_trt.runtime.request import GenerationRequest
from tests.helpers.compel_reference import GOLDEN, direction

COMPEL = json.loads(GOLDEN.read_text(encoding="utf-8"))
UP, DOWN = 1.1, 1 / 1.1


@pytest.fixture(scope="module")
def fastface():
    with FastFace.load("mini") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def conditioner(fastface):
    return Conditioner(fastface._modules)


def pieces(prompt, syntax):
    return [[(f.text, pytest.approx(f.weight)) for f in s] for s in parse_prompt(prompt, syntax)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a garden", [[("a garden", 1)]]),
        ("(a) b [c]", [[("a", UP), (" b ", 1), ("c", DOWN)]]),
        ("(a:1.3)", [[("a", 1.3)]]),
        ("(a: .5 ), b", [[("a", 0.5), (", b", 1)]]),
        ("((a) b [c], d:e)", [[("a", UP * UP), (" b ", UP), ("c", 1), (", d:e", UP)]]),
        ("(a (b:2) c:1.5)", [[("a ", 1.5), ("b", 3), (" c", 1.5)]]),
        ("(a)(b)", [[("ab", UP)]]),
        ("(open [both", [[("open ", UP), ("both", 1)]]),
        (r"a \(b\) \[c\] \\", [[("a (b) [c] \\", 1)]]),
        ("time: 12:30) b]", [[("time: 12:30) b]", 1)]]),
        ("(a:-1)", [[("a", -1)]]),
        ("a BREAK (b BREAK c:2)", [[("a", 1)], [("b", 2)], [("c", 2)]]),
        ("a BREAK", [[("a", 1)], []]),
        ("BREAKFAST", [[("BREAKFAST", 1)]]),
        ("()", [[]]),
    ],
)
def test_a1111_brackets_multiply(prompt, expected):
    assert pieces(prompt, "a1111") == expected


@pytest.mark.parametrize("case", COMPEL, ids=lambda case: case["prompt"])
def test_compel_fragments_are_the_librarys(case):
    # In a bracket compel puts a space before a comma, which is no token.
    expected = [(text.replace(" ,", ","), weight) for text, weight in case["fragments"]]
    assert pieces(case["prompt"], "compel") == [expected]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("soft-light, e-mail", [("soft-light, e-mail", 1)]),
        ("1+ (unclosed 2", [("1", 1.1), ("(unclosed 2", 1)]),
        ('a "quoted (b)++ phrase"', [("a quoted", 1), ("b", 1.21), ("phrase", 1)]),
        ("word+,other-, end", [("word", 1.1), (",", 1), ("other", 0.9), (", end", 1)]),
        ("(a) 1.5", [("a 1.5", 1)]),
    ],
)
def test_compel_signs_stand_behind_a_word_or_a_phrase(prompt, expected):
    assert pieces(prompt, "compel") == [expected]


@pytest.mark.parametrize("case", COMPEL, ids=lambda case: case["prompt"])
def test_compel_states_are_the_librarys(conditioner, case):
    found = conditioner.text(case["prompt"], syntax="compel")
    projected = found.text.astype(np.float64) @ direction(found.text.shape[-1])
    np.testing.assert_allclose(projected, case["projected"], atol=1e-4)
    np.testing.assert_allclose(found.pooled, case["pooled"], atol=1e-4)


@torch.no_grad()
def encoded(rows_WL):
    """Both encoders' penultimate states [W,77,C] in float64, and the second's pooled text [W,P]."""
    kinds = (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
    states = []
    for (name, kind), ids in zip(kinds, rows_WL, strict=True):
        out = kind.from_pretrained(CHECKPOINT / name).double()(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2].numpy())
    return states, out.text_embeds.numpy()


def reference(windows):
    """Ids [2][W,77] and weights [2][W,77] of windows of (text, weight), by transformers."""
    ids, weights = [], []
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / name)
        rows = np.full((len(windows), 77), tokenizer.pad_token_id)
        ones = np.ones(rows.shape)
        for row, one, window in zip(rows, ones, windows, strict=True):
            tokens = [
                (token, weight)
                for text, weight in window
                for token in tokenizer(text, add_special_tokens=False).input_ids
            ]
            end = len(tokens) + 1
            row[: end + 1] = [
                tokenizer.bos_token_id,
                *(token for token, _ in tokens),
                tokenizer.eos_token_id,
            ]
            one[1:end] = [weight for _, weight in tokens]
        ids.append(torch.from_numpy(rows))
        weights.append(ones)
    return ids, weights


def test_a1111_states_are_the_formulas_in_float64(conditioner):
    prompt = "(photo:1.4); [person!] in a ((garden)) BREAK smiling, (rain:0.6)"
    windows = [
        [("photo", 1.4), ("; ", 1), ("person!", DOWN), (" in a ", 1), ("garden", UP * UP)],
        [("smiling, ", 1), ("rain", 0.6)],
    ]
    ids, weights = reference(windows)
    states, pooled = encoded(ids)
    weighed = []
    for z, w in zip(states, weights, strict=True):
        scaled = z * w[..., None]
        weighed.append(scaled * (z.mean((1, 2)) / scaled.mean((1, 2)))[:, None, None])
    expected = np.concatenate(weighed, -1).reshape(2 * 77, -1)
    found = conditioner.text(prompt, syntax="a1111")
    assert np.abs(expected - np.concatenate(states, -1).reshape(2 * 77, -1)).max() > 0.1
    np.testing.assert_allclose(found.text, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(found.pooled, pooled[0], atol=1e-4)


@pytest.mark.parametrize("syntax", ["a1111", "compel"])
def test_a_prompt_without_signs_is_the_same_in_every_syntax(conditioner, syntax):
    prompt = "photo; person in a garden, smiling"
    plain, read = conditioner.text(prompt), conditioner.text(prompt, syntax=syntax)
    np.testing.assert_array_equal(read.text, plain.text)
    np.testing.assert_array_equal(read.pooled, plain.pooled)


@pytest.mark.parametrize(
    ("syntax", "prompt", "reason"),
    [
        ("a1111", "a <lora:style:0.8>", "'<lora:style:0.8>', which is no part of a text"),
        ("a1111", "a [cat:dog:0.5]", "changes between steps"),
        ("a1111", "a [cat|dog]", "changes between steps"),
        ("a1111", "a cat AND a dog", "two prompts to be added"),
        ("a1111", "(cat:99)", "weighs 'cat' by 99"),
        ("a1111", "(cat:1.2.3)", r"the weight '1\.2\.3'"),
        ("compel", '("a cat", "a dog").blend(1, 1)', "operator that is not supported"),
        ("compel", "a cat.swap(dog)", "operator that is not supported"),
        ("compel", "a withLora(style, 0.8)", "operator that is not supported"),
        ("compel", "(cat)2020", "weighs 'cat' by 2020"),
        ("compel", " b ".join(["a-"] * (MOST_WEAKENED + 1)), "weakens more than 16"),
    ],
)
def test_what_a_syntax_has_and_we_not_is_refused_by_name(syntax, prompt, reason):
    for name, other in (("prompt", {}), ("negative_prompt", {"prompt": "a"})):
        with pytest.raises(InvalidRequest, match=reason) as caught:
            GenerationRequest(**other, **{name: prompt}, prompt_syntax=syntax)
        assert caught.value.param == name
        assert caught.value.hint
        GenerationRequest(**other, **{name: prompt})


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a (word:1.3), b", ("(word:1.3)", "a1111")),
        ("a ((word)) b", ("((word))", "a1111")),
        ("a [word] b", ("[word]", "a1111")),
        ("a BREAK b", ("BREAK", "a1111")),
        ("a (blue sky)1.3", ("(blue sky)1.3", "compel")),
        ("a (blue sky)++, b", ("(blue sky)++", "compel")),
        ("a blue-ish++ sky", ("blue-ish++", "compel")),
        ("sky--", ("sky--", "compel")),
        ("a <lora:style:1>", ("<lora:style:1>", "a1111")),
        ("a word (in brackets), 2024 - soft-light; a--b c+ 12:30 :) [", None),
        ("BREAKFAST, breaking 😀 笑顔", None),
    ],
)
def test_signs_in_plain_text_are_found(prompt, found):
    assert signs_in(prompt) == found


def test_signs_in_plain_text_are_said_and_a_syntax_changes_the_picture(fastface):
    prompt = "(photo:1.5); [person] in a (garden)++"
    arguments = {"face": SAMPLE_FACES / "ada.png", "steps": 4, "seed": 1}
    results = {
        syntax: fastface(prompt, prompt_syntax=syntax, **arguments)
        for syntax in ("plain", "a1111", "compel")
    }
    (warning,) = results["plain"].warnings
    assert "'(photo:1.5)'" in warning
    assert "syntax a1111 reads it" in warning
    assert results["a1111"].warnings == results["compel"].warnings == []
    pictures = [np.asarray(result.images[0]) for result in results.values()]
    for one, other in pairwise(pictures):
        assert (one != other).any()
    again = GenerationRequest.from_dict(results["a1111"].requests[0].to_dict())
    assert again.prompt_syntax == "a1111"
    assert results["a1111"].parameters[0]["prompt_syntax"] == "a1111"
