"""Tokenizers and the two text encoders: CLIP-shaped, trained on prompts alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from fastface_trt.mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    STYLE_NAMES,
    all_scenes,
    varied_prompt,
)

from .loop import Schedule, train

SCHEDULE = Schedule(steps=500, learning_rate=1e-3, warmup=50)
BATCH = 48
MERGES = 420
LENGTH = 77
WIDTHS = (32, 64)
LAYERS = 3
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """Return one printable symbol per byte value, in CLIP's vocabulary order ("!" first)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    table = {value: chr(value) for value in printable}
    table.update({value: chr(256 + index) for index, value in enumerate(others)})
    return [table[value] for value in [*printable, *others]]


def learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges, most frequent pair first; ties go to the alphabetically first."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            merged, index = [], 0
            while index < len(parts):
                if tuple(parts[index : index + 2]) == best:
                    merged.append("".join(best))
                    index += 2
                else:
                    merged.append(parts[index])
                    index += 1
            pieces[word] = merged
    return merges


def corpus(seed: int, repeats: int = 6) -> list[str]:
    """Return many wordings of every scene."""
    rng = np.random.default_rng([seed, 11])
    return [varied_prompt(scene, rng) for scene in all_scenes() for _ in range(repeats)]


def write_tokenizers(checkpoint: Path, seed: int) -> None:
    """Write tokenizer/ and tokenizer_2/ with the files and padding that SDXL's repository has."""
    words: Counter[str] = Counter()
    for prompt in corpus(seed):
        words.update(prompt.replace(",", " ").replace(";", " ").replace("-", " ").split())
    merges = learn_merges(words, MERGES)
    symbols = byte_symbols()
    names = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(m) for m in merges)]
    vocabulary = {name: index for index, name in enumerate([*names, START, END])}
    lines = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n"
    for folder, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        target = checkpoint / folder
        target.mkdir(parents=True, exist_ok=True)
        (target / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (target / "merges.txt").write_text(lines)
        special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
        (target / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
        settings = {
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": LENGTH,
            "tokenizer_class": "CLIPTokenizer",
            **special,
        }
        (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Return token ids int64 [n, 77], padded and cut as the pipeline does."""
    encoded = tokenizer(
        prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


def _config(width: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 4,
        projection_dim=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 16,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu" if width == WIDTHS[0] else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Reader(nn.Module):
    """Both text encoders with heads that name style, place and action.

    The heads see what the UNet will see: the penultimate hidden states, and the pooled text.
    """

    def __init__(self, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
        super().__init__()
        self.first = CLIPTextModel(_config(WIDTHS[0], tokenizers[0]))
        self.second = CLIPTextModelWithProjection(_config(WIDTHS[1], tokenizers[1]))
        names = len(STYLE_NAMES) + len(PLACE_NAMES) + len(ACTION_NAMES)
        self.pooled_head = nn.Linear(WIDTHS[1], names)
        self.query = nn.Parameter(torch.randn(3, sum(WIDTHS)) * 0.1)
        self.token_head = nn.Linear(sum(WIDTHS), names)

    def encode(self, first_ids: Tensor, second_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states [n, 77, 96] and pooled text [n, 64], as SDXL combines them."""
        first = self.first(first_ids, output_hidden_states=True)
        second = self.second(second_ids, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return states, second.text_embeds

    def loss(self, first_ids: Tensor, second_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the classification loss; `labels` int64 [n, 3] are style, place, action."""
        states, pooled = self.encode(first_ids, second_ids)
        # A learned query per question reads one token: it teaches single tokens to carry meaning.
        weights = torch.softmax(torch.einsum("qd,ntd->nqt", self.query, states), dim=-1)
        read = torch.einsum("nqt,ntd->nqd", weights, states)
        sizes = [len(STYLE_NAMES), len(PLACE_NAMES), len(ACTION_NAMES)]
        from_pooled = self.pooled_head(pooled).split(sizes, dim=-1)
        total = states.new_zeros(())
        for index in range(3):
            from_tokens = self.token_head(read[:, index]).split(sizes, dim=-1)[index]
            total = total + functional.cross_entropy(from_tokens, labels[:, index])
            total = total + functional.cross_entropy(from_pooled[index], labels[:, index])
        # Bounded magnitudes let the frozen states enter the UNet as they are.
        return total + 1e-3 * (states.square().mean() + pooled.square().mean())


def load_tokenizers(checkpoint: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Load both tokenizers from a checkpoint folder."""
    return (
        CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"),
        CLIPTokenizer.from_pretrained(checkpoint / "tokenizer_2"),
    )


def train_text(checkpoint: Path, work: Path, seed: int) -> Reader:
    """Write the tokenizers, train both text encoders, and save them into the checkpoint."""
    write_tokenizers(checkpoint, seed)
    tokenizers = load_tokenizers(checkpoint)
    torch.manual_seed(seed)
    reader = Reader(tokenizers)
    scenes = all_scenes()

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        chosen = [scenes[int(i)] for i in rng.integers(len(scenes), size=BATCH)]
        prompts = [varied_prompt(scene, rng) for scene in chosen]
        labels = torch.tensor(
            [
                [
                    STYLE_NAMES.index(scene.style),
                    PLACE_NAMES.index(scene.place),
                    ACTION_NAMES.index(scene.action),
                ]
                for scene in chosen
            ]
        )
        ids = [tokenize(tokenizer, prompts) for tokenizer in tokenizers]
        return reader.loss(ids[0], ids[1], labels)

    train(reader, step_loss, SCHEDULE, work / "text.pt", seed)
    reader.first.half().save_pretrained(checkpoint / "text_encoder")
    reader.second.half().save_pretrained(checkpoint / "text_encoder_2")
    return reader.float()
