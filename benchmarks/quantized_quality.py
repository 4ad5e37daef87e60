"""What 8 bits cost: the mini model in fp16, fp8 and int8 before the same judges, pair by pair.

`make evaluate-quantized`, or `python -m benchmarks.quantized_quality --pairs 64`. Exports that are
missing in the folder are made first. ONNX Runtime on a CPU computes Q/DQ graphs by their meaning
(codes are exact, products may be wider than a GPU's), so this shows what quantisation does to
pictures and nothing about speed.
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

from benchmarks.judges import MiniJudges, Verdict
from benchmarks.mini_quality import (
    BATCH,
    PEOPLE,
    Interval,
    Pair,
    Setting,
    draw_people,
    make_pairs,
    summarise,
)
from fastface_trt import FastFace
from fastface_trt.cli.main import cli
from fastface_trt.mini.prompts import canonical_prompt
from fastface_trt.runtime.trace import StepTrace

REFERENCE = "fp16"
PRECISIONS = (REFERENCE, "fp8", "int8")
PRESET = "am1+dcg"
RESULTS = Path(__file__).parent / "results" / "quantized-quality.json"

Latents = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Judged:
    """One precision: judged means, and the relative L2 distance of its latents from fp16's."""

    precision: str
    quality: Setting
    latents_distance: Interval
    unet_megabytes: float
    quantized_layers: int
    calibration: str


def ensure_export(folder: Path, precision: str) -> Path:
    """The mini model's export in `precision` below `folder`, made if it is not there."""
    target = folder / precision
    if not (target / "manifest.json").is_file():
        arguments = ["export", "--checkpoint", "mini", "--precision", precision, str(target)]
        cli(arguments, standalone_mode=False)
    return target


def generate(
    export: Path, photos: Sequence[NDArray[np.uint8]], pairs: Sequence[Pair], judges: MiniJudges
) -> tuple[list[Verdict], Latents, float]:
    """Verdicts and final latents of all pairs in order, and the UNet samples per picture."""
    verdicts: list[Verdict] = []
    latents: Latents = []
    samples = 0
    with FastFace.load(export) as fastface:
        faces = [fastface.analyze(photo) for photo in photos]
        for at in range(0, len(pairs), BATCH):
            part = pairs[at : at + BATCH]
            final: dict[int, NDArray[np.float32]] = {}

            def keep(trace: StepTrace, final: dict[int, NDArray[np.float32]] = final) -> None:
                final[trace.job] = np.asarray(trace.latents)

            result = fastface.generate(
                [
                    fastface.request(canonical_prompt(p.scene), preset=PRESET, seed=p.seed)
                    for p in part
                ],
                [faces[p.person] for p in part],
                max_rows=36,
                on_step=keep,
            )
            samples += result.unet_samples
            verdicts += [judges.judge(np.asarray(image)) for image in result.images]
            latents += [final[job] for job in range(len(part))]
    return verdicts, latents, samples / len(pairs)


def distance(latents: Latents, reference: Latents) -> list[float]:
    """‖x − r‖ / ‖r‖ of each picture's latents."""
    return [
        float(np.linalg.norm(x - r) / np.linalg.norm(r))
        for x, r in zip(latents, reference, strict=True)
    ]


def table(judged: Sequence[Judged]) -> str:
    """The results in Markdown."""
    lines = [
        "| precision | ID, same person | style read back, % | place read back, % | no face, % "
        "| latents, relative distance from fp16 | UNet file, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in judged:
        q = one.quality
        lines.append(
            f"| {one.precision} | {q.identity.text()} | {q.style.text(100, 1)} "
            f"| {q.place.text(100, 1)} | {q.no_face.text(100, 1)} "
            f"| {one.latents_distance.text(digits=4)} | {one.unet_megabytes:.2f} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--pairs", "count", default=64, show_default=True, help="Face × prompt pairs.")
@click.option(
    "--exports",
    type=click.Path(path_type=Path),
    default=Path("out/quantized"),
    show_default=True,
    help="Folder with one export per precision.",
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(count: int, exports: Path, out: Path) -> None:
    """Judge the mini model in every precision; writes JSON and prints a Markdown table."""
    judges = MiniJudges()
    photos = draw_people(PEOPLE)
    people = np.stack([e for e in map(judges.embedding, photos) if e is not None])
    assert len(people) == PEOPLE, "the detector misses a drawn photo"
    pairs = make_pairs(count)
    started = perf_counter()
    judged: list[Judged] = []
    reference: Latents = []
    for precision in PRECISIONS:
        folder = ensure_export(exports, precision)
        verdicts, latents, samples = generate(folder, photos, pairs, judges)
        reference = reference or latents
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        record = manifest.get("quantization") or {}
        size = sum(f["bytes"] for f in manifest["modules"]["unet"]["files"])
        judged.append(
            Judged(
                precision,
                summarise(PRESET, pairs, verdicts, people, samples),
                Interval.of(distance(latents, reference)),
                size / 2**20,
                len(record.get("layers", ())),
                record.get("calibration", ""),
            )
        )
        click.echo(f"{precision}: {perf_counter() - started:.0f} s", err=True)
    report = {
        "what": "mini model in 8 bits, independent judges, ONNX Runtime on the CPU",
        "pairs": count,
        "people": PEOPLE,
        "preset": PRESET,
        "seconds": round(perf_counter() - started, 1),
        "machine": f"{platform.processor() or platform.machine()}, {platform.platform()}",
        "precisions": [asdict(one) for one in judged],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    click.echo(table(judged))


if __name__ == "__main__":
    main()
