"""Train the whole mini model: `python -m tools.mini_model.train --work DIR --out DIR`.

Every stage keeps a checkpoint in the work folder; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.multiprocessing.spawn import spawn

from .adapter import Adapter
from .assets import draw_sample_faces, save_adapter, save_checkpoint, save_face_models
from .data import JUDGE, TRAIN, Portraits, build_population, open_population
from .decoder import refine_decoder
from .detector import train_detector
from .diffusion import Latents, TextTable, load_text, prepare_latents
from .image_encoder import save_image_encoder, train_image_encoder
from .judges import (
    RECOGNITION,
    RECOGNITION_HIDDEN,
    RECOGNITION_WIDTHS,
    save_judges,
    train_scene_judge,
)
from .loop import Schedule
from .recognition import Recogniser, train_recogniser
from .sources import Sources, prepare_sources
from .stages import train_adapter, train_base, train_few_step
from .text import train_text
from .vae import train_vae

RECOGNISER = Schedule(steps=2000, learning_rate=2e-3, warmup=100)
RECOGNISER_WIDTHS = (24, 48, 80, 96)
RECOGNISER_HIDDEN = 96


def recogniser_stage(work: Path, seed: int) -> Recogniser:
    """Train, or load, the recogniser that the product uses."""
    portraits = open_population(work / "data" / TRAIN.name)
    return train_recogniser(
        portraits,
        TRAIN.name,
        RECOGNISER_WIDTHS,
        RECOGNISER_HIDDEN,
        RECOGNISER,
        work / "recognition.pt",
        seed + 1,
    )


def diffusion_data(
    work: Path, out: Path, seed: int, last: str
) -> tuple[Latents, TextTable, Sources | None]:
    """Open what the diffusion stages up to `last` read; encodes it on the first call."""
    portraits = open_population(work / "data" / TRAIN.name)
    latents = prepare_latents(portraits, out / "checkpoint", work / "latents")
    text = load_text(out / "checkpoint", work / "text_table.pt", seed)
    if last == "base":
        return latents, text, None
    tower = train_image_encoder(portraits, TRAIN.name, work, seed + 3)
    recogniser = recogniser_stage(work, seed)
    people = int(latents.labels[:, 0].max()) + 1
    return latents, text, prepare_sources(portraits, people, recogniser, tower, work / "sources.pt")


def diffusion_stages(
    work: Path, out: Path, seed: int, last: str = "few_step"
) -> tuple[UNet2DConditionModel, Adapter | None]:
    """Train base, adapter and few-step UNet, up to and including the stage `last`."""
    latents, text, sources = diffusion_data(work, out, seed, last)
    unet = train_base(latents, text, work, seed + 4)
    if sources is None:
        return unet, None
    adapter = train_adapter(unet, latents, text, sources, work, seed + 4)
    if last == "adapter":
        return unet, adapter
    return train_few_step(unet, adapter, latents, text, sources, work, seed + 4), adapter


def _worker(rank: int, count: int, work: Path, out: Path, seed: int, last: str) -> None:
    # One thread per process: two processes with one thread each train several times faster than
    # one process with two, whose threads wait for each other at every small operation.
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # Processes that wake each other are moved to one core, and leave the other to strangers.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    rendezvous = work / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    diffusion_stages(work, out, seed, last)
    dist.destroy_process_group()


def train_in_parallel(work: Path, out: Path, seed: int, processes: int, last: str) -> None:
    """Run the diffusion stages in several processes that share their gradients."""
    (work / "rendezvous").unlink(missing_ok=True)
    spawn(_worker, (processes, work, out, seed, last), nprocs=processes)


def _vae(work: Path, out: Path, seed: int) -> None:
    portraits: Portraits = open_population(work / "data" / TRAIN.name)
    train_vae(portraits, work, seed).half().save_pretrained(out / "checkpoint" / "vae")


def _decoder(work: Path, out: Path, seed: int) -> None:
    portraits = open_population(work / "data" / TRAIN.name)
    latents = prepare_latents(portraits, out / "checkpoint", work / "latents")
    vae = AutoencoderKL.from_pretrained(out / "checkpoint" / "vae")
    refine_decoder(vae, portraits, latents, work / "decoder.pt", seed + 6)
    # Loading noted where from; that path has no place in a file that is published.
    plain = AutoencoderKL.from_config({k: v for k, v in vae.config.items() if k[0] != "_"})
    plain.load_state_dict(vae.state_dict())
    plain.half().save_pretrained(out / "checkpoint" / "vae")


def _judges(work: Path, out: Path, seed: int) -> None:
    portraits = build_population(work / "data" / JUDGE.name, JUDGE)
    recogniser = train_recogniser(
        portraits,
        JUDGE.name,
        RECOGNITION_WIDTHS,
        RECOGNITION_HIDDEN,
        RECOGNITION,
        work / "judge_recognition.pt",
        seed + 1001,
    )
    scene = train_scene_judge(portraits, work / "judge_scene.pt", seed + 1002)
    save_judges(recogniser, scene, out / "judges")


def main() -> None:
    """Run the stages that are asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and drawn pictures")
    parser.add_argument("--out", type=Path, required=True, help="where the assets go")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--stages", nargs="*", default=[], help="only these; default all")
    parser.add_argument(
        "--last",
        default="few_step",
        choices=["base", "adapter", "few_step"],
        help="diffusion stage",
    )
    arguments = parser.parse_args()
    work, out, seed = arguments.work.resolve(), arguments.out.resolve(), arguments.seed
    torch.set_num_threads(1)

    def diffusion() -> None:
        train_in_parallel(work, out, seed, arguments.processes, arguments.last)

    def save() -> None:
        unet, adapter = diffusion_stages(work, out, seed, arguments.last)
        assert adapter is not None
        save_checkpoint(unet, out / "checkpoint")
        save_adapter(adapter, out)

    def image_encoder() -> None:
        portraits = open_population(work / "data" / TRAIN.name)
        tower = train_image_encoder(portraits, TRAIN.name, work, seed + 3)
        save_image_encoder(tower, out / "image_encoder")

    stages: dict[str, Callable[[], object]] = {
        "data": lambda: build_population(
            work / "data" / TRAIN.name, TRAIN, workers=arguments.processes
        ),
        "vae": lambda: _vae(work, out, seed),
        "text": lambda: train_text(out / "checkpoint", work, seed),
        "recogniser": lambda: recogniser_stage(work, seed),
        "image_encoder": image_encoder,
        "diffusion": diffusion,
        "save": save,
        "face": lambda: save_face_models(
            train_detector(work, seed + 2), recogniser_stage(work, seed), out / "face"
        ),
        "judges": lambda: _judges(work, out, seed),
        "decoder": lambda: _decoder(work, out, seed),
        "faces": lambda: draw_sample_faces(out / "faces"),
    }
    for name in arguments.stages or stages:
        print(f"stage {name}", flush=True)
        stages[name]()


if __name__ == "__main__":
    main()
