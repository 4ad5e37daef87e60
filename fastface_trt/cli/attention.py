"""`evaluate attention`: one picture with the attention maps of its image tokens."""

from pathlib import Path

import click

from fastface_trt.cli.common import FILE, FOLDER, console, licence_option, timed_lines
from fastface_trt.errors import InvalidRequest
from fastface_trt.evaluation.attention_figures import write_attention
from fastface_trt.evaluation.attention_maps import collect_attention


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InvalidRequest(f"--steps is {text!r}.", "Write step numbers: 0,1,3.") from None


@click.command("attention")
@click.option(
    "--export",
    "export_folder",
    default="mini",
    show_default=True,
    metavar="FOLDER",
    help="An export's folder, or mini.",
)
@click.option("--face", type=FILE, required=True, help="Picture with the face.")
@click.option("--prompt", required=True, help="Text.")
@click.option("--preset", default="am1", show_default=True, help="As for `generate`.")
@click.option(
    "--blocks",
    help="Which decoupled blocks, separated by commas; patterns are allowed "
    "(up_blocks.0*) [the first of down and the last of up].",
)
@click.option("--steps", "watched", help="Which steps to keep, from 0: 0,1,3 [all].")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--cache", type=FOLDER, help="Engine cache folder [FASTFACE_CACHE].")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads per module.")
@licence_option
@click.option("--out", type=FOLDER, required=True, help="Folder for figures and numbers.")
def attention(
    export_folder: str,
    face: Path,
    prompt: str,
    preset: str,
    blocks: str | None,
    watched: str | None,
    seed: int,
    cache: Path | None,
    threads: int | None,
    accept_licence: bool,
    out: Path,
) -> None:
    """Show what each image token attends to, before and after attention manipulation.

    Runs on ONNX Runtime's CPU provider with a copy of the exported UNet that also returns its
    maps; needs the export and evaluate extras. Writes the picture, figures, maps.npz and
    attention.json into the folder --out.
    """
    line = timed_lines(console())
    run = collect_attention(
        face,
        prompt,
        export=export_folder,
        preset=preset,
        blocks=[part.strip() for part in blocks.split(",")] if blocks else (),
        steps=_steps(watched),
        cache=cache,
        threads=threads,
        licence_acknowledged=accept_licence,
        progress=line,
        seed=seed,
    )
    line("Drawing")
    for file in write_attention(run, out):
        click.echo(str(file))
