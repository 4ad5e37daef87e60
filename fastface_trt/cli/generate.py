"""`generate`: faces and prompts in, pictures out."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from fastface_trt.cli.common import (
    backend_options,
    console,
    engine_options,
    licence_option,
    passing_phases,
    provider_option,
    timed_lines,
)
from fastface_trt.engines.files import storage_errors
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.images import contact_sheet, load_picture
from fastface_trt.runtime.picture_file import (
    FORMATS,
    QUALITY,
    PictureFormat,
    PictureWriter,
    picture_format,
    write_picture,
)
from fastface_trt.runtime.pipeline import FastFace, GenerationResult
from fastface_trt.runtime.request import parse_request
from fastface_trt.runtime.sampling import StepTrace

OPTIONS = {
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "prompt_syntax": "--prompt-syntax",
    "preset": "--preset",
    "steps": "--steps",
    "seed": "--seed",
    "size": "--size",
    "ip_adapter_scale": "--ip-scale",
    "alpha": "--alpha",
    "beta": "--beta",
    "guidance_rescale": "--guidance-rescale",
    "dcg_variant": "--dcg-variant",
    "manipulation.down": "--am-down",
    "manipulation.mid": "--am-mid",
    "manipulation.up": "--am-up",
    "scope": "--scope",
    "plan": "--plan",
}
"""How the fields of a request are spelled here."""


@click.command()
@backend_options
@provider_option
@click.option(
    "--face",
    "faces",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Picture with the face (repeatable).",
)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text (repeatable).")
@click.option("--negative-prompt", default="", help="What the picture should not show.")
@click.option(
    "--prompt-syntax",
    default="plain",
    show_default=True,
    help="How weights are written: plain (not at all), a1111 or compel.",
)
@click.option(
    "--preset",
    "presets",
    multiple=True,
    default=("plain",),
    show_default=True,
    help="plain, dcg, am1, am2, am1+dcg or am2+dcg (repeatable, to compare).",
)
@click.option("--steps", type=int, help="UNet steps [the export's].")
@click.option("--seed", default=0, show_default=True, type=int, help="0 to 2^64 - 1.")
@click.option(
    "--count",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Pictures per face, prompt and preset.",
)
@click.option("--size", help="WIDTHxHEIGHT in pixels [the export's].")
@click.option("--ip-scale", "ip_adapter_scale", help="λ: a number, or down=…,mid=…,up=… [0.8].")
@click.option("--alpha", help="α (Eq. 3): 1.5, a list 1,1.5,1.5,1, or e.g. cosine:high=3.")
@click.option("--beta", help="β (Eq. 3), written like --alpha.")
@click.option(
    "--guidance-rescale", "--rescale", "guidance_rescale", help="φ (Eq. 5), 0 to 1, or off."
)
@click.option(
    "--dcg-variant",
    type=int,
    default=2,
    show_default=True,
    help="Guidance of appendix D: 1, 2 or 3.",
)
@click.option(
    "--am-down",
    help="Attention manipulation, e.g. scale=1.55,power=1.3 or kind=softmask,sharpness=7.5/5/5/5.",
)
@click.option("--am-mid", help="The same for the middle of the UNet.")
@click.option("--am-up", help="The same for the up part.")
@click.option(
    "--scope",
    default="request",
    show_default=True,
    help="What the softmask normalises over: request or branch.",
)
@click.option(
    "--plan",
    default="exact",
    show_default=True,
    help="Branch plan: exact, full (all three always) or lean.",
)
@click.option("--face-index", type=int, help="Which face, largest first [0].")
@click.option(
    "--channel-order",
    type=click.Choice(["bgr", "rgb"]),
    default="bgr",
    show_default=True,
    help="Order in which CLIP sees the face; bgr as published.",
)
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Rows per UNet call; bounds memory.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Folder, or for a single picture a file: .png, .jpg or .webp.",
)
@click.option(
    "--format",
    "wanted",
    type=click.Choice(["png", "jpeg", "webp"]),
    help="Of the pictures' files [the suffix of --out, or png].",
)
@click.option(
    "--quality", type=click.IntRange(0, 100), help=f"Of JPEG and WebP, 0 to 100 [{QUALITY}]."
)
@click.option("--grid", is_flag=True, help="Also write a contact sheet, grid.png.")
@click.option(
    "--no-ai-mark", is_flag=True, help="Leave out the machine-readable AI-generated mark."
)
@click.option("--no-build", is_flag=True, help="Stop when an engine is missing, build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print files and numbers as JSON.")
@licence_option
def generate(
    export_folder: str,
    backend: str,
    cache: Path | None,
    threads: int | None,
    provider_options: dict[str, str] | None,
    faces: tuple[str, ...],
    prompts: tuple[str, ...],
    presets: tuple[str, ...],
    count: int,
    face_index: int | None,
    channel_order: str,
    max_rows: int,
    out: Path,
    wanted: str | None,
    quality: int | None,
    grid: bool,
    no_ai_mark: bool,
    no_build: bool,
    as_json: bool,
    accept_licence: bool,
    **given: Any,
) -> None:
    """Make pictures of the person in FACE as PROMPT says, for every face, prompt and preset."""
    screen = console()
    line = timed_lines(screen)
    form = picture_format(out, wanted)
    if quality is not None and form == "png":
        raise InvalidRequest("A PNG has no --quality.", "Add --format jpeg or --format webp.")
    made = len(faces) * len(prompts) * len(presets) * count
    if out.suffix.lower() in FORMATS and (made > 1 or grid):
        raise InvalidRequest(
            f"--out {out} is one file, and {made + grid} pictures are asked for.",
            "Give a folder.",
        )
    with (
        passing_phases(screen, line) as phase,
        FastFace.load(
            export_folder,
            backend=backend,
            cache=cache,
            threads=threads,
            engine_options=engine_options(provider_options=provider_options),
            build=not no_build,
            licence_acknowledged=accept_licence,
            progress=phase,
        ) as fastface,
    ):
        jobs = [
            (face, prompt, preset, index)
            for face in faces
            for prompt in prompts
            for preset in presets
            for index in range(count)
        ]
        values = {
            name.replace("am_", "manipulation."): value
            for name, value in given.items()
            if value is not None
        }
        requests = [
            parse_request(
                values | {"prompt": prompt, "preset": preset, "image_index": index},
                fastface.manifest,
                spelling=OPTIONS,
            )
            for _, prompt, preset, index in jobs
        ]
        pictures = {face: load_picture(face) for face in faces}
        found = {face: fastface.analyze(pictures[face], index=face_index) for face in faces}
        said = {face: one.warning for face, one in found.items() if one.warning}
        for face, warning in said.items():  # now, with the file's name, and not after the pictures
            line(f"{face}: {warning}", "yellow")

        def on_step(trace: StepTrace) -> None:
            if trace.index == len(jobs) - 1:
                phase(f"step {trace.step + 1} of {trace.steps}")

        files = _paths(out, jobs, given["seed"], form)
        with PictureWriter() as writer:

            def on_picture(index: int, image: Image.Image, parameters: Mapping[str, Any]) -> None:
                path = files[index]
                with storage_errors(path.parent):
                    path.parent.mkdir(parents=True, exist_ok=True)
                writer.write(
                    path,
                    np.asarray(image),
                    parameters=parameters,
                    ai_generated=not no_ai_mark,
                    quality=quality,
                )

            result = fastface.generate(
                requests,
                [found[face] for face, *_ in jobs],
                channel_order="rgb" if channel_order == "rgb" else "bgr",
                max_rows=max_rows,
                on_step=on_step,
                on_picture=on_picture,
            )
    if grid:
        files.append(_write_grid(out, jobs, pictures, result, not no_ai_mark))
    for warning in result.warnings:
        if warning in said.values():
            continue
        line(warning, "yellow")
    _say(files, result, as_json, line)


def _say(files: list[Path], result: GenerationResult, as_json: bool, line: Any) -> None:
    if as_json:
        numbers = {
            "files": [str(f) for f in files],
            "seconds": dict(result.seconds),
            "unet_samples": result.unet_samples,
            "branches": result.branches,
            "warnings": result.warnings,
        }
        click.echo(json.dumps(numbers, indent=2))
        return
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in result.seconds.items())
    line(f"{len(result.images)} pictures, {result.unet_samples} UNet samples: {stages}")
    for file in files:
        click.echo(str(file))


def _name(text: str, length: int = 40) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].rstrip("-") or "picture"


def _paths(
    out: Path, jobs: list[tuple[str, str, str, int]], seed: int, form: PictureFormat
) -> list[Path]:
    """Where each picture goes."""
    if out.suffix.lower() in FORMATS:
        return [out]
    suffix = next(suffix for suffix, known in FORMATS.items() if known == form)
    files: list[Path] = []
    for face, prompt, preset, index in jobs:
        stem = f"{_name(Path(face).stem)}_{_name(prompt)}_{preset}_{seed}"
        path = out / f"{stem}{f'-{index}' if index else ''}{suffix}"
        number = 2
        while path in files:  # two prompts may shorten to one name
            path = out / f"{stem}-{index}_{number}{suffix}"
            number += 1
        files.append(path)
    return files


def _write_grid(
    out: Path,
    jobs: list[tuple[str, str, str, int]],
    pictures: Mapping[str, Any],
    result: GenerationResult,
    ai_generated: bool,
) -> Path:
    per_face: dict[str, list[Image.Image]] = {}
    labels: list[str] = []
    presets = {preset for _, _, preset, _ in jobs}
    for (face, prompt, preset, _), image in zip(jobs, result.images, strict=True):
        per_face.setdefault(face, []).append(image)
        if face == jobs[0][0]:
            labels.append(f"{prompt} [{preset}]" if len(presets) > 1 else prompt)
    sheet = contact_sheet(
        list(per_face.values()),
        column_labels=labels,
        cell=max(160, min(512, result.images[0].width)),
        first_column=[_square(pictures[face]) for face in per_face],
    )
    path = out / "grid.png"
    write_picture(
        path,
        np.asarray(sheet),
        parameters={"pictures": list(result.parameters)},
        ai_generated=ai_generated,
    )
    return path


def _square(picture: np.ndarray[Any, Any]) -> Image.Image:
    """The middle square of a picture, for the column of faces."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return Image.fromarray(picture[top : top + side, left : left + side])
