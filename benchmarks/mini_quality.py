"""Quality of the mini model by independent judges: identity, style, place, faces found.

`make evaluate`, or `python -m benchmarks.mini_quality --pairs 500`. People are drawn anew from a
seed that no training used; every setting sees the same people, prompts and noise, so settings are
compared pair by pair.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from benchmarks.judges import MiniJudges, Verdict
from fastface_trt import FastFace
from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    STYLE_NAMES,
    Scene,
    canonical_prompt,
)
from fastface_trt.mini.scene import draw_portrait
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.presets import PRESETS

SEED = 20_260_000
"""Of prompts and noise."""

POPULATION = "evaluation"
"""A stream of people that no training draws from."""

PEOPLE = 50
BATCH = 24
RESAMPLES = 2000
RESULTS = Path(__file__).parent / "results" / "mini-quality.json"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over pairs."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Mean of `values`, percentile bootstrap with a fixed seed."""
        array = np.asarray(values, dtype=np.float64)
        rng = np.random.default_rng(0)
        means = array[rng.integers(len(array), size=(RESAMPLES, len(array)))].mean(1)
        return cls(float(array.mean()), *(float(x) for x in np.percentile(means, [2.5, 97.5])))

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """`mean (low to high)`."""
        low, mean, high = (f"{scale * x:.{digits}f}" for x in (self.low, self.mean, self.high))
        return f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Setting:
    """Judged results of one preset."""

    preset: str
    identity: Interval
    other_people: Interval
    style: Interval
    place: Interval
    no_face: Interval
    unet_samples_per_picture: float


@dataclass(frozen=True)
class Pair:
    """One person and one prompt."""

    person: int
    scene: Scene
    seed: int


def make_pairs(count: int) -> list[Pair]:
    """Every style and place equally often, people and actions in turn."""
    scenes = [(style, place) for style in STYLE_NAMES for place in PLACE_NAMES]
    rng = np.random.default_rng(SEED)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(count // len(scenes) + 1)])
    return [
        Pair(
            index % PEOPLE,
            Scene(*scenes[order[index]], ACTION_NAMES[rng.integers(len(ACTION_NAMES))]),
            SEED + index,
        )
        for index in range(count)
    ]


def draw_people(count: int) -> list[NDArray[np.uint8]]:
    """Source photos of people whom no network has seen, RGB uint8 [H,W,3]."""
    pictures = []
    for person in range(count):
        scene = Scene("photo", PLACE_NAMES[person % len(PLACE_NAMES)], "smiling")
        identity = sample_identity(person, population=POPULATION)
        picture, _ = draw_portrait(identity, scene, SEED + person)
        pictures.append(np.asarray(picture))
    return pictures


def generate(
    fastface: FastFace, faces: Sequence[Face], pairs: Sequence[Pair], preset: str
) -> tuple[list[NDArray[np.uint8]], float]:
    """Pictures of all pairs, and the UNet samples per picture."""
    requests = [
        fastface.request(canonical_prompt(pair.scene), preset=preset, seed=pair.seed)
        for pair in pairs
    ]
    result = fastface.generate(requests, [faces[pair.person] for pair in pairs], max_rows=36)
    return [np.asarray(image) for image in result.images], result.unet_samples / len(pairs)


def summarise(
    preset: str,
    pairs: Sequence[Pair],
    verdicts: Sequence[Verdict],
    people: NDArray[np.float32],
    samples: float,
) -> Setting:
    """Means and intervals; pictures without a face count in `no_face` and not in identity."""
    same, other = [], []
    for pair, verdict in zip(pairs, verdicts, strict=True):
        if verdict.embedding is None:
            continue
        similarity = people @ verdict.embedding
        same.append(float(similarity[pair.person]))
        other.append(float(np.delete(similarity, pair.person).mean()))
    return Setting(
        preset,
        Interval.of(same),
        Interval.of(other),
        Interval.of([v.style == p.scene.style for p, v in zip(pairs, verdicts, strict=True)]),
        Interval.of([v.place == p.scene.place for p, v in zip(pairs, verdicts, strict=True)]),
        Interval.of([v.embedding is None for v in verdicts]),
        samples,
    )


def table(settings: Sequence[Setting]) -> str:
    """The results in Markdown."""
    lines = [
        "| preset | ID, same person | ID, other people | style read back, % | place read back, % "
        "| no face, % | UNet samples |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.preset} | {s.identity.text()} | {s.other_people.text()} "
        f"| {s.style.text(100, 1)} | {s.place.text(100, 1)} | {s.no_face.text(100, 1)} "
        f"| {s.unet_samples_per_picture:.0f} |"
        for s in settings
    ]
    return "\n".join(lines)


@click.command()
@click.option("--pairs", "count", default=512, show_default=True, help="Face × prompt pairs.")
@click.option("--export", "export_folder", default="mini", show_default=True, help="Export folder.")
@click.option("--preset", "presets", multiple=True, default=PRESETS, help="Settings (repeatable).")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(count: int, export_folder: str, presets: tuple[str, ...], out: Path) -> None:
    """Judge the mini model at 4 steps and λ = 0.8; writes JSON and prints a Markdown table."""
    console = Console(stderr=True)
    judges = MiniJudges()
    photos = draw_people(PEOPLE)
    embeddings = [judges.embedding(photo) for photo in photos]
    assert all(e is not None for e in embeddings), "the detector misses a drawn photo"
    people = np.stack([e for e in embeddings if e is not None])
    pairs = make_pairs(count)
    settings = []
    started = perf_counter()
    columns = (*Progress.get_default_columns(), TimeRemainingColumn())
    with FastFace.load(export_folder) as fastface, Progress(*columns, console=console) as bar:
        faces = [fastface.analyze(photo) for photo in photos]
        for preset in presets:
            task = bar.add_task(preset, total=count)
            verdicts: list[Verdict] = []
            samples = 0.0
            for at in range(0, count, BATCH):
                part = pairs[at : at + BATCH]
                pictures, samples = generate(fastface, faces, part, preset)
                verdicts += [judges.judge(picture) for picture in pictures]
                bar.advance(task, len(part))
            settings.append(summarise(preset, pairs, verdicts, people, samples))
        steps = fastface.manifest.steps
    report = {
        "what": "mini model, independent judges",
        "pairs": count,
        "people": PEOPLE,
        "steps": steps,
        "ip_adapter_scale": 0.8,
        "seconds": round(perf_counter() - started, 1),
        "machine": f"{platform.processor() or platform.machine()}, {platform.platform()}",
        "settings": [asdict(s) for s in settings],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    click.echo(table(settings))


if __name__ == "__main__":
    main()
