"""`fastface-trt`: the command group, and how errors of users reach them."""

import errno
from typing import Any

import click

from fastface_trt import __version__
from fastface_trt.cli.bench import bench
from fastface_trt.cli.build import build
from fastface_trt.cli.cache import cache
from fastface_trt.cli.demo import demo
from fastface_trt.cli.distribution import obtain, publish
from fastface_trt.cli.doctor import doctor
from fastface_trt.cli.evaluate import evaluate
from fastface_trt.cli.export import export
from fastface_trt.cli.export_triton import export_triton
from fastface_trt.cli.generate import generate
from fastface_trt.cli.inspect import inspect
from fastface_trt.cli.refit import refit_command
from fastface_trt.cli.replay import replay
from fastface_trt.cli.serve import serve
from fastface_trt.cli.verify import verify
from fastface_trt.embedding.__main__ import embedding
from fastface_trt.errors import FastFaceError

USER_ERROR, INTERRUPTED = 2, 130


class _Group(click.Group):
    """Prints a `FastFaceError` as one sentence and its hint, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FastFaceError as error:
            click.secho(f"Error: {error.message}", fg="red", err=True)
            if error.hint:
                click.echo(f"  {error.hint}", err=True)
            ctx.exit(USER_ERROR)
        except OSError as error:
            # A path of the user's that no system call takes, before anything was done with it.
            if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
                raise
            click.secho(f"Error: {error.filename!r:.200}: {error.strerror}.", fg="red", err=True)
            click.echo("  Check the path.", err=True)
            ctx.exit(USER_ERROR)
        except (KeyboardInterrupt, click.Abort) as stop:
            click.echo(str(stop) or "Stopped; nothing half-made was left.", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastface-trt")
def cli() -> None:
    """Identity-preserving few-step SDXL generation (FastFace) from exported engines.

    Start with `fastface-trt demo`, which needs no downloads: the package brings a small model.
    """


for command in (
    demo,
    generate,
    serve,
    export,
    build,
    refit_command,
    verify,
    cache,
    inspect,
    doctor,
    replay,
    export_triton,
    bench,
    evaluate,
    publish,
    obtain,
    embedding,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="fastface-trt")


if __name__ == "__main__":
    main()
