"""`replay`: run recorded cases through a backend; the tool for finding where one goes wrong."""

from pathlib import Path

import click

from fastface_trt.cli.common import FILE, FOLDER, console, timed_lines
from fastface_trt.engines.cache import EngineCache
from fastface_trt.verify.replay import replay as run_replay


@click.command()
@click.option("--model", type=FOLDER, required=True, help="Folder with unet/ and an adapter file.")
@click.option(
    "--shared", type=FOLDER, help="Folder with the unet/ that the adapters of a set have in common."
)
@click.option("--cases", type=FILE, required=True, help="cases.json of the recording.")
@click.option("--tensors", type=FILE, required=True, help="safetensors file with the inputs.")
@click.option("--out", type=FILE, required=True, help="safetensors file to write.")
@click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    help="torch (eager PyTorch), or any backend that `build` knows.",
)
@click.option("--case", "names", multiple=True, help="Only this case (repeatable).")
@click.option(
    "--plan",
    type=click.Choice(["full", "exact"]),
    default="full",
    show_default=True,
    help="full: all three branches on every step; exact: the branch plan, which writes "
    "guided and latents only.",
)
@click.option("--cache", type=FOLDER, help="Engine cache folder [FASTFACE_CACHE].")
def replay(
    model: Path,
    shared: Path | None,
    cases: Path,
    tensors: Path,
    out: Path,
    backend: str,
    names: tuple[str, ...],
    plan: str,
    cache: Path | None,
) -> None:
    """Run recorded cases step by step and write CASE.stepN.model_input|eps|guided|latents."""
    written = run_replay(
        model=model,
        shared=shared,
        cases=cases,
        tensors=tensors,
        out=out,
        backend=backend,
        names=names,
        plan="exact" if plan == "exact" else "full",
        cache=EngineCache(cache),
        progress=timed_lines(console()),
    )
    click.echo(f"{out}: {len(written)} tensors")
