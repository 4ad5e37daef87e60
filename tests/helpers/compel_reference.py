"""What compel makes of prompts on the mini checkpoint, written to tests/golden/prompts/compel.json.

    pip install compel==2.5.1     # in an environment that has torch, transformers and diffusers
    python -m tests.helpers.compel_reference

Per prompt: its fragments, the hidden states of both encoders side by side projected on one vector,
and the pooled text. Weakened phrases are removed from the prompt (`DownweightMode.REMOVE`).
"""

import json
from pathlib import Path

import numpy as np

from fastface_trt.mini.folders import CHECKPOINT

GOLDEN = Path(__file__).parents[1] / "golden" / "prompts" / "compel.json"
PROMPTS = (
    "photo; person in a garden",
    "photo++ of a person-- in a garden+",
    "photo of (a person in a garden, smiling)1.3 and rain",
    'a (tall (red)1.5 house)0.8, "blue sky"1.2, fog',
    r"a \(real\) (person)-- in soft-light++, smiling",
    "(person, garden)0.5",
)


def direction(width: int) -> np.ndarray:
    """The vector that states are projected on, [C]."""
    return np.cos(np.arange(width) + 0.5)


def main() -> None:
    """Write the file."""
    import torch
    from compel import Compel, DownweightMode, ReturnedEmbeddingsType
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    compels = [
        Compel(
            CLIPTokenizer.from_pretrained(CHECKPOINT / f"tokenizer{number}"),
            kind.from_pretrained(CHECKPOINT / f"text_encoder{number}", dtype=torch.float32),
            returned_embeddings_type=(
                ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            ),
            downweight_mode=DownweightMode.REMOVE,
            truncate_long_prompts=False,
            requires_pooled=bool(number),
        )
        for number, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection))
    ]
    cases = []
    with torch.no_grad():
        for prompt in PROMPTS:
            (flat,) = Compel.parse_prompt_string(prompt).prompts
            states, (states_2, pooled) = (compel(prompt) for compel in compels)
            both = torch.cat([states, states_2], -1)[0].double().numpy()
            cases.append(
                {
                    "prompt": prompt,
                    "fragments": [[one.text, one.weight] for one in flat.children],
                    "projected": np.round(both @ direction(both.shape[-1]), 6).tolist(),
                    "pooled": np.round(pooled[0].double().numpy(), 6).tolist(),
                }
            )
    lines = ",\n".join(json.dumps(case) for case in cases)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
