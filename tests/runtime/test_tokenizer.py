import json
import shutil
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.runtime.tokenizer import VOCABULARY, ClipTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CORPUS = """
    a photo of a woman in a café, reading; watercolor, 35mm film, highly detailed face
    the man's hat isn't his, they're walking and we've seen him; comic style portrait, in the snow
    a person standing in front of the mountain, smiling, cinematic lighting, best quality, 4k
"""

EXAMPLES = [
    "",
    " ",
    "A Photo of a WOMAN",
    "hello!! world!",
    "the man's they're I'll we'd 's",
    "1234 5th 2½ ①",
    "café cafe\u0301 Å ﬁ ﬃ",
    "İstanbul ΣΑΣ ǅ ẞ",
    "你好,世界。日本語のテキスト",
    "👩‍🚀 and 🏳️‍🌈 🇫🇷 ☃️",
    "tab\there\nnew\r\nline\u00a0nbsp\u3000wide\u2028sep\x85next\x1cfs",
    "\x00\x01\x07\x1b[0m\x7f",
    "\u200bzero\u200dwidth\ufeff",
    f"look: {BOS} and {EOS}",
    "<|ENDOFTEXT|> <|endoftext|>x x<|endoftext|> <|startoftext|><|startoftext|>",
    "mathematical 𝓑𝓸𝓵𝓭 \U0001f600\U0010ffff",
    "a " * 200,
    "x" * 500,
    "🙂" * 100,
    "e\u0301" * 100,
    "!" * 90,
    ("a photo of a woman, " * 12) + "end!",
]


def bpe_files(merge_count=150):
    """A small vocabulary and merges made as CLIP's were: bytes, bytes with </w>, merged pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = Counter()
    for word in CORPUS.lower().replace(",", " ").replace(";", " ").split():
        letters = list(byte_level.pre_tokenize_str(word)[0][0])
        words[(*letters[:-1], letters[-1] + "</w>")] += 1
    merges = []
    while len(merges) < merge_count:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                two = word[i : i + 2]
                new.append("".join(two) if two == best else word[i])
                i += 2 if two == best else 1
            merged[tuple(new)] += count
        words = merged
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges), BOS, EOS]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return vocabulary, "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n"


def token(content, normalized=True):
    rules = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": normalized}
    return {"content": content, **rules}


def write_folder(folder, *, pad, style, length=77):
    """A tokenizer folder in one of the shapes that are found beside SDXL checkpoints."""
    folder.mkdir()
    vocabulary, merges = bpe_files()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    if style == "map":  # as stabilityai/stable-diffusion-xl-base-1.0 has it
        named = {"bos_token": token(BOS), "eos_token": token(EOS), "unk_token": token(EOS)}
        config |= {k: {"__type": "AddedToken", **v} for k, v in named.items()}
        config["pad_token"] = EOS  # contradicted by the map, which wins
        special = {**named, "pad_token": pad}
        (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    elif style == "decoder":  # as newer conversions have it
        config |= {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
        config["added_tokens_decoder"] = {
            str(vocabulary[t]): {**token(t, normalized=t == BOS), "special": True}
            for t in {pad, BOS, EOS}
        }
        stale = {"pad_token": "a</w>"}  # the list of added tokens makes this file void
        (folder / "special_tokens_map.json").write_text(json.dumps(stale), encoding="utf-8")
    else:
        config["pad_token"] = pad
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if style == "json":  # as transformers 5 saves it, with padding and truncation baked in
        transformers = pytest.importorskip("transformers")
        saved = transformers.CLIPTokenizer.from_pretrained(folder)
        saved(["a", "b " * 200], padding="max_length", truncation=True, max_length=20)
        shutil.rmtree(folder)
        saved.save_pretrained(folder)
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert content["truncation"]
        assert content["padding"]
        assert not (folder / "vocab.json").exists()
    return folder


SHAPES = [(pad, style) for pad in (EOS, "!") for style in ("plain", "map", "decoder", "json")]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def both(request, tmp_path_factory):
    """Our tokenizer and transformers' own on the same folder."""
    transformers = pytest.importorskip("transformers")
    pad, style = request.param
    folder = write_folder(tmp_path_factory.mktemp("tokenizer") / "t", pad=pad, style=style)
    return ClipTokenizer.from_folder(folder), transformers.CLIPTokenizer.from_pretrained(folder)


