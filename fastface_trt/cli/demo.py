"""`demo`: two contact sheets from the model that ships with the package, without downloads."""

from pathlib import Path
from time import perf_counter

import click
import numpy as np
from PIL import Image

from fastface_trt.cli.common import FOLDER, backend_options, console, passing_phases, timed_lines
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import storage_errors
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.images import contact_sheet, load_picture
from fastface_trt.runtime.picture_file import write_picture
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.presets import PRESETS

PROMPTS = (
    "photo; person in a garden, smiling",
    "watercolor painting; person in a forest, waving",
    "pixel art; person in a city, holding a balloon",
    "pencil sketch; person in a library, winking",
    "comic book; person in space, laughing",
)
PEOPLE = 4
CELL = 192


@click.command()
@backend_options
@click.option("--out", type=FOLDER, default=Path("out"), show_default=True, help="Folder.")
@click.option("--seed", default=5, show_default=True, type=int, help="0 to 2^64 - 1.")
def demo(
    export_folder: str, backend: str, cache: Path | None, threads: int | None, out: Path, seed: int
) -> None:
    """Make two contact sheets: people by prompts, and people by presets.

    Uses the small model and the drawn sample faces of the package; needs no downloads.
    """
    screen = console()
    line = timed_lines(screen)
    samples = [p for p in sorted(SAMPLE_FACES.glob("*.png")) if p.stem != "two_people"][:PEOPLE]
    started = perf_counter()
    with (
        passing_phases(screen, line) as phase,
        FastFace.load(
            export_folder, backend=backend, cache=cache, threads=threads, progress=phase
        ) as fastface,
    ):
        fastface.warm_up()
        line(f"engines ready after {perf_counter() - started:.1f} s")
        pictures = [load_picture(path) for path in samples]
        faces = [fastface.analyze(picture) for picture in pictures]
        people = [Image.fromarray(picture) for picture in pictures]
        by_prompt = [(prompt, "am1") for prompt in PROMPTS]
        by_preset = [(PROMPTS[1], preset) for preset in PRESETS]
        for name, columns, labels in (
            ("demo-prompts.png", by_prompt, [prompt for prompt, _ in by_prompt]),
            ("demo-presets.png", by_preset, [preset for _, preset in by_preset]),
        ):
            path = out / name
            _sheet(fastface, faces, people, columns, labels, path, seed, line)
            click.echo(str(path))


def _sheet(
    fastface: FastFace,
    faces: list[Face],
    people: list[Image.Image],
    columns: list[tuple[str, str]],
    labels: list[str],
    path: Path,
    seed: int,
    line: Progress,
) -> None:
    requests = [
        fastface.request(prompt, preset=preset, seed=seed)
        for _ in faces
        for prompt, preset in columns
    ]
    result = fastface.generate(requests, [face for face in faces for _ in columns], max_rows=12)
    rows = [result.images[at : at + len(columns)] for at in range(0, len(requests), len(columns))]
    sheet = contact_sheet(rows, column_labels=labels, cell=CELL, first_column=people)
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, np.asarray(sheet), parameters={"pictures": list(result.parameters)})
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in result.seconds.items())
    line(f"{len(requests)} pictures, {result.unet_samples} UNet samples: {stages}")
