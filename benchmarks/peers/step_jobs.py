"""One UNet step in a process of its own: what `full_width` starts, one after the other.

`python -m benchmarks.peers.step_jobs JOB.json`. A job names what to do (`pytorch`, `export`,
`build`, `engine`), the model, and a folder where results and tensors go. A process per job, because
each needs the memory that the one before it had.

Shape legend: B rows, C latent channels, h × w latent size, T image tokens.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.measure.memory import GB, peak_bytes
from fastface_trt.runtime.presets import scale_power

TOKENS, TEXT_POSITIONS = 4, 77
IP_SCALE = 0.8
Inputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Job:
    """kind: pytorch, export, build or engine. model: `full-size` (random weights of a fixed seed)
    or `mini`. side: of the latents. folder: for what is written. name: of the result file.
    export: folder of an export whose UNet to run; empty for the one that `export` makes.
    """

    kind: str
    name: str
    model: str
    side: int
    folder: str
    repeats: int
    rows: tuple[int, ...] = (3, 2)
    export: str = ""

    def write(self) -> Path:
        """The job as a file for the process that does it."""
        path = Path(self.folder) / f"{self.name}.{self.kind}.job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @property
    def result(self) -> Path:
        """Where its numbers go."""
        return Path(self.folder) / f"{self.name}.{self.kind}.json"

    @property
    def prediction(self) -> Path:
        """Where the noise prediction of the largest call goes, [B,C,h,w]."""
        return Path(self.folder) / f"{self.name}.npy"


def make_inputs(rows: int, side: int, text_width: int, pooled_width: int) -> Inputs:
    """Inputs of one request at the first of four steps with preset am1+dcg; the same everywhere."""
    rng = np.random.default_rng(7)
    most = 3

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal((most, *shape), np.float32)[most - rows :]

    pixels = 8.0 * side
    return {
        contract.SAMPLE: normal(4, side, side),
        contract.TIMESTEP: np.full(rows, 999, np.float32),
        contract.TEXT: normal(TEXT_POSITIONS, text_width),
        contract.POOLED_TEXT: normal(pooled_width),
        contract.TIME_IDS: np.tile(np.float32([pixels, pixels, 0, 0, pixels, pixels]), (rows, 1)),
        contract.IMAGE_TOKENS: normal(TOKENS, text_width),
        contract.IP_ADAPTER_SCALE: np.full((1, len(contract.PARTS)), IP_SCALE, np.float32),
        contract.MANIPULATION: scale_power().rows(0, 4)[None],
    }


def make_unet(model: str) -> Any:
    """The UNet in float32, with the export's processors attached."""
    import torch

    from fastface_trt.checkpoints import find_checkpoint
    from fastface_trt.export.full_size import random_unet
    from fastface_trt.export.options import ExportOptions
    from fastface_trt.export.weights import CheckpointWeights

    if model == "full-size":
        return random_unet(torch.float32)
    return CheckpointWeights(ExportOptions(find_checkpoint(model))).unet()


def measure(call: Callable[[int], object], rows: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds of calls with so many rows, in turn, after one call of each."""
    for count in rows:
        call(count)
    seconds: dict[str, list[float]] = {str(count): [] for count in rows}
    for _ in range(repeats):
        for count in rows:
            started = perf_counter()
            call(count)
            seconds[str(count)].append(perf_counter() - started)
    return {"seconds": seconds}


def run_pytorch(job: Job) -> dict[str, Any]:
    """Time the eager PyTorch peer's UNet."""
    import torch

    from benchmarks.peers import attention

    unet = make_unet(job.model).eval().requires_grad_(False)
    attention.attach(unet)
    attention.configure(unet, scale_power(), [IP_SCALE] * len(contract.PARTS))
    widths = _widths(unet.config)
    inputs = {
        rows: {k: torch.from_numpy(v) for k, v in make_inputs(rows, job.side, *widths).items()}
        for rows in job.rows
    }

    @torch.no_grad()
    def call(rows: int) -> NDArray[Any]:
        given = inputs[rows]
        prediction = unet(
            given[contract.SAMPLE],
            given[contract.TIMESTEP],
            given[contract.TEXT],
            added_cond_kwargs={
                "text_embeds": given[contract.POOLED_TEXT],
                "time_ids": given[contract.TIME_IDS],
            },
            cross_attention_kwargs={
                "image_tokens": given[contract.IMAGE_TOKENS],
                "numbers": given[contract.MANIPULATION][0],
            },
            return_dict=False,
        )
        return np.asarray(prediction[0].numpy())

    np.save(job.prediction, call(max(job.rows)))
    return measure(call, job.rows, job.repeats) | {"threads": torch.get_num_threads()}


def run_export(job: Job) -> dict[str, Any]:
    """Export the UNet with float32 arithmetic and float16 files, unless it is there already."""
    from fastface_trt.engines.files import finished_folder
    from fastface_trt.engines.manifest import EXPORT_MANIFEST
    from fastface_trt.export.guidance_step import write_guidance_step
    from fastface_trt.export.modules import unet_export
    from fastface_trt.export.onnx_writer import write_module
    from fastface_trt.export.oracle import UNetExport

    target = Path(job.folder) / "unet"
    if (target / EXPORT_MANIFEST).is_file():
        return {}
    with finished_folder(target, EXPORT_MANIFEST) as draft:
        size = (job.side, job.side)
        export = unet_export(
            make_unet(job.model), tokens=TOKENS, latent_size=size, fixed_size=False
        )
        module = write_module(export, draft.path, fp16_storage=True)
        step = write_guidance_step(draft.path, channels=4, latent_size=size, fixed_size=False)
        draft.finish(UNetExport(module=module, guidance_step=step))
    return {}


def run_engine(job: Job) -> dict[str, Any]:
    """Build the UNet's ONNX Runtime engine, or open the one that was built and time it."""
    from fastface_trt.engines.backends import builder_for
    from fastface_trt.engines.cache import EngineCache
    from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
    from fastface_trt.export.oracle import UNetExport

    folder = Path(job.export) if job.export else Path(job.folder) / "unet"
    if job.export:
        module = read_manifest(folder / EXPORT_MANIFEST, ExportManifest).modules["unet"]
    else:
        module = read_manifest(folder / EXPORT_MANIFEST, UNetExport).module
    cache = EngineCache(Path(job.folder) / "cache")
    builder = builder_for("onnxruntime")
    if job.kind == "build":
        cache.get(module, folder, builder)
        return {}
    with cache.open(module, folder, builder) as engine:
        shapes = {tensor.name: tensor.shape for tensor in module.inputs}
        widths = int(shapes[contract.TEXT][-1]), int(shapes[contract.POOLED_TEXT][-1])
        inputs = {rows: make_inputs(rows, job.side, *widths) for rows in job.rows}
        np.save(job.prediction, engine(**inputs[max(job.rows)])[contract.NOISE_PREDICTION])
        return measure(lambda rows: engine(**inputs[rows]), job.rows, job.repeats)


def _widths(config: Any) -> tuple[int, int]:
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return config.cross_attention_dim, pooled


RUNNERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "pytorch": run_pytorch,
    "export": run_export,
    "build": run_engine,
    "engine": run_engine,
}


def main(path: str) -> None:
    """Do one job and write its numbers."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    job = Job(**values | {"rows": tuple(values["rows"])})
    started = perf_counter()
    found = RUNNERS[job.kind](job)
    facts = {
        "peak_memory_gb": round(peak_bytes() / GB, 2),
        "process_seconds": perf_counter() - started,
    }
    job.result.write_text(json.dumps(found | facts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
