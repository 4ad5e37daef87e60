"""What 8 bits cost: the mini model in fp16, fp8 and int8 before the same judges, pair by pair.

fp8 comes as its layers alone, with attention's products as well, and with the VAE in int8 beside.

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

from fastface_trt import FastFace
from fastface_trt.cli.main import cli
from fastface_trt.evaluation.data import Dataset, Pair
from fastface_trt.evaluation.judges import Judge, Sample
from fastface_trt.evaluation.mini import mini_dataset, mini_judges
from fastface_trt.measure.statistics import Interval
from fastface_trt.runtime.sampling import StepTrace

REFERENCE = "fp16"
PRECISIONS = {
    REFERENCE: ("--precision", "fp16"),
    "fp8": ("--precision", "fp8"),
    "fp8-attention": ("--precision", "fp8", "--quantize-attention"),
    "fp8-attention-vae": ("--precision", "fp8", "--quantize-attention", "--quantize-vae", "int8"),
    "int8": ("--precision", "int8"),
}
PRESET = "am1+dcg"
BATCH = 24
RESULTS = Path(__file__).parent / "results" / "quantized-quality.json"

Latents = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Quality:
    """Means of the judges over all pictures; those without a face are left out of the first two."""

    preset: str
    identity: Interval
    other_people: Interval
    style: Interval
    place: Interval
    no_face: Interval
    unet_samples_per_picture: float


@dataclass(frozen=True)
class Judged:
    """One precision: judged means, and the relative L2 distance of its latents from fp16's."""

    precision: str
    quality: Quality
    latents_distance: Interval
    unet_megabytes: float
    quantized_layers: int
    calibration: str


def ensure_export(folder: Path, precision: str) -> Path:
    """The mini model's export in `precision` below `folder`, made if it is not there."""
    target = folder / precision
    if not (target / "manifest.json").is_file():
        arguments = ["export", "--checkpoint", "mini", *PRECISIONS[precision], str(target)]
        cli(arguments, standalone_mode=False)
    return target


def generate(export: Path, data: Dataset, judges: Sequence[Judge]) -> tuple[Quality, Latents]:
    """Judged quality and final latents of all pairs in order."""
    values: dict[str, list[float]] = {judge.column.name: [] for judge in judges}
    latents: Latents = []
    samples = 0
    with FastFace.load(export) as fastface:
        faces = {name: fastface.analyze(photo) for name, photo in data.people.items()}
        for at in range(0, len(data.pairs), BATCH):
            part: Sequence[Pair] = data.pairs[at : at + BATCH]
            final: dict[int, NDArray[np.float32]] = {}

            def keep(trace: StepTrace, final: dict[int, NDArray[np.float32]] = final) -> None:
                final[trace.index] = np.asarray(trace.latents)

            result = fastface.generate(
                [fastface.request(p.prompt, preset=PRESET, seed=p.seed) for p in part],
                [faces[p.person] for p in part],
                max_rows=36,
                on_step=keep,
            )
            samples += result.unet_samples
            seen = [
                Sample(np.asarray(image), pair)
                for image, pair in zip(result.images, part, strict=True)
            ]
            for judge in judges:
                found = judge.judge(seen)
                values[judge.column.name] += [value for value in found if value is not None]
            latents += [final[job] for job in range(len(part))]
    means = {name: Interval.of(of_pictures) for name, of_pictures in values.items()}
    return Quality(
        PRESET,
        means["id"],
        means["id_other"],
        means["style"],
        means["place"],
        means["ffc"],
        samples / len(data.pairs),
    ), latents


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
    judges = list(mini_judges().values())
    data = mini_dataset(count)
    for judge in judges:
        judge.load(data)
    started = perf_counter()
    judged: list[Judged] = []
    reference: Latents = []
    for precision in PRECISIONS:
        folder = ensure_export(exports, precision)
        quality, latents = generate(folder, data, judges)
        reference = reference or latents
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        record = manifest.get("quantization") or {}
        size = sum(f["bytes"] for f in manifest["modules"]["unet"]["files"])
        judged.append(
            Judged(
                precision,
                quality,
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
        "people": len(data.people),
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
