"""CLIP's tokenizer without transformers: the same ids, and what did not fit is reported.

Reads the folder that diffusers ships with a checkpoint (`tokenizer`, `tokenizer_2`), in either of
its two forms: `vocab.json` and `merges.txt`, or one `tokenizer.json`. Of the latter words, merges
and added tokens are taken; how a text is cut into words has to be CLIP's way, since a file could
ask for steps that take for ever on some prompts.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.runtime.prompt_syntax import Fragment, Section

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
DEFAULT_LENGTH = 77
VOCABULARY: Final = 49408
PAD_TOKENS: Final = {"tokenizer": EOS, "tokenizer_2": "!"}

LARGEST_LENGTH: Final = 1024
"""Tokens per prompt with start and end at most; CLIP's own text models have 77 positions."""

_WORDS_ALONE = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORDS = rf"<\|startoftext\|>|<\|endoftext\|>|{_WORDS_ALONE}"
_ANY: Final = object()
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_MEND = "Copy the checkpoint's tokenizer folder again, or export it again."


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of some prompts, and what was cut from each."""

    input_ids: NDArray[np.int64]
    """[B, max_length]: start, the prompt, end, padding."""
    cut: tuple[str, ...]
    """Per prompt the text behind its last token that fitted, "" when all of it fitted."""


@dataclass(frozen=True, slots=True)
class Windows:
    """A prompt in windows of 75 tokens, each between start and end; W windows of L positions."""

    input_ids: NDArray[np.int64]
    """[W, L]"""
    weights: NDArray[np.float32]
    """[W, L], 1 for start, end and padding."""
    cut: str
    """The text from the first token on that the windows have no room for."""

    def __len__(self) -> int:
        return len(self.input_ids)


class ClipTokenizer:
    """Turns prompts into the ids that transformers' CLIPTokenizer gives (padded, truncated)."""

    def __init__(self, tokenizer: Tokenizer, ids: Mapping[str, int], max_length: int) -> None:
        """`ids` are those of bos_token, eos_token and pad_token; see `from_folder`."""
        self._tokenizer = tokenizer
        self.bos_id = ids["bos_token"]
        self.eos_id = ids["eos_token"]
        self.pad_id = ids["pad_token"]
        self.max_length = max_length

    @classmethod
    def from_folder(cls, folder: Path) -> "ClipTokenizer":
        """Read a tokenizer folder; raise `WeightsError` when a file is missing or corrupt."""
        if not folder.is_dir():
            raise WeightsError(f"The tokenizer folder {folder} does not exist.", _MEND)
        config = _read_json(folder / "tokenizer_config.json", required=False)
        # Where the configuration lists the added tokens it is complete; before that, the special
        # tokens had a file of their own, which then wins.
        if "added_tokens_decoder" not in config:
            config |= _read_json(folder / "special_tokens_map.json", required=False)
        named = _special_tokens(config, folder)
        if (folder / "tokenizer.json").exists():
            tokenizer = _from_tokenizer_json(folder / "tokenizer.json")
        else:
            tokenizer = _from_vocabulary(folder, named["unk_token"].content)
        _add_special_tokens(tokenizer, config, named, folder)
        ids = {}
        for key, token in named.items():
            found = tokenizer.token_to_id(token.content)
            if found is None:
                # An id past the vocabulary would read past the text encoder's embedding table.
                raise WeightsError(
                    f"The tokenizer in {folder} has no {key} {token.content!r} in its vocabulary.",
                    _MEND,
                )
            ids[key] = found
        largest = max(tokenizer.get_vocab().values())
        if largest >= VOCABULARY:
            raise WeightsError(
                f"The tokenizer in {folder} has the id {largest}; CLIP's end at {VOCABULARY - 1}.",
                _MEND,
            )
        return cls(tokenizer, ids, _length(config, folder))

    def encode(self, prompts: Sequence[str]) -> Tokens:
        """Tokenise `prompts` [B] into int64 [B, max_length].

        A prompt that is too long loses its tail, which `Tokens.cut` returns word for word. Raises
        `InvalidRequest` for text that is not valid Unicode.
        """
        windows = [self.windows(((Fragment(prompt),),), 1, 1) for prompt in prompts]
        rows = [one.input_ids for one in windows] or [np.empty((0, self.max_length), np.int64)]
        return Tokens(np.concatenate(rows), tuple(one.cut for one in windows))

    def windows(self, sections: Sequence[Section], least: int, most: int) -> Windows:
        """Tokenise a prompt into `most` windows at most, and empty ones up to `least`.

        A window ends where it is full or its section does; fragments are tokenised one by one.
        Raises `InvalidRequest` for text that is not valid Unicode.
        """
        room = self.max_length - 2
        fragments = [fragment for section in sections for fragment in section]
        texts = [fragment.text for fragment in fragments]
        rows: list[list[tuple[int, int, int]]] = []  # token, its fragment, its place in that
        numbers = itertools.count()
        for section in sections:
            found = [
                (token, number, start)
                for number in itertools.islice(numbers, len(section))
                for token, start in self._tokens(texts[number])
            ]
            rows += [found[at : at + room] for at in range(0, len(found), room)] or [[]]
        if len(rows) > 1 and not rows[-1]:  # a new window was asked for, and nothing follows
            rows.pop()
        cut = ""
        for _, number, start in itertools.chain(*rows[most:]):
            cut = " ".join([texts[number][start:], *texts[number + 1 :]])
            break
        kept = rows[:most]
        input_ids = np.full((max(len(kept), least), self.max_length), self.pad_id, np.int64)
        weights = np.ones(input_ids.shape, np.float32)
        input_ids[:, :2] = self.bos_id, self.eos_id
        for index, row in enumerate(kept):
            end = len(row) + 1
            input_ids[index, 1 : end + 1] = [*(token for token, *_ in row), self.eos_id]
            weights[index, 1:end] = [fragments[number].weight for _, number, _ in row]
        return Windows(input_ids, weights, cut)

    def _tokens(self, text: str) -> list[tuple[int, int]]:
        """The tokens of a text, and where each begins in it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequest(
                "The prompt holds characters that are not valid Unicode.",
                "Type it again, or save its file as UTF-8.",
            ) from None
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [(i, start) for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise WeightsError(f"The tokenizer file {path} is missing.", _MEND) from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"The tokenizer file {path} is broken: {error}.", _MEND) from None
    if not isinstance(content, dict):
        raise WeightsError(f"The tokenizer file {path} holds no JSON object.", _MEND)
    return content


def _special_tokens(config: Mapping[str, Any], folder: Path) -> dict[str, AddedToken]:
    """The four named special tokens; CLIP's own where the configuration says nothing."""
    named = {}
    for key in _NAMED:
        value = config.get(key) or (BOS if key == "bos_token" else EOS)
        named[key] = _added_token(value, folder)
    return named


