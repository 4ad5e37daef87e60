"""Calibration of 8-bit exports: what a UNet is run on while its ranges are measured.

`PipelineCalibration` takes prompts and faces through the pipeline, step by step. The prompts cycle
through presets that together evaluate every branch and every manipulation, since a guided or
manipulated run takes the UNet where a plain one does not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Engine, Progress
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import InvalidRequest, NoFaceFound
from fastface_trt.mini import folders
from fastface_trt.mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    STYLE_NAMES,
    Scene,
    canonical_prompt,
)
from fastface_trt.runtime.conditioning import Conditioner
from fastface_trt.runtime.export_folder import Export, ModuleSet
from fastface_trt.runtime.face import Face, FaceAnalyzer
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.presets import preset_fields
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import Sample, denoise

PRESETS = ("plain", "am1+dcg", "am2+dcg")
PICTURES = 32
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FIRST_SEED = 1_000_000  # away from the seeds that people try


class Calibration(Protocol):
    """Runs a UNet on typical inputs."""

    description: str
    """One line for the manifest: what the inputs were."""

    @property
    def latents(self) -> Sequence[NDArray[np.float32]]:
        """The latents [C,h,w] of every picture of the last run, for the VAE."""
        ...

    def run(self, unet: Engine, manifest: ExportManifest, folder: Path, progress: Progress) -> int:
        """Call `unet` on every input and return the number of rows.

        `folder` holds the other modules, exported already, and `manifest` describes them; the UNet
        is missing in both. May raise any `FastFaceError`.
        """
        ...


class RandomCalibration:
    """A few seeded random inputs, for random weights: the ranges mean as little as the weights."""

    description = "seeded standard normal inputs"

    def __init__(self, calls: int = 4, rows: int = 3, side: int = 16) -> None:
        self._calls, self._rows, self._side = calls, rows, side
        self.latents: list[NDArray[np.float32]] = []

    def run(self, unet: Engine, manifest: ExportManifest, folder: Path, progress: Progress) -> int:
        generator = np.random.default_rng(0)
        self.latents = []
        sizes = {
            "batch": self._rows,
            "requests": 1,
            "height": self._side,
            "width": self._side,
            "text": contract.TEXT_POSITIONS,
        }
        for call in range(self._calls):
            progress(f"unet: calibrating, call {call + 1} of {self._calls}")
            inputs = {
                tensor.name: generator.standard_normal(
                    [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
                ).astype(tensor.dtype)
                for tensor in unet.spec.inputs
            }
            self.latents += list(inputs[contract.SAMPLE].astype(np.float32))
            inputs[contract.TIMESTEP][:] = generator.integers(0, 1000)
            inputs[contract.TIME_IDS][:] = [
                manifest.height,
                manifest.width,
                0,
                0,
                manifest.height,
                manifest.width,
            ]
            for name in inputs.keys() & {contract.MANIPULATION, contract.TOKEN_MASK}:
                inputs[name][:] = 0
            unet(**inputs)
        return self._calls * self._rows


def default_prompts() -> list[str]:
    """64 prompts "style; person + place + action": every style in every place, well mixed."""
    styles, places = len(STYLE_NAMES), len(PLACE_NAMES)
    return [
        canonical_prompt(
            Scene(
                STYLE_NAMES[index % styles],
                PLACE_NAMES[(index + index // styles) % places],
                ACTION_NAMES[index % len(ACTION_NAMES)],
            )
        )
        for index in range(styles * places)
    ]


def default_faces() -> list[Path]:
    """The drawn people of the mini model, one a picture."""
    return [path for path in find_faces(folders.SAMPLE_FACES) if path.stem != "two_people"]


def read_prompts(file: Path) -> list[str]:
    """One prompt a line, empty lines left out; raises `InvalidRequest`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"The calibration prompts {file} cannot be read: {error}.",
            "Give a text file with one prompt a line.",
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidRequest(f"{file} holds no prompts.", "Write one prompt a line into it.")
    return prompts


def find_faces(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; raises `InvalidRequest` when it has none."""
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise InvalidRequest(
            f"{folder} holds no calibration pictures.",
            f"Give a folder with photographs of faces ({', '.join(_SUFFIXES)}).",
        )
    return found


class PipelineCalibration:
    """Generates pictures with the UNet to be calibrated; see `fastface_trt.export.quantization`.

    Prompts, faces and presets are taken in turn until `pictures` latents were made.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        faces: Sequence[Path],
        *,
        pictures: int = PICTURES,
        licence_acknowledged: bool = False,
    ) -> None:
        self._prompts, self._faces, self._pictures = prompts, faces, pictures
        self._licence_acknowledged = licence_acknowledged
        self.latents: list[NDArray[np.float32]] = []
        self.description = (
            f"{pictures} pictures of {min(len(faces), pictures)} faces "
            f"and {min(len(prompts), pictures)} prompts, presets {', '.join(PRESETS)}"
        )

    def run(self, unet: Engine, manifest: ExportManifest, folder: Path, progress: Progress) -> int:
        """Denoise every picture with `unet`, keep its latents and return its rows.

        Raises `InvalidRequest` for a picture without a face, and what the pipeline raises.
        """
        self.latents = []
        rows = 0
        export = Export(folder, manifest)
        with ModuleSet(export, builder_for("onnxruntime"), EngineCache(), progress) as modules:
            conditioner = Conditioner(modules)
            tokens = [conditioner.image_tokens(face) for face in self._analyse(export)]
            for index in range(self._pictures):
                progress(f"unet: calibrating, picture {index + 1} of {self._pictures}")
                request = GenerationRequest(
                    self._prompts[index % len(self._prompts)],
                    steps=manifest.steps,
                    height=manifest.height,
                    width=manifest.width,
                    seed=_FIRST_SEED + index,
                    **preset_fields(PRESETS[index % len(PRESETS)], manifest.steps),
                ).for_adapter(manifest.adapter_kind)
                conditions = conditioner.conditions(request, tokens[index % len(tokens)])
                sample = Sample(
                    request,
                    export.schedule(manifest.steps),
                    conditions,
                    manifest.latent_shape(),
                    unet.device,
                )
                (final,) = denoise(unet, [sample])
                self.latents.append(unet.device.download(final))
                rows += request.unet_samples
        return rows

    def _analyse(self, export: Export) -> list[Face]:
        analyzer = FaceAnalyzer.of_export(export, licence_acknowledged=self._licence_acknowledged)
        faces = []
        for path in self._faces[: self._pictures]:
            try:
                faces.append(analyzer.analyze(load_picture(path)))
            except NoFaceFound:
                raise InvalidRequest(
                    f"The calibration picture {path.name} shows no face.",
                    "Take it out of the folder, or name another with --calibration-faces.",
                ) from None
        return faces
