"""The self-test of a machine with a GPU: what a user runs first, and sends when something is wrong.

Every backend that works here makes the same pictures as ONNX Runtime on the CPU, replays the
recorded cases of the method where they are given, and runs a full-size UNet with random weights
where one was exported. Every check says by how much it was off and how long it took.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt import __version__
from fastface_trt.builders import make_builder
from fastface_trt.engines import contract
from fastface_trt.engines.backends import probe_backends
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Engine, Progress
from fastface_trt.engines.hardware import cpu_hardware, cuda_driver, cuda_hardware
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import FastFaceError, MissingDependency
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.pipeline import FastFace
from fastface_trt.replay import Recording, replay
from fastface_trt.runtime.presets import PRESETS

REFERENCE = "onnxruntime"
TOLERANCE: dict[str, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2}
"""Relative L2 error of a UNet's output against ONNX Runtime on the CPU, by precision. Quantised
UNets are judged by pictures, not by this."""
PICTURE_TOLERANCE = 2e-2
"""Relative L2 error of a picture: four steps of guidance multiply the UNet's own."""

_PROMPT = "photo; person in a garden, smiling"
_SEED = 5
_RUNS = 10


@dataclass(frozen=True)
class Check:
    """One thing that was tried on one backend: whether it held, in words, and its numbers."""

    backend: str
    name: str
    passed: bool
    detail: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SelfTest:
    """What to test: `full_size` is an export's folder, `recording` a folder with recorded cases."""

    backends: Sequence[str]
    cache: EngineCache
    full_size: Path | None = None
    recording: Path | None = None
    progress: Progress = lambda line: None

    def run(self) -> list[Check]:
        """Every check of every backend; a backend that fails one is still asked for the next."""
        return list(self._checks())

    def report(self, checks: Sequence[Check]) -> dict[str, Any]:
        """The checks with the machine and the versions, for a JSON file."""
        return {
            "fastface_trt": __version__,
            "machine": cpu_hardware() | cuda_hardware() | cuda_driver(),
            "backends": [asdict(status) for status in probe_backends()],
            "checks": [asdict(check) for check in checks],
        }

    def _checks(self) -> Iterator[Check]:
        pictures = self._pictures(REFERENCE)[0]
        for backend in self.backends:
            yield self._guarded(backend, "mini model", lambda b=backend: self._mini(b, pictures))
            if self.recording is not None:
                yield self._guarded(backend, "recorded cases", lambda b=backend: self._replay(b))
            if self.full_size is not None:
                yield from self._full_size(backend, self.full_size)

    def _guarded(self, backend: str, name: str, check: Callable[[], Check]) -> Check:
        self.progress(f"{backend}: {name}")
        try:
            return check()
        except FastFaceError as error:
            return Check(backend, name, False, str(error))

    def _pictures(self, backend: str) -> tuple[dict[str, NDArray[np.float32]], dict[str, float]]:
        """A picture per preset as float32 [H,W,3] in [0, 1], and the seconds that matter."""
        started = perf_counter()
        with FastFace.load(
            "mini", backend=backend, cache=self.cache.root, progress=self.progress
        ) as fastface:
            fastface.warm_up()
            seconds = {"load_seconds": perf_counter() - started}
            face = fastface.analyze(next(iter(sorted(SAMPLE_FACES.glob("*.png")))))
            pictures = {
                preset: np.asarray(
                    fastface(_PROMPT, face, preset=preset, seed=_SEED).images[0], dtype=np.float32
                )
                / 255
                for preset in PRESETS
            }
            times = [
                fastface(_PROMPT, face, preset="am1+dcg", seed=_SEED).seconds["total"]
                for _ in range(_RUNS)
            ]
        return pictures, seconds | {"picture_seconds_median": statistics.median(times)}

    def _mini(self, backend: str, expected: dict[str, NDArray[np.float32]]) -> Check:
        pictures, seconds = self._pictures(backend)
        errors = {f"error_{name}": relative_l2(pictures[name], expected[name]) for name in expected}
        worst = max(errors.values())
        return Check(
            backend,
            "mini model",
            worst <= PICTURE_TOLERANCE,
            f"{len(pictures)} presets, worst picture {worst:.1e} off (tolerance "
            f"{PICTURE_TOLERANCE:.0e}), {seconds['picture_seconds_median']:.3f} s a picture",
            errors | seconds,
        )

    def _replay(self, backend: str) -> Check:
        assert self.recording is not None
        files = self.recording / "cases.json", self.recording / "tensors.safetensors"
        recorded = Recording(*files).tensors
        with TemporaryDirectory() as folder:
            written = replay(
                model=self.recording / "model",
                cases=files[0],
                tensors=files[1],
                out=Path(folder) / "replayed.safetensors",
                backend=backend,
                cache=self.cache,
                progress=self.progress,
            )
        errors = {
            name: relative_l2(tensor, recorded[name])
            for name, tensor in written.items()
            if name.endswith("latents")
        }
        name, worst = max(errors.items(), key=lambda item: item[1])
        tolerance = 2 * TOLERANCE["fp32"]
        return Check(
            backend,
            "recorded cases",
            worst <= tolerance,
            f"{len(errors)} steps, worst {worst:.1e} off at {name} (tolerance {tolerance:.0e})",
            {"error": worst},
        )

    def _full_size(self, backend: str, folder: Path) -> Iterator[Check]:
        """One UNet call per number of branches, compared on the smallest, timed on all."""
        manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest)
        spec = manifest.modules["unet"]
        engines: dict[str, Engine] = {}

        def engine(name: str) -> Engine:
            if name not in engines:
                builder = make_builder(manifest, name, cache=self.cache)
                engines[name] = self.cache.open(spec, folder, builder, self.progress)
            return engines[name]

        def check(branches: int) -> Check:
            inputs = example_inputs(manifest, branches)
            times = []
            for _ in range(_RUNS):
                started = perf_counter()
                output = predict(engine(backend), inputs)
                times.append(perf_counter() - started)
            numbers = {"unet_seconds_median": statistics.median(times)}
            passed, words = bool(np.isfinite(output).all()), "finite"
            if branches == 1 and backend != REFERENCE and manifest.precision in TOLERANCE:
                expected = predict(engine(REFERENCE), inputs)
                error = relative_l2(output, expected)
                passed = passed and error <= TOLERANCE[manifest.precision]
                words = f"{error:.1e} off (tolerance {TOLERANCE[manifest.precision]:.0e})"
                numbers["error"] = error
            seconds = numbers["unet_seconds_median"]
            return Check(backend, name, passed, f"{words}, {seconds:.3f} s a call", numbers)

        try:
            for branches in (1, 2, 3):
                name = f"full-size UNet, {branches} branches"
                yield self._guarded(backend, name, lambda count=branches: check(count))
        finally:
            for one in engines.values():
                one.close()


