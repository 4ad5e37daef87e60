"""The self-test of a machine with a GPU: what a user runs first, and sends when something is wrong.

Every backend that works here makes the same pictures as ONNX Runtime on the CPU, replays the
recorded cases of the method where they are given, and runs a full-size UNet with random weights
where one was exported. Every check says by how much it was off and how long it took.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt import __version__
from fastface_trt.engines import contract
from fastface_trt.engines.backends import make_builder, probe_backends
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Engine, Progress
from fastface_trt.engines.hardware import cpu_hardware, cuda_driver, cuda_hardware
from fastface_trt.errors import FastFaceError, MissingDependency, install_hint
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.presets import PRESETS
from fastface_trt.verify.difference import compare
from fastface_trt.verify.inputs import module_inputs
from fastface_trt.verify.replay import Recording, replay
from fastface_trt.verify.tolerances import tolerance_for

REFERENCE = "onnxruntime"
REPLAY_TOLERANCE = 2e-3
"""Relative L2 error of latents against the recorded ones, all of it float32."""

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
            yield self._guarded(backend, "mini model", partial(self._mini, backend, pictures))
            if self.recording is not None:
                yield self._guarded(backend, "recorded cases", partial(self._replay, backend))
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
                preset: _pixels(fastface(_PROMPT, face, preset=preset, seed=_SEED).images[0])
                for preset in PRESETS
            }
            times = [
                fastface(_PROMPT, face, preset="am1+dcg", seed=_SEED).seconds["total"]
                for _ in range(_RUNS)
            ]
        return pictures, seconds | {"picture_seconds_median": statistics.median(times)}

    def _mini(self, backend: str, expected: dict[str, NDArray[np.float32]]) -> Check:
        pictures, seconds = self._pictures(backend)
        errors = {f"error_{name}": _distance(pictures[name], expected[name]) for name in expected}
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
            name: _distance(tensor, recorded[name])
            for name, tensor in written.items()
            if name.endswith("latents")
        }
        name, worst = max(errors.items(), key=lambda item: item[1])
        tolerance = REPLAY_TOLERANCE
        return Check(
            backend,
            "recorded cases",
            worst <= tolerance,
            f"{len(errors)} steps, worst {worst:.1e} off at {name} (tolerance {tolerance:.0e})",
            {"error": worst},
        )

    def _full_size(self, backend: str, folder: Path) -> Iterator[Check]:
        """One UNet call per number of branches, compared on the smallest, timed on all."""
        manifest = Export.open(folder).manifest
        spec = manifest.modules["unet"]
        engines: dict[str, Engine] = {}

        def engine(name: str) -> Engine:
            if name not in engines:
                builder = make_builder(manifest, name, cache=self.cache)
                engines[name] = self.cache.open(spec, folder, builder, self.progress)
            return engines[name]

        def check(branches: int) -> Check:
            inputs = module_inputs(spec, manifest, folder, branches=branches)
            times = []
            for _ in range(_RUNS):
                started = perf_counter()
                output = predict(engine(backend), inputs)
                times.append(perf_counter() - started)
            numbers = {"unet_seconds_median": statistics.median(times)}
            passed, words = bool(np.isfinite(output).all()), "finite"
            if branches == 1:
                tolerance = tolerance_for(manifest.precision, "unet").relative_l2
                error = _distance(output, predict(engine(REFERENCE), inputs))
                passed = passed and error <= tolerance
                words = f"{error:.1e} off (tolerance {tolerance:.0e})"
                numbers["error"] = error
            seconds = numbers["unet_seconds_median"]
            return Check(backend, name, passed, f"{words}, {seconds:.3f} s a call", numbers)

        try:
            for branches in (1, 2, 3):
                name = f"full-size UNet, {branches} branches"
                yield self._guarded(backend, name, partial(check, branches))
        finally:
            for one in engines.values():
                one.close()


def _pixels(image: Image.Image) -> NDArray[np.float32]:
    """A picture as float32 [H,W,3] in [0, 1]."""
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _distance(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return compare(actual, expected).relative_l2


def predict(engine: Engine, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The UNet's noise prediction for inputs on the host, back on the host."""
    return engine.device.download(engine(**inputs)[contract.NOISE_PREDICTION])


def require_export_extra(recording: Path | None) -> None:
    """Raise `MissingDependency` when recorded cases were given and PyTorch is not there."""
    import importlib.util

    if recording is not None and importlib.util.find_spec("torch") is None:
        raise MissingDependency(
            "Replaying recorded cases exports their model first and needs torch.",
            f"Install it with: {install_hint('export')}, or leave out --recording.",
        )
