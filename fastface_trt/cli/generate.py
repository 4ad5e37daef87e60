"""`generate`: faces and prompts in, pictures out."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from fastface_trt.engines.engine import Progress
from fastface_trt.errors import FastFaceError, InvalidRequest
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.face import ChannelOrder, one_person
from fastface_trt.runtime.images import contact_sheet, load_picture
from fastface_trt.runtime.picture_file import (
    QUALITY,
    Destination,
    PictureWriter,
    add_picture,
    encode_picture,
    picture_format,
)
from fastface_trt.runtime.picture_names import FIELDS, name_fields
from fastface_trt.runtime.pipeline import FastFace, GenerationResult
from fastface_trt.runtime.request import check_pictures, parse_request
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
    "strength_for_tokens": "--strength-for-tokens",
}
"""How the fields of a request are spelled here."""

STANDARD_OUTPUT = Path("-")
Person = tuple[str, ...]
"""The files that show one person."""

Job = tuple[Person, str, str, int]
"""Person, prompt, preset, and which of a seed's pictures."""


@click.command()
@backend_options
@provider_option
@click.option(
    "--face",
    "faces",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Picture with the face (repeatable): of another person each, or with a FaceID-Portrait "
    "export of the same one.",
)
@click.option(
    "--people",
    is_flag=True,
    help="With a FaceID-Portrait export too: every --face is another person.",
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
@click.option(
    "--strength-for-tokens/--no-strength-for-tokens",
    default=None,
    help="With a FaceID-Portrait export: the scale of scale-power, which is for 4 image tokens, is "
    "adjusted to as many as there are [on].",
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
    help="Rows per UNet call; bounds memory. So many pictures are made at a time, then written.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Folder, in which no file is replaced; or for a single picture a file (.png, .jpg or "
    ".webp), or - for standard output.",
)
@click.option(
    "--name",
    "template",
    metavar="TEMPLATE",
    help="Names of the files in the folder, such as '{face}-{seed}'; fields: "
    f"{', '.join(FIELDS)} [all but steps].",
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
    people: bool,
    prompts: tuple[str, ...],
    presets: tuple[str, ...],
    count: int,
    face_index: int | None,
    channel_order: str,
    max_rows: int,
    out: Path,
    template: str | None,
    wanted: str | None,
    quality: int | None,
    grid: bool,
    no_ai_mark: bool,
    no_build: bool,
    as_json: bool,
    accept_licence: bool,
    **given: Any,
) -> None:
    """Make pictures of the person in FACE as PROMPT says, for every person, prompt and preset."""
    screen = console()
    line = timed_lines(screen)
    if quality is not None and picture_format(out, wanted) == "png":
        raise InvalidRequest("A PNG has no --quality.", "Add --format jpeg or --format webp.")
    manifest = Export.open(export_folder).manifest
    together = manifest.max_faces > 1 and not people
    persons: list[Person] = [faces] if together else [(face,) for face in faces]
    check_pictures(manifest, len(persons[0]))
    jobs = [
        (person, prompt, preset, index)
        for person in persons
        for prompt in prompts
        for preset in presets
        for index in range(count)
    ]
    if out == STANDARD_OUTPUT:
        _check_standard_output(len(jobs) + grid, as_json, template)
        place = Destination.of("picture", count=1, format=wanted)
    else:
        place = Destination.of(out, count=len(jobs) + grid, format=wanted, template=template)
        place.check()
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
        analysed = {face: fastface.analyze(pictures[face], index=face_index) for face in faces}
        found = {person: one_person([analysed[face] for face in person]) for person in persons}
        said = {face: one.warning for face, one in analysed.items() if one.warning}
        for face, warning in said.items():  # now, with the file's name, and not after the pictures
            line(f"{face}: {warning}", "yellow")

        order: ChannelOrder = "rgb" if channel_order == "rgb" else "bgr"
        results: list[GenerationResult] = []
        encoded = b""
        # Few at a time, and as many as can share a UNet call: what is made is written soon.
        groups = [slice(first, first + max_rows) for first in range(0, len(jobs), max_rows)]
        group = groups[0]

        def on_step(trace: StepTrace) -> None:
            last = min(group.stop, len(jobs))
            if group.start + trace.index == last - 1:
                some = f"pictures {group.start + 1} to {last} of {len(jobs)}, "
                step = f"step {trace.step + 1} of {trace.steps}"
                phase(some + step if len(groups) > 1 else step)

        def on_picture(index: int, image: Image.Image, parameters: Mapping[str, Any]) -> None:
            nonlocal encoded
            pixels, mark = np.asarray(image), not no_ai_mark
            if out == STANDARD_OUTPUT:
                encoded = encode_picture(
                    pixels,
                    parameters=parameters,
                    ai_generated=mark,
                    format=place.format,
                    quality=quality,
                )
                return
            person, _, preset, _ = jobs[group.start + index]
            fields = name_fields(
                parameters,
                face=Path(person[0]).stem,
                preset=preset,
                hash=fastface.picture_hash(parameters, found[person], order),
            )
            place.write(
                writer, fields, pixels, parameters=parameters, ai_generated=mark, quality=quality
            )

        with _telling_what_is_left(len(jobs), out, line) as writer:
            for group in groups:
                result = fastface.generate(
                    requests[group],
                    [found[person] for person, *_ in jobs[group]],
                    channel_order=order,
                    max_rows=max_rows,
                    on_step=on_step,
                    on_picture=on_picture,
                )
                results.append(result if grid else replace(result, images=[]))
        warnings = fastface.warnings(requests, list(found.values()))
    files = writer.written
    if grid:
        sheet = _contact_sheet(jobs, pictures, [one for r in results for one in r.images])
        made = [told for r in results for told in r.parameters]
        files.append(
            add_picture(
                out / "grid.png",
                np.asarray(sheet),
                parameters={"pictures": made},
                ai_generated=not no_ai_mark,
            )
        )
    for warning in warnings:
        if warning in said.values():
            continue
        line(warning, "yellow")
    _say(files, len(jobs), results, warnings, as_json, line)
    if out == STANDARD_OUTPUT:
        sys.stdout.buffer.write(encoded)


def _check_standard_output(count: int, as_json: bool, template: str | None) -> None:
    if count != 1:
        raise InvalidRequest(
            f"--out - takes one picture, and {count} are asked for.", "Give a folder."
        )
    if as_json or template is not None:
        other = "--json" if as_json else "--name"
        raise InvalidRequest(
            f"--out - writes the picture to standard output, and {other} does not go with it.",
            f"Leave out {other}, or give a file or a folder.",
        )
    if sys.stdout.isatty():
        raise InvalidRequest(
            "A picture is no text for a terminal.", "Redirect it: --out - > picture.png"
        )


@contextmanager
def _telling_what_is_left(count: int, out: Path, line: Progress) -> Iterator[PictureWriter]:
    """A writer; where the block is stopped or fails, one line says how much was written."""
    writer = PictureWriter()
    try:
        with writer:
            yield writer
    except (KeyboardInterrupt, FastFaceError) as stop:
        told = f"{len(writer.written)} of {count} pictures are in {out}"
        if writer.written and isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt(f"Stopped: {told}; nothing half-made was left.") from None
        if writer.written:
            line(f"{told}.")
        raise


def _say(
    files: Sequence[Path],
    count: int,
    results: Sequence[GenerationResult],
    warnings: list[str],
    as_json: bool,
    line: Progress,
) -> None:
    seconds: Counter[str] = Counter()
    for result in results:
        seconds.update(result.seconds)
    samples = sum(result.unet_samples for result in results)
    if as_json:
        numbers = {
            "files": [str(f) for f in files],
            "seconds": dict(seconds),
            "unet_samples": samples,
            "branches": [branches for result in results for branches in result.branches],
            "warnings": warnings,
        }
        click.echo(json.dumps(numbers, indent=2))
        return
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    line(f"{count} pictures, {samples} UNet samples: {stages}")
    for file in files:
        click.echo(str(file))


def _contact_sheet(
    jobs: Sequence[Job], pictures: Mapping[str, Any], images: Sequence[Image.Image]
) -> Image.Image:
    per_person: dict[Person, list[Image.Image]] = {}
    labels: list[str] = []
    presets = {preset for _, _, preset, _ in jobs}
    for (person, prompt, preset, _), image in zip(jobs, images, strict=True):
        per_person.setdefault(person, []).append(image)
        if person == jobs[0][0]:
            labels.append(f"{prompt} [{preset}]" if len(presets) > 1 else prompt)
    return contact_sheet(
        list(per_person.values()),
        column_labels=labels,
        cell=max(160, min(512, images[0].width)),
        first_column=[_square(pictures[person[0]]) for person in per_person],
    )


def _square(picture: np.ndarray[Any, Any]) -> Image.Image:
    """The middle square of a picture, for the column of faces."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return Image.fromarray(picture[top : top + side, left : left + side])