def reference(theirs, prompts):
    encoded = theirs(prompts, padding="max_length", max_length=77, truncation=True)
    return np.array(encoded["input_ids"], dtype=np.int64)


def test_examples_equal_transformers(both):
    ours, theirs = both
    tokens = ours.encode(EXAMPLES)
    assert tokens.input_ids.dtype == np.int64
    assert tokens.input_ids.shape == (len(EXAMPLES), 77)
    expected = reference(theirs, EXAMPLES)
    for prompt, row, row_expected in zip(EXAMPLES, tokens.input_ids, expected, strict=True):
        np.testing.assert_array_equal(row, row_expected, err_msg=repr(prompt))


pieces = st.one_of(
    st.text(max_size=40),
    st.sampled_from([BOS, EOS, "!", "'S ", " woman", "é", "e\u0301", "🙂", "\x85", "\u3000", "İ"]),
    st.text(alphabet="abc !',.\n1é世🙂", min_size=20, max_size=150),
)


@settings(max_examples=60, deadline=None)
@given(prompt=st.lists(pieces, max_size=5).map("".join))
def test_any_text_equals_transformers(both, prompt):
    ours, theirs = both
    np.testing.assert_array_equal(ours.encode([prompt]).input_ids, reference(theirs, [prompt]))


@settings(max_examples=60, deadline=None)
@given(prompt=st.lists(pieces, max_size=5).map("".join))
def test_cut_is_the_tail_that_did_not_fit(both, prompt):
    ours, theirs = both
    (cut,) = ours.encode([prompt]).cut
    count = len(theirs(prompt)["input_ids"])
    assert bool(cut) == (count > 77)
    assert prompt.endswith(cut)


def test_cut_starts_at_the_first_lost_word(both):
    ours, _ = both
    kept = "a " * 75
    tokens = ours.encode([kept + "Woman, Café ", kept, kept[:-2] + " 🙂 b", ""])
    assert tokens.cut == ("Woman, Café ", "", "🙂 b", "")


def test_padding_and_ends(both):
    ours, theirs = both
    row = ours.encode(["a"]).input_ids[0]
    assert row[0] == ours.bos_id == theirs.bos_token_id
    assert row[2] == ours.eos_id == theirs.eos_token_id
    assert (row[3:] == theirs.pad_token_id).all()
    full = ours.encode(["a " * 100]).input_ids[0]
    assert full[-1] == ours.eos_id


def test_no_prompts_give_no_rows(both):
    assert both[0].encode([]).input_ids.shape == (0, 77)


@pytest.mark.parametrize(("length", "expected"), [(10, 10), (1e30, 77), (None, 77)])
def test_length_comes_from_the_configuration(tmp_path, length, expected):
    folder = write_folder(tmp_path / "t", pad=EOS, style="plain", length=length)
    if length is None:
        (folder / "tokenizer_config.json").unlink()
    tokenizer = ClipTokenizer.from_folder(folder)
    tokens = tokenizer.encode(["a " * 8 + "photo " * 90])
    assert tokens.input_ids.shape == (1, expected)
    assert tokens.input_ids[0, -1] == tokenizer.eos_id
    if expected == 10:
        assert tokens.cut == ("photo " * 90,)


def test_half_a_surrogate_pair_is_refused(both):
    with pytest.raises(InvalidRequest, match="Unicode"):
        both[0].encode(["a \ud83d b"])


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "t", pad="!", style="map")


def refuse(folder, match):
    with pytest.raises(WeightsError, match=match) as caught:
        ClipTokenizer.from_folder(folder)
    assert caught.value.hint
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    refuse(folder, f"{name} is missing")


def test_missing_folder(tmp_path):
    refuse(tmp_path / "none", "does not exist")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b'{"a": "b"}', b"x y z\n", b"[1]"])
def test_corrupt_files(folder, name, content):
    (folder / name).write_bytes(content)
    refuse(folder, "broken|no JSON object")


def test_truncated_vocabulary(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(dict(list(vocabulary.items())[:-5])))
    refuse(folder, "do not fit each other|in its vocabulary")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"pad_token": 5}', b"[" * 100_000])
