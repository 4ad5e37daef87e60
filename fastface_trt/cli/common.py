"""Options and helpers that several commands share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypeVar

import click
from rich.console import Console
from rich.text import Text

from fastface_trt.engines.engine import Progress
from fastface_trt.errors import InvalidRequest
from fastface_trt.measure.tables import text_console
from fastface_trt.runtime.request import parse_size as parse_size

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
EXPORT_HELP = (
    "An export's folder, or mini: the small model of the package (a folder of that name is ./mini)."
)


class Counts(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them, such as 1,2,4."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """A default that is a tuple already stays one."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,2,4.", param, ctx)


def console() -> Console:
    """Where progress goes: standard error, so that standard output stays for results."""
    return text_console(stderr=True)


class TimedLine(Protocol):
    """A progress callback: prints a line, in a `style` of rich's."""

    def __call__(self, text: str, style: str = "") -> None: ...


def timed_lines(out: Console) -> TimedLine:
    """A progress callback that prints each phase with the seconds since the command started."""
    started = perf_counter()

    def line(text: str, style: str = "") -> None:
        seconds = Text(f"{perf_counter() - started:7.1f} s", "dim")
        out.print(Text.assemble(seconds, "  ", (text, style)), soft_wrap=not out.is_terminal)

    return line


@contextmanager
def passing_phases(out: Console, line: Progress) -> Iterator[Progress]:
    """A progress callback for phases that matter only while they last.

    On a terminal they share one line that disappears; elsewhere they are ordinary lines.
    """
    if not out.is_terminal:
        yield line
        return
    with out.status("") as status:
        yield lambda text: status.update(Text(text))


def backend_options(command: Command) -> Command:
    """`--export`, `--backend`, `--cache` and `--threads`."""
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads per module."),
        click.option("--cache", type=FOLDER, help="Engine cache folder [FASTFACE_CACHE]."),
        click.option(
            "--backend",
            default="onnxruntime",
            show_default=True,
            help="onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx, …; `doctor` shows which "
            "work here.",
        ),
        click.option(
            "--export",
            "export_folder",
            default="mini",
            show_default=True,
            metavar="FOLDER",
            help=EXPORT_HELP,
        ),
    ):
        command = option(command)
    return command


def provider_option(command: Command) -> Command:
    """`--provider-option KEY=VALUE`, as a dict in `provider_options`; None without any."""

    def pairs(context: Any, parameter: Any, values: tuple[str, ...]) -> dict[str, str] | None:
        for value in values:
            if "=" not in value:
                raise InvalidRequest(
                    f"--provider-option is {value!r}.",
                    "Write KEY=VALUE, e.g. cudnn_conv_algo_search=EXHAUSTIVE.",
                )
        return dict(value.split("=", 1) for value in values) or None

    return click.option(
        "--provider-option",
        "provider_options",
        multiple=True,
        metavar="KEY=VALUE",
        callback=pairs,
        help="onnxruntime-cuda: an option of ONNX Runtime's CUDA provider, such as use_tf32=1 "
        "(repeatable).",
    )(command)


def engine_options(**given: Any) -> dict[str, Any] | None:
    """What `FastFace.load` takes for the options that were given; None where none was."""
    return {name: value for name, value in given.items() if value is not None} or None


def licence_option(command: Command) -> Command:
    """`--accept-licence`."""
    return click.option(
        "--accept-licence",
        is_flag=True,
        envvar="FASTFACE_ACCEPT_LICENCES",
        help="You have read and accept the licences of downloaded face models "
        "(InsightFace packs: non-commercial research).",
    )(command)