def relative_l2(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def predict(engine: Engine, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The UNet's noise prediction for inputs on the host, back on the host."""
    return engine.device.download(engine(**inputs)[contract.NOISE_PREDICTION])


def example_inputs(manifest: ExportManifest, branches: int) -> dict[str, NDArray[Any]]:
    """Seeded inputs of one UNet call for one request at the export's size."""
    factor = manifest.vae_scale_factor
    sizes = {
        "batch": branches,
        "requests": 1,
        "height": manifest.height // factor,
        "width": manifest.width // factor,
    }
    generator = np.random.default_rng(_SEED)
    inputs = {
        tensor.name: generator.standard_normal(
            [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        ).astype(tensor.dtype)
        for tensor in manifest.modules["unet"].inputs
    }
    inputs[contract.TIMESTEP][:] = 499
    size = [manifest.height, manifest.width]
    inputs[contract.TIME_IDS][:] = [*size, 0, 0, *size]
    inputs[contract.IP_ADAPTER_SCALE][:] = 0.8
    # kind scale-power, s, p, quantile level, d, w, inverted first token, upper bound
    inputs[contract.MANIPULATION][:] = [1, 1.5, 1.3, 0.65, 5, 0.7, 1, 10]
    return inputs


def require_export_extra(recording: Path | None) -> None:
    """Raise `MissingDependency` when recorded cases were given and PyTorch is not there."""
    import importlib.util

    if recording is not None and importlib.util.find_spec("torch") is None:
        raise MissingDependency(
            "Replaying recorded cases exports their model first and needs torch.",
            "Install it with: pip install 'fastface-trt[export]', or leave out --recording.",
        )
