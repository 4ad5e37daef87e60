"""A run folder in the format of `evaluate`, with values whose true effects are known.

Scores are a pair's own difficulty, plus the effect of the setting's axes, plus noise; pictures are
drawn portraits, tinted a little by setting so that none equals another.
"""

from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from fastface_trt.evaluation.results import PictureResult, RunRecord

PEOPLE = ("ada", "bruno", "chika", "dev", "elsa", "farid")
PLACES = ("in a forest", "on a beach", "in a city", "in the mountains")
JUDGES = [
    ("id", "ID, same person", "cosine", True, "Cosine of face embeddings by an independent net."),
    ("id_other", "ID, other people", "cosine", False, "The same cosine to everybody else."),
    ("clip", "prompt match", "probability", True, "Probability of the prompted style and place."),
    ("fcs", "face prompt match", "probability", True, "The same on the area of the face."),
    ("ffc", "no face", "fraction", False, "Pictures in which no detector finds a face."),
]
PRESET_EFFECT = {"plain": 0.0, "am1": 0.08, "am2": 0.02, "am1+dcg": 0.12}


def pareto_settings(presets=("plain", "am1"), scales=(0.35, 0.5, 0.8)):
    return [{"preset": p, "ip_adapter_scale": s} for p, s in product(presets, scales)]


def grid_settings(alphas=(1.0, 1.5, 2.0), betas=(1.0, 2.0, 3.0)):
    return [{"alpha": a, "beta": b} for a, b in product(alphas, betas)]


def step_settings():
    """β of 3 at one step only."""
    off = [{"beta": [1.0] * 4}]
    return off + [{"beta": [3.0 if step == at else 1.0 for step in range(4)]} for at in range(4)]


def ablation_settings(names=("plain", "am1", "am2", "am1+dcg")):
    return [{"preset": name} for name in names]


def setting_name(axes):
    return "_".join(f"{key}={value}" for key, value in axes.items()).replace(" ", "")


def effect(axes):
    """What the axes add to id; half of the λ part is taken from clip."""
    beta = np.mean(axes.get("beta", 1.0))
    alpha = np.mean(axes.get("alpha", 1.0))
    return (
        PRESET_EFFECT.get(axes.get("preset"), 0.0)
        + 0.3 * (axes.get("ip_adapter_scale", 0.8) - 0.8)
        + 0.05 * (alpha - 1)
        - 0.02 * (beta - 1)
        + 0.04 * (axes.get("power", 1.3) - 1.3)
    )


def baseline_name(names, settings, axes):
    """The setting with the same axes but preset plain, else the first."""
    wanted = axes | {"preset": "plain"}
    return next((n for n, one in zip(names, settings, strict=True) if one == wanted), names[0])


@lru_cache(maxsize=64)
def portrait(person, place):
    from fastface_trt.mini.identity import sample_identity
    from fastface_trt.mini.scene import Scene, draw_portrait

    scene = Scene("photo", ("forest", "beach", "city", "mountains")[place], "smiling")
    picture, _ = draw_portrait(sample_identity(person, population="synthetic"), scene, person)
    return np.asarray(picture)


def metrics(axes, pair, rng, faceless):
    if faceless:
        score = {"id": None, "id_other": None, "fcs": None, "ffc": 1}
    else:
        difficulty = np.random.default_rng(pair).normal(0.5, 0.15)
        score = {
            "id": float(difficulty + effect(axes) + rng.normal(0, 0.02)),
            "id_other": float(rng.normal(0.05, 0.02)),
            "fcs": float(rng.uniform(0.7, 0.9)),
            "ffc": 0,
        }
    clip = 0.7 - 0.15 * (axes.get("ip_adapter_scale", 0.8) - 0.8) + rng.normal(0, 0.02)
    return score | {"clip": float(clip)}


def write_run(
    folder,
    settings,
    *,
    pairs=12,
    kept=4,
    finished=None,
    faceless=0.0,
    prompts=None,
    title="Synthetic run",
    experiment="synthetic",
    judges=JUDGES,
    size=96,
):
    """Write a run; `finished` maps setting names to how many pairs are done (default: all)."""
    folder = Path(folder)
    (folder / "faces").mkdir(parents=True)
    used = PEOPLE[: max(1, min(len(PEOPLE), pairs))]
    for index, person in enumerate(used):
        Image.fromarray(portrait(index, 0)).save(folder / "faces" / f"{person}.png")
    names = [axes["name"] if "name" in axes else setting_name(axes) for axes in settings]
    clean = [{k: v for k, v in axes.items() if k != "name"} for axes in settings]
    run = {
        "schema_version": 1,
        "experiment": experiment,
        "title": title,
        "export": "mini",
        "backend": "onnxruntime",
        "checkpoint": "mini",
        "date": "2025-01-02T03:04:05+00:00",
        "machine": {"cpu": "a processor", "cores": 2, "gpu": None},
        "versions": {"fastface-trt": "0.1.0", "onnxruntime": "1.20"},
        "judges": [
            {"name": n, "label": lb, "unit": u, "higher_is_better": h, "what": w}
            for n, lb, u, h, w in judges
        ],
        "settings": [
            {
                "name": name,
                "axes": axes,
                "request": {"steps": 4, **axes},
                "line": axes.get("preset"),
                "baseline": baseline_name(names, clean, axes),
                "export": "mini",
                "checkpoint": "mini",
                "scheduler": "mini",
            }
            for name, axes in zip(names, clean, strict=True)
        ],
        "pairs": pairs,
        "seed": 7,
        "data": "mini",
        "data_sha256": "0" * 64,
        "engines_sha256": "0" * 64,
        "batch": 4,
        "max_rows": 12,
        "keep": kept,
    }
    text = RunRecord.model_validate(run).model_dump_json(indent=1)
    (folder / "run.json").write_text(text)
    known = {judge[0] for judge in judges}
    lines = []
    for number, (name, axes) in enumerate(zip(names, clean, strict=True)):
        place = folder / "pictures" / f"{number:03d}"
        place.mkdir(parents=True)
        for pair in range((finished or {}).get(name, pairs)):
            rng = np.random.default_rng([number, pair])
            person = pair % len(used)
            picture = None
            if pair < kept:
                pixels = portrait(person, pair % 4).astype(np.int16) + 3 * number
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture = f"pictures/{number:03d}/{pair:05d}.png"
                image.resize((size, size)).save(folder / picture)
            values = metrics(axes, pair, rng, rng.random() < faceless)
            lines.append(
                {
                    "setting": name,
                    "pair": pair,
                    "person": used[person],
                    "prompt": prompts[pair] if prompts else f"photo; person {PLACES[pair % 4]}",
                    "seed": 1000 + pair,
                    "metrics": {k: v for k, v in values.items() if k in known},
                    "unet_samples": 10 if "dcg" in str(axes.get("preset")) else 4,
                    "seconds": 0.25,
                    "picture": picture,
                }
            )
    text = "".join(PictureResult(**line).model_dump_json() + "\n" for line in lines)
    (folder / "results.jsonl").write_text(text)
    return folder