def test_corrupt_configuration(folder, name, content):
    if name == "tokenizer_config.json":
        (folder / "special_tokens_map.json").unlink()
    (folder / name).write_bytes(content)
    refuse(folder, "broken|no JSON object|special token")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pad_token": "<pad>"}, "no pad_token '<pad>'"),
        ({"model_max_length": 2}, "length 2"),
        ({"model_max_length": "77"}, "length '77'"),
        ({"model_max_length": 999_999}, "length 999999; at most 1024"),
        ({"model_max_length": float("nan")}, "length nan"),
        ({"added_tokens_decoder": [1]}, "broken token list"),
        ({"added_tokens_decoder": {"x": token("!")}}, "broken token list"),
        ({"added_tokens_decoder": {"7": token("!")}}, "lists '!' as 7"),
        ({"added_tokens_decoder": {"0": {}}}, "special token"),
    ],
)
def test_configuration_that_does_not_fit(tmp_path, change, match):
    folder = write_folder(tmp_path / "t", pad=EOS, style="plain")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    refuse(folder, match)


def replacing(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def splitting(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": True}


HOSTILE = {
    "a split that backtracks": {"pre_tokenizer": splitting({"Regex": "(a+)+$"})},
    "a replacement that backtracks": {"normalizer": replacing({"Regex": "(a|aa)+$"}, "x")},
    "a replacement that grows": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [replacing({"String": "a"}, "a" * 1000)] * 3,
        }
    },
    "a table that panics": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "no steps at all": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
    "another model": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}},
    "chance": {"model": {"dropout": 0.5}},
    "bytes": {"model": {"byte_fallback": True}},
    "an id beyond the table": {"model": {"vocab": {"q": VOCABULARY}}},
    "an id beyond every table": {"model": {"vocab": {"q": 4_000_000_000}}},
    "an id below the table": {"model": {"vocab": {"q": -1}}},
    "an added id": {"added_tokens": [{"id": VOCABULARY, **token("photo"), "special": True}]},
}


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """A folder with a good tokenizer.json, and what is in it."""
    folder = write_folder(tmp_path_factory.mktemp("tokenizer") / "t", pad=EOS, style="json")
    return folder, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def written(tokenizer_json, tmp_path, change):
    """A copy with a changed file; of the model only the named parts change."""
    source, content = tokenizer_json
    folder = shutil.copytree(source, tmp_path / "t")
    model = dict(content["model"])
    for name, part in change.get("model", {}).items():
        model[name] = model["vocab"] | part if name == "vocab" and len(part) == 1 else part
    changed = content | change | {"model": model}
    (folder / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_tokenizer_that_is_not_clips_is_refused_before_it_reads_a_prompt(
    tokenizer_json, tmp_path, kind
):
    change = HOSTILE[kind]
    if kind == "an added id":  # which the library numbers itself, as the next one
        vocabulary = tokenizer_json[1]["model"]["vocab"]
        more = {f"word{i}": i for i in range(len(vocabulary), VOCABULARY)}
        change = change | {"model": {"vocab": vocabulary | more}}
    folder = written(tokenizer_json, tmp_path, change)
    refuse(folder, f"not CLIP's|CLIP's end at {VOCABULARY - 1}|broken")


def test_an_older_spelling_of_clips_steps_is_read(tokenizer_json, tmp_path):
    steps = tokenizer_json[1]["pre_tokenizer"]["pretokenizers"]
    words = steps[0]["pattern"]["Regex"].removeprefix(r"<\|startoftext\|>|<\|endoftext\|>|")
    assert words != steps[0]["pattern"]["Regex"]
    last = {name: value for name, value in steps[1].items() if name != "use_regex"}
    older = {"type": "Sequence", "pretokenizers": [splitting({"Regex": words}), last]}
    folder = written(tokenizer_json, tmp_path, {"pre_tokenizer": older})
    prompts = ["a photo's <|endoftext|> end", "It's 12\u00bd o'clock"]
    ours, theirs = (ClipTokenizer.from_folder(one) for one in (folder, tokenizer_json[0]))
    np.testing.assert_array_equal(ours.encode(prompts).input_ids, theirs.encode(prompts).input_ids)