def _added_token(value: Any, folder: Path) -> AddedToken:
    """A special token from its JSON form: the text alone, or an object with matching rules."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    try:
        rules = {k: bool(value.get(k)) for k in ("lstrip", "rstrip", "single_word")}
        normalized = bool(value.get("normalized", False))
        return AddedToken(str(value["content"]), special=True, normalized=normalized, **rules)
    except (AttributeError, KeyError, TypeError):
        raise WeightsError(
            f"The tokenizer in {folder} has a special token {value!r} that is none.", _MEND
        ) from None


def _from_vocabulary(folder: Path, unknown: str) -> Tokenizer:
    """CLIP's byte-level BPE from `vocab.json` and `merges.txt`."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocabulary, merges):
        if not path.is_file():
            raise WeightsError(f"The tokenizer file {path} is missing.", _MEND)
    try:
        model = BPE(
            *BPE.read_file(str(vocabulary), str(merges)),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise WeightsError(
            f"The tokenizer files in {folder} are broken or do not fit each other: {error}.", _MEND
        ) from None
    return _clips(model, _WORDS)


def _clips(model: BPE, words: str) -> Tokenizer:
    """A tokenizer with CLIP's steps around its model."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _from_tokenizer_json(path: Path) -> Tokenizer:
    # Not what pads and truncates: what was cut would be lost before we could tell.
    parts = ("version", "added_tokens", "normalizer", "pre_tokenizer", "model")
    content = {name: part for name, part in _read_json(path).items() if name in parts}
    for name in ("normalizer", "pre_tokenizer", "model"):
        if not any(_says_no_more(content.get(name), own[name]) for own in _clips_own()):
            raise WeightsError(f"The {name} of the tokenizer file {path} is not CLIP's.", _MEND)
    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise WeightsError(f"The tokenizer file {path} is broken: {error}.", _MEND) from None


def _clips_own() -> Iterator[dict[str, Any]]:
    """CLIP's tokenizer as files of several ages say it, with `_ANY` for what is each file's own."""
    for words in (_WORDS, _WORDS_ALONE):
        model = BPE(continuing_subword_prefix="", end_of_word_suffix="</w>")
        own = json.loads(_clips(model, words).to_str())
        yield own | {"model": own["model"] | dict.fromkeys(("vocab", "merges", "unk_token"), _ANY)}


def _says_no_more(part: Any, own: Any) -> bool:
    """Whether a part of a file says what CLIP's `own` does, or leaves some of it to the library."""
    if isinstance(part, dict) and isinstance(own, dict):
        return all(name in own and _says_no_more(one, own[name]) for name, one in part.items())
    if isinstance(part, list) and isinstance(own, list) and len(part) == len(own):
        return all(map(_says_no_more, part, own))
    return own is _ANY or part is None or bool(part == own)


def _add_special_tokens(
    tokenizer: Tokenizer, config: Mapping[str, Any], named: Mapping[str, AddedToken], folder: Path
) -> None:
    """Make special tokens match as a whole inside prompts, as transformers does.

    That has a visible effect in SDXL: `tokenizer_2` pads with "!", so there every "!" of a prompt
    becomes the padding id 0.
    """
    listed = config.get("added_tokens_decoder", {})
    try:
        added = {int(i): _added_token(token, folder) for i, token in listed.items()}
    except (AttributeError, ValueError):
        raise WeightsError(f"The tokenizer in {folder} has a broken token list.", _MEND) from None
    tokens = [added[i] for i in sorted(added)]
    known = {token.content for token in tokens}
    known |= {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # A named token outside the vocabulary is not added: it would get an id that no model knows.
    tokens += [
        token
        for token in named.values()
        if token.content not in known and tokenizer.token_to_id(token.content) is not None
    ]
    tokenizer.add_special_tokens(tokens)
    for i, token in added.items():
        if tokenizer.token_to_id(token.content) != i:
            raise WeightsError(
                f"The tokenizer in {folder} lists {token.content!r} as {i}, its vocabulary as "
                f"{tokenizer.token_to_id(token.content)}.",
                _MEND,
            )


def _length(config: Mapping[str, Any], folder: Path) -> int:
    """Tokens per prompt with start and end; transformers writes 1e30 for "no limit known"."""
    value = config.get("model_max_length", DEFAULT_LENGTH)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 3:
        raise WeightsError(f"The tokenizer in {folder} has the length {value!r}.", _MEND)
    if LARGEST_LENGTH < value <= 1_000_000:
        raise WeightsError(
            f"The tokenizer in {folder} has the length {value}; at most {LARGEST_LENGTH} is read.",
            _MEND,
        )
    return DEFAULT_LENGTH if value > 1_000_000 else int(value)


def write_byte_tokenizer(folder: Path, pad_token: str) -> None:
    """A CLIP tokenizer without merges: one token per byte, special tokens at CLIP's numbers.

    Random weights make nothing of words, but the number of tokens and the path are the real ones.
    """
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{ch}</w>" for ch in alphabet)]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {BOS: VOCABULARY - 2, EOS: VOCABULARY - 1}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad_token}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "pad_token": pad_token, "model_max_length": 77})
    )
