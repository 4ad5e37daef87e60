"""A CLIP tokenizer for random weights, made without torch."""

import json
from pathlib import Path
from typing import Final

VOCABULARY: Final = 49408
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
PAD_TOKENS: Final = {"tokenizer": END_TOKEN, "tokenizer_2": "!"}


def write_byte_tokenizer(folder: Path, pad_token: str) -> None:
    """A CLIP tokenizer without merges: one token per byte, special tokens at CLIP's numbers.

    Random weights make nothing of words, but the number of tokens and the path are the real ones.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True)
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(f"{ch}</w>" for ch in alphabet)]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {START_TOKEN: VOCABULARY - 2, END_TOKEN: VOCABULARY - 1}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": START_TOKEN, "eos_token": END_TOKEN, "unk_token": END_TOKEN}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad_token}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "pad_token": pad_token, "model_max_length": 77})
    )
