"""The mini model's picture by every peer, in one run.

`python -m benchmarks.peers` writes benchmarks/results/peers-mini.json, .md and .png. With
`--full-width` it times one UNet step of full-size SDXL instead: see `full_width`. With `--gpu` it
makes pictures of full-size SDXL on a GPU, with `--mini` of the mini model there: see `gpu`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
from rich.console import Console

from benchmarks.peers.measure import PeerResult, compare_peers
from benchmarks.peers.report import markdown, plot, table_of
from benchmarks.peers.work import Peer, Work, versions
from fastface_trt import FastFace
from fastface_trt.errors import FastFaceError
from fastface_trt.measure.machine import BUSY, describe_machine, load_average
from fastface_trt.measure.tables import print_table, text_console
from fastface_trt.mini import folders

PACKAGES = ("fastface-trt", "torch", "diffusers", "transformers", "onnxruntime", "numpy")
PRESETS = ("am1+dcg", "am2+dcg", "plain")
PROMPT, NEGATIVE_PROMPT, SEED = "photo; person in a garden, smiling", "blurry", 7

RESULTS = Path(__file__).parents[1] / "results"
FACE = folders.EXPORT.parent / "faces" / "ada.png"


def make_peers(fastface: FastFace, folder: Path, only: Sequence[str] = ()) -> list[Peer]:
    """All peers of the mini model, eager PyTorch first; `only` keeps those of these names, too."""
    from benchmarks.peers.models import TorchModels
    from benchmarks.peers.onnxruntime_plain import OnnxRuntimePlainPeer
    from benchmarks.peers.ours import FastFacePeer
    from benchmarks.peers.pytorch import CompiledPeer, DiffusersPeer, PyTorchPeer
    from fastface_trt.checkpoints import find_checkpoint
    from fastface_trt.export.options import ExportOptions
    from fastface_trt.export.sources import quiet_libraries
    from fastface_trt.export.weights import CheckpointWeights

    quiet_libraries()
    options = ExportOptions(find_checkpoint(fastface.manifest.checkpoint))
    models = TorchModels(CheckpointWeights(options), dict(fastface.manifest.scheduler))
    peers: list[Peer] = [
        PyTorchPeer(models),
        CompiledPeer(models),
        DiffusersPeer(models),
        OnnxRuntimePlainPeer(models, folder),
        FastFacePeer(fastface, "full", "fresh"),
        FastFacePeer(fastface, "full", "cached"),
        FastFacePeer(fastface, "exact", "fresh"),
        FastFacePeer(fastface, "exact", "cached"),
    ]
    return chosen(peers, only)


def chosen(peers: Sequence[Peer], only: Sequence[str]) -> list[Peer]:
    """The first peer and those named in `only`; all without names."""
    unknown = set(only) - {peer.name for peer in peers}
    if unknown:
        names = ", ".join(peer.name for peer in peers)
        raise click.BadParameter(f"{', '.join(sorted(unknown))} is none of: {names}.")
    return [peer for peer in peers if not only or peer.name in (*only, peers[0].name)]


def make_work(fastface: FastFace, preset: str, **fields: Any) -> Work:
    """The picture that is asked for, its face already analysed."""
    request = fastface.request(
        PROMPT, preset=preset, seed=SEED, negative_prompt=NEGATIVE_PROMPT, **fields
    )
    shape = fastface.manifest.latent_shape(request.height, request.width)
    return Work(preset, request, fastface.analyze(FACE), shape)


def peers_for(peers: Sequence[Peer], work: Work) -> list[Peer]:
    """The peers with something of their own to do: without guidance every plan but `exact` would
    evaluate branches that nobody needs, and with the softmask both plans are the same.
    """
    plans_differ = work.guided and not work.request.manipulation.uses_softmask
    return [peer for peer in peers if plans_differ or "-full-" not in peer.name]


def face_analysis_seconds(fastface: FastFace, rounds: int) -> float:
    """Median seconds of finding and embedding the face, which is the same code for every peer."""
    seconds = []
    for _ in range(rounds + 1):
        started = perf_counter()
        fastface.analyze(FACE)
        seconds.append(perf_counter() - started)
    return median(seconds[1:])


def report(
    tables: dict[str, list[PeerResult]],
    out: Path,
    console: Console,
    facts: dict[str, Any],
    model: str = "mini model, 96×96 pixels, 4 steps",
) -> None:
    """Print the tables and write JSON, Markdown and the plot beside each other."""
    for preset, results in tables.items():
        print_table(console, table_of(preset, results))
    machine = facts["machine"]
    named = f"{machine['processor']}, {machine['cores']} cores"
    if "gpu" in machine:
        named = f"{machine['gpu']}; {named}"
    presets = {preset: [r.to_dict() for r in results] for preset, results in tables.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts | {"presets": presets}, indent=2, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")
    what = f"One picture end to end without face analysis; {model}."
    out.with_suffix(".md").write_text(markdown(tables, f"{named}.", what), encoding="utf-8")
    subtitle = f"{model}; {named}"
    busy = facts.get("load_average_before") or 0
    if busy > BUSY:
        warning = f"Other programs ran beside this (load {busy}): measure on a quiet machine."
        console.print(warning)
        subtitle += f"; {warning[0].lower()}{warning[1:-1]}"
    plot(tables, out.with_suffix(".png"), subtitle)


@click.command(help=__doc__)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--preset", "presets", multiple=True, help="Default: am1+dcg, am2+dcg and plain.")
@click.option("--peer", "names", multiple=True, help="Only this one beside eager PyTorch; repeat.")
@click.option("--out", type=click.Path(path_type=Path), help="File [by what is compared].")
@click.option("--full-width", is_flag=True, help="One UNet step of full-size SDXL instead.")
@click.option("--int8", type=click.Path(path_type=Path), help="A Q/DQ export to add (full width).")
@click.option("--repeats", default=5, show_default=True, help="Of the full-width step.")
@click.option("--gpu", is_flag=True, help="Full-size SDXL on a GPU, random weights in float16.")
@click.option("--mini", is_flag=True, help="With --gpu: the mini model.")
@click.option("--backend", default="onnxruntime-cuda", show_default=True, help="With --gpu: ours.")
@click.option("--device", default="cuda", show_default=True, help="With --gpu: of PyTorch.")
@click.option("--cache", type=click.Path(path_type=Path), help="With --gpu: the engine cache.")
def main(
    rounds: int,
    presets: tuple[str, ...],
    names: tuple[str, ...],
    out: Path | None,
    full_width: bool,
    int8: Path | None,
    repeats: int,
    gpu: bool,
    **on_gpu: Any,
) -> None:
    """Time the peers and write the tables and the plot."""
    console = text_console()
    try:
        if gpu:
            run_gpu(out, console, rounds=rounds, presets=presets or PRESETS, names=names, **on_gpu)
        elif full_width:
            from benchmarks.peers.full_width import run_full_width

            target = out or RESULTS / "peers-full-width.json"
            run_full_width(target, console, repeats=repeats, int8=int8)
        else:
            target = out or RESULTS / "peers-mini.json"
            run_mini(target, console, rounds=rounds, presets=presets or PRESETS, names=names)
    except FastFaceError as error:
        raise click.ClickException(str(error)) from None


def run_mini(
    out: Path, console: Console, *, rounds: int, presets: Sequence[str], names: Sequence[str]
) -> dict[str, list[PeerResult]]:
    """Compare the peers on the mini model, once per preset."""
    import torch

    busy = load_average()
    with FastFace.load("mini") as fastface, tempfile.TemporaryDirectory() as folder:
        # Compiled anew, or the set-up of torch.compile would be that of an earlier run's cache.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        works = {preset: make_work(fastface, preset) for preset in presets}
        peers = make_peers(fastface, Path(folder), names)
        tables = {
            preset: compare_peers(
                peers_for(peers, work), work, rounds=rounds, progress=console.print
            )
            for preset, work in works.items()
        }
        facts = {
            "what": "one picture by every peer: same weights, noise, prompt and analysed face",
            "machine": describe_machine(),
            "versions": versions(PACKAGES),
            "python": sys.version.split()[0],
            "torch_threads": torch.get_num_threads(),
            "load_average_before": busy,
            "rounds": rounds,
            "request": {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "seed": SEED},
            "face_analysis_seconds": face_analysis_seconds(fastface, rounds),
        }
    report(tables, out, console, facts)
    return tables


def run_gpu(
    out: Path | None,
    console: Console,
    *,
    rounds: int,
    presets: Sequence[str],
    names: Sequence[str],
    mini: bool,
    backend: str,
    device: str,
    cache: Path | None,
    **fields: Any,
) -> dict[str, list[PeerResult]]:
    """Compare the peers on a GPU, once per preset; `fields` are further fields of the request.

    Raises `BackendUnavailable` without a GPU.
    """
    from benchmarks.peers import gpu
    from benchmarks.peers.equality import HALF_TOLERANCE
    from fastface_trt.bench.random_weights import random_export
    from fastface_trt.engines.cache import EngineCache
    from fastface_trt.export.sources import quiet_libraries

    gpu.require(device)
    quiet_libraries()
    store, say = EngineCache(cache), console.print
    export = folders.EXPORT if mini else random_export("hyper", "fp16", None, store, say)
    with (
        FastFace.load(export, backend=backend, cache=store.root, progress=say) as fastface,
        tempfile.TemporaryDirectory() as folder,
    ):
        fastface.warm_up()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # compiled anew: see `run_mini`
        models = gpu.make_models(fastface.manifest, export, device)
        peers = chosen(gpu.make_peers(fastface, models), names)
        works = {preset: make_work(fastface, preset, **fields) for preset in presets}
        tables = {
            preset: compare_peers(
                peers_for(peers, work),
                work,
                rounds=rounds,
                tolerance=None if fastface.manifest.precision == "fp32" else HALF_TOLERANCE,
                progress=say,
            )
            for preset, work in works.items()
        }
        request = next(iter(works.values())).request
        facts = {
            "what": "one picture by every peer: same weights, noise, prompt and analysed face",
            "machine": gpu.machine_facts(device),
            "versions": versions(("fastface-trt", "torch", "diffusers", "transformers", "numpy")),
            "python": sys.version.split()[0],
            "backend": backend,
            "rounds": rounds,
            "request": request.to_dict(),
        }
    size = f"{request.width}×{request.height} pixels, {request.steps} steps"
    model = f"{'mini model' if mini else 'full-size SDXL, random weights, float16'}, {size}"
    name = f"peers-{device}{'-mini' if mini else ''}.json".replace("cuda", "gpu")
    report(tables, out or RESULTS / name, console, facts, f"{model}, {backend}")
    return tables


if __name__ == "__main__":
    main()
