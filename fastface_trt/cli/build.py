"""`build`: make the engines of an export before they are needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fastface_trt.builders import make_builder
from fastface_trt.cli.build_display import build_display
from fastface_trt.cli.common import (
    FILE,
    Counts,
    backend_options,
    console,
    parse_size,
    provider_option,
    timed_lines,
)
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.engines.relatives import expected_seconds
from fastface_trt.engines.tensorrt.options import DynamicProfile
from fastface_trt.errors import InvalidRequest, UnknownName
from fastface_trt.export_folder import find_export


@click.command()
@backend_options
@provider_option
@click.option("--module", "modules", multiple=True, help="Only this module (repeatable).")
@click.option(
    "--optimization",
    type=click.Choice(["all", "extended", "basic"]),
    help="ONNX Runtime: how far the graph is optimised; extended keeps fp16 weights fp16 on a CPU.",
)
@click.option("--requests", type=Counts(), help="Requests per UNet call to build for [1].")
@click.option("--branches", type=Counts(), help="Branches per request to build for [1,2,3].")
@click.option(
    "--size", "sizes", multiple=True, help="WIDTHxHEIGHT in pixels, repeatable [the export's]."
)
@click.option(
    "--dynamic",
    metavar="WxH..WxH",
    help="One more profile for every size in this range; slower than a fixed one.",
)
@click.option("--max-requests", type=int, help="Largest number of requests of --dynamic [4].")
@click.option(
    "--optimization-level", type=click.IntRange(0, 5), help="TensorRT: 0 builds fast, 5 runs fast."
)
@click.option("--tiling", type=click.Choice(["none", "fast", "moderate", "full"]))
@click.option("--workspace-gb", type=float, help="Memory that a kernel may use for itself, in GB.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="TensorRT-RTX: a GPU generation such as sm89, repeatable [all].",
)
@click.option("--version-compatible", is_flag=True, default=None, help="For newer versions too.")
@click.option(
    "--hardware-compatible", is_flag=True, default=None, help="For every GPU from Ampere on."
)
@click.option(
    "--same-compute-capability",
    is_flag=True,
    default=None,
    help="TensorRT: for every GPU of this one's compute capability.",
)
@click.option("--max-tactics", type=int, help="Kernels to time where there is a choice.")
@click.option("--l2-limit-mb", type=float, help="L2 cache that --tiling may count on, in MB.")
@click.option("--max-aux-streams", type=int, help="Streams beside the caller's; 0 for none.")
@click.option(
    "--build-route", metavar="SETTINGS", help="TensorRT: -name=value settings of its compiler."
)
@click.option(
    "--editable-timing-cache",
    is_flag=True,
    default=None,
    help="TensorRT: measure by keys that `cache tactics` lists (not run on a GPU so far).",
)
@click.option(
    "--tactic",
    "tactics",
    multiple=True,
    metavar="KEY=HASH",
    help="TensorRT: build this tactic for that key of the editable timing cache, repeatable.",
)
@click.option(
    "--weight-streaming", is_flag=True, default=None, help="Weights may stay in host memory."
)
@click.option("--tf32", is_flag=True, default=None, help="Round float32 products to TF32.")
@click.option("--refittable", is_flag=True, default=None, help="`refit` can change the weights.")
@click.option(
    "--strip-weights", is_flag=True, default=None, help="Leave the weights out of the engine file."
)
@click.option(
    "--attention-plugin",
    is_flag=True,
    default=None,
    help="TensorRT: decoupled attention as CUDA kernels (not run on a GPU so far).",
)
@click.option("--log", type=FILE, help="Write every event as a line of JSON to this file.")
def build(
    export_folder: str,
    backend: str,
    cache: Path | None,
    threads: int | None,
    modules: tuple[str, ...],
    log: Path | None,
    **given: Any,
) -> None:
    """Build the engines of an export into the cache; `generate` then starts without building.

    TensorRT-RTX builds on a machine without a GPU too, for machines with one. Ctrl-C stops a build
    at once and leaves nothing half-made.
    """
    folder = find_export(export_folder)
    manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest)
    for name in modules:
        if name not in manifest.modules:
            raise UnknownName("module", name, manifest.modules)
    store = EngineCache(cache)
    screen = console()
    line = timed_lines(screen)
    with build_display(screen, log) as display:
        builder = make_builder(
            manifest,
            backend,
            threads=threads,
            options=build_options(given, manifest.vae_scale_factor),
            cache=store,
            on_event=display.event,
        )
        for name in modules or manifest.modules:
            module = manifest.modules[name]
            seconds = expected_seconds(store.entries(), module, builder.identity(module))
            display.start_module(name, seconds)
            engine, place = store.get(module, folder, builder, line)
            size = sum(f.bytes for f in engine.files) / 2**20
            facts = {"megabytes": size, "seconds": engine.build_seconds, "folder": str(place)}
            display.end_module(name, facts | engine.report.model_dump(mode="json"))
            line(f"{name}: {size:.1f} MB, built in {engine.build_seconds:.1f} s")
            click.echo(str(place))


def build_options(given: Mapping[str, Any], scale_factor: int) -> dict[str, Any]:
    """A builder's options from what was given on the command line, nothing else.

    Sizes become latent sizes (height, width) through the VAE's pixels per latent.
    """
    options = {
        name: value
        for name, value in given.items()
        if value not in (None, ()) and name not in ("sizes", "dynamic", "max_requests")
    }
    if given["sizes"]:
        options["latent_sizes"] = tuple(_latents(size, scale_factor) for size in given["sizes"])
    if given["dynamic"]:
        smallest, dots, largest = given["dynamic"].partition("..")
        if not dots:
            raise InvalidRequest(
                f"--dynamic is {given['dynamic']!r}.", "Write e.g. 512x512..1024x1024."
            )
        options["dynamic"] = DynamicProfile.checked(
            smallest=_latents(smallest, scale_factor),
            largest=_latents(largest, scale_factor),
            max_requests=given["max_requests"] or 4,
        )
    return options


def _latents(size: str, scale_factor: int) -> tuple[int, int]:
    width, height = parse_size(size)
    if width % scale_factor or height % scale_factor:
        raise InvalidRequest(
            f"{size} does not fit the model.",
            f"Width and height must be multiples of {scale_factor} pixels.",
        )
    return height // scale_factor, width // scale_factor
