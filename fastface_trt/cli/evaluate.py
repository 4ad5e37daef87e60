"""`evaluate`: the paper's protocol, from people and prompts to tables.

`evaluate attention`: one picture with the attention maps of its image tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastface_trt.checkpoints import HubItem
from fastface_trt.cli.common import (
    EXPORT_HELP,
    FILE,
    FOLDER,
    backend_options,
    console,
    licence_option,
    timed_lines,
)
from fastface_trt.engines.engine import Progress as Phase
from fastface_trt.errors import InvalidRequest
from fastface_trt.evaluation.attention import collect_attention, write_attention
from fastface_trt.evaluation.data import load_dataset
from fastface_trt.evaluation.experiment import built_in, load_experiment
from fastface_trt.evaluation.judges import Judge, JudgeWeights, choose_judges, real_judges
from fastface_trt.evaluation.mini import mini_dataset, mini_judges
from fastface_trt.evaluation.runner import OnBatch, RunOptions, run_experiment
from fastface_trt.evaluation.tables import write_tables


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
    help=EXPORT_HELP,
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


MINI = "mini"
_PHASE_LENGTH = 40
_ETA_SECONDS = 300.0
"""The estimate looks back so far: settings differ in speed, and a run takes hours."""


class _RunByDefault(click.Group):
    """`evaluate EXPERIMENT …` is `evaluate run EXPERIMENT …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {*self.commands, *ctx.help_option_names}
        if args and args[0] not in known:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def evaluate() -> None:
    """Measure quality: `evaluate EXPERIMENT` runs one, by name or TOML file (see `run`).

    The same people, prompts and noise for every setting; a run that was stopped goes on where it
    was when the command is given again.
    """


@evaluate.command()
@click.argument("experiment")
@backend_options
@click.option(
    "--data",
    "source",
    default=MINI,
    show_default=True,
    metavar="FOLDER",
    help="Folder with id_photos/, prompts_nostyle.txt and prompts_style.txt; an OmniContext-like "
    "JSON file; or mini: drawn people and the mini model's judges.",
)
@click.option(
    "--prompts",
    type=click.Choice(["all", "nostyle", "style"]),
    default="all",
    show_default=True,
    help="Which of a folder's prompts.",
)
@click.option("--pairs", type=click.IntRange(min=1), help="Pairs per setting [the experiment's].")
@click.option("--all-pairs", is_flag=True, help="Every person with every prompt.")
@click.option("--out", type=FOLDER, help="Folder of the run [out/evaluation/EXPERIMENT].")
@click.option("--judges", help="Only these, e.g. id,ffc [all].")
@click.option(
    "--keep",
    default=24,
    show_default=True,
    type=click.IntRange(min=0),
    help="Pictures kept of each setting.",
)
@click.option(
    "--batch",
    default=24,
    show_default=True,
    type=click.IntRange(min=1),
    help="Pictures made at once; what a kill loses.",
)
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Rows per UNet call; bounds memory.",
)
@click.option("--report", "with_report", is_flag=True, help="Also write report.html at the end.")
@click.option("--clip", help="CLIP L/14: folder or hub id[@revision].")
@click.option("--aesthetic-head", help="LAION's aesthetic head: file.")
@click.option("--image-reward", help="ImageReward's checkpoint: name or file.")
@click.option("--judge-face-model", help="InsightFace pack or folder of the judges [buffalo_l].")
@licence_option
def run(
    experiment: str,
    export_folder: str,
    backend: str,
    cache: Path | None,
    threads: int | None,
    source: str,
    prompts: Any,
    pairs: int | None,
    all_pairs: bool,
    out: Path | None,
    judges: str | None,
    keep: int,
    batch: int,
    max_rows: int,
    with_report: bool,
    accept_licence: bool,
    **weights: str | None,
) -> None:
    """Run EXPERIMENT, a TOML file or one of the package's, and write its tables."""
    chosen = load_experiment(experiment)
    target = out or Path("out") / "evaluation" / chosen.name
    if all_pairs and pairs is not None:
        raise InvalidRequest("--pairs and --all-pairs exclude each other.", "Give one of them.")
    count = None if all_pairs else pairs or chosen.pairs
    data = mini_dataset(count) if source == MINI else load_dataset(Path(source), count, prompts)
    options = RunOptions(
        export_folder, backend, cache, threads, accept_licence, batch, max_rows, keep
    )
    names = None if judges is None else [name.strip() for name in judges.split(",")]
    jury = _mini_jury(names, weights) if source == MINI else _jury(names, weights, accept_licence)
    screen = console()
    try:
        with _progress(screen) as (phase, on_batch):
            run_experiment(chosen, data, jury, target, options, phase, on_batch)
    except KeyboardInterrupt:
        screen.print(f"{target} holds what is finished; the same command goes on from there.")
        raise
    tables_file = write_tables(target)
    click.echo(tables_file.read_text(encoding="utf-8"))
    click.echo(str(tables_file))
    if with_report:
        click.echo(str(_report(target)))


@evaluate.command()
@click.argument("out", type=FOLDER)
def tables(out: Path) -> None:
    """Write the tables of a run's folder OUT again, also while it is unfinished."""
    file = write_tables(out)
    click.echo(file.read_text(encoding="utf-8"))


@evaluate.command()
@click.argument("out", type=FOLDER)
def report(out: Path) -> None:
    """Write report.html of a run's folder OUT: plots, contact sheets and tables in one file."""
    click.echo(str(_report(out)))


@evaluate.command(name="list")
def list_experiments() -> None:
    """Show the experiments of the package."""
    for name in built_in():
        found = load_experiment(name)
        click.echo(
            f"{name:18} {len(found.expanded()):3} settings, {found.pairs:4} pairs: {found.title}"
        )


evaluate.add_command(attention)


def _report(out: Path) -> Path:
    from fastface_trt.evaluation.report import write_report

    return write_report(out)


def _mini_jury(names: list[str] | None, weights: dict[str, str | None]) -> list[Judge]:
    if any(weights.values()):
        raise InvalidRequest(
            "The mini model's data has judges of its own.",
            "Leave out the judges' weights, or give --data FOLDER.",
        )
    return choose_judges(mini_judges(), names)


def _jury(names: list[str] | None, weights: dict[str, str | None], licence: bool) -> list[Judge]:
    given = JudgeWeights()
    chosen = JudgeWeights(
        weights["judge_face_model"] or given.face_model,
        HubItem(weights["clip"]) if weights["clip"] else given.clip,
        HubItem(weights["aesthetic_head"]) if weights["aesthetic_head"] else given.aesthetic_head,
        weights["image_reward"] or given.image_reward,
    )
    return real_judges(chosen, names, licence_acknowledged=licence)


@contextmanager
def _progress(screen: Console) -> Iterator[tuple[Phase, OnBatch]]:
    """A bar over all pictures with the time that is left; elsewhere lines, one per setting."""
    if not screen.is_terminal:
        line = timed_lines(screen)
        said: set[str] = set()

        def say(setting: str, done: int, total: int) -> None:
            if setting not in said:
                said.add(setting)
                line(f"{setting or 'start'}: {done} of {total} pictures are finished")

        yield line, say
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=screen,
        speed_estimate_period=_ETA_SECONDS,
    )
    with bar:
        task = bar.add_task("", total=None)

        def show(setting: str, done: int, total: int) -> None:
            bar.update(task, total=total, completed=done, description=setting)

        yield lambda text: bar.update(task, description=text[:_PHASE_LENGTH]), show
