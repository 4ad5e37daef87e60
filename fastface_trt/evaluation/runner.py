"""One experiment from start to finish: every setting on the same pairs with the same noise.

An export per scale of the adapter's LoRA is made when an experiment asks for it: the LoRA is fused
before export and only the UNet holds it, so everything else is taken from the export at hand. What
was made is kept by content and serves every later run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import finished_folder, verify_files
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    ExportManifest,
)
from fastface_trt.errors import (
    FastFaceError,
    InvalidRequest,
    MissingDependency,
    NoFaceFound,
    install_hint,
)
from fastface_trt.evaluation.data import SEED, Dataset, Pair
from fastface_trt.evaluation.experiment import Experiment, Setting, Source
from fastface_trt.evaluation.judges import Column, Judge, Sample, faceless
from fastface_trt.evaluation.results import (
    PictureResult,
    RunFolder,
    RunRecord,
    SettingRecord,
    held_folder,
)
from fastface_trt.measure.machine import describe_machine
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.pipeline import FastFace

_TRAINED_SCALE = 1.0
PIXELS = Column(
    name="pixels",
    label="Pixels from the baseline",
    unit="8-bit steps",
    higher_is_better=False,
    what="Mean absolute difference of the pixels to the baseline's picture of the same pair",
)
OnBatch = Callable[[str, int, int], None]
"""Called after every batch with the setting, and the pictures that are finished and all."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is executed. batch: pictures generated at once; it decides which pictures share
    UNet calls. max_rows bounds the rows of such a call. keep: pictures kept of every setting."""

    export: str = "mini"
    backend: str = "onnxruntime"
    cache: Path | None = None
    threads: int | None = None
    licence_acknowledged: bool = False
    batch: int = 24
    max_rows: int = 12
    keep: int = 24


def run_experiment(
    experiment: Experiment,
    data: Dataset,
    judges: Sequence[Judge],
    out: Path,
    options: RunOptions,
    progress: Progress = lambda line: None,
    on_batch: OnBatch = lambda setting, done, total: None,
) -> RunRecord:
    """Run what is not finished in folder `out` yet; afterwards all of it is.

    Everything that can be wrong with settings, judges and source pictures is found before the first
    picture. Raises `InvalidRequest`, `NoFaceFound` and what judges and exports raise.
    """
    settings = experiment.expanded()
    with held_folder(out), ExitStack() as stack:
        opened = {
            source: stack.enter_context(_open(source, options, progress))
            for source in dict.fromkeys(setting.source for setting in settings)
        }
        record = _record(experiment, settings, opened, data, judges, options)
        folder = RunFolder(out, record)
        folder.start()
        progress("opening the judges")
        for judge in judges:
            judge.load(data)
        folder.write_faces(data.people)
        run = _Run(experiment, settings, data, judges, folder, options)
        total = len(settings) * len(data.pairs)
        on_batch("", len(folder.finished), total)
        rounds = _rounds(settings)
        for at, (source, members) in enumerate(rounds):
            for name in run.setting_batches(opened[source], members, progress):
                on_batch(name, len(folder.finished), total)
            if all(later != source for later, _ in rounds[at + 1 :]):
                opened[source].close()
    return record


def _rounds(settings: Sequence[Setting]) -> list[tuple[Source, list[Setting]]]:
    """Settings by the engines that they run on, all baselines before all others."""
    baselines = {setting.baseline for setting in settings}
    rounds: dict[tuple[bool, Source], list[Setting]] = {}
    for setting in sorted(settings, key=lambda one: one.name not in baselines):
        key = (setting.name in baselines, setting.source)
        rounds.setdefault(key, []).append(setting)
    return [(source, members) for (_, source), members in rounds.items()]


def _open(source: Source, options: RunOptions, progress: Progress) -> FastFace:
    """An export on the backend; its engines are opened when they are first used."""
    export = Export.open(source.export or options.export).folder
    if source.lora_scale is not None:
        export = export_with_lora_scale(export, source.lora_scale, options.cache, progress)
    return FastFace.load(
        export,
        backend=options.backend,
        cache=options.cache,
        threads=options.threads,
        licence_acknowledged=options.licence_acknowledged,
        progress=progress,
        schedule_of=source.scheduler,
    )


class _Run:
    """What all settings of a run share."""

    def __init__(
        self,
        experiment: Experiment,
        settings: Sequence[Setting],
        data: Dataset,
        judges: Sequence[Judge],
        folder: RunFolder,
        options: RunOptions,
    ) -> None:
        self._experiment = experiment
        self._data = data
        self._judges = judges
        self._folder = folder
        self._options = options
        self._faces: dict[str, dict[str, Face]] = {}
        self._references = (
            {setting.baseline for setting in settings} if experiment.pixels else set()
        )

    def setting_batches(
        self, fastface: FastFace, settings: Sequence[Setting], progress: Progress
    ) -> Iterator[str]:
        """Run the settings of one export; yields the setting's name after every batch."""
        pairs, size = self._data.pairs, self._options.batch
        batches = [pairs[at : at + size] for at in range(0, len(pairs), size)]
        missing = [
            (setting, batch)
            for setting in settings
            for batch in batches
            if not self._folder.has(setting.name, [pair.index for pair in batch])
        ]
        if not missing:
            return
        progress("finding faces")
        faces = self._analysed(fastface)
        for setting, batch in missing:
            self._folder.append(self._batch(fastface, setting, batch, faces))
            yield setting.name

    def _analysed(self, fastface: FastFace) -> Mapping[str, Face]:
        """Faces of all people, by the export's own face model; raises `NoFaceFound` for all."""
        manifest = fastface.manifest
        files = [f.sha256 for f in manifest.extra_files if f.path.startswith(manifest.face_model)]
        key = f"{manifest.face_model}:{files}"
        if key not in self._faces:
            found: dict[str, Face] = {}
            for name, picture in self._data.people.items():
                try:
                    found[name] = fastface.analyze(picture)
                except NoFaceFound:
                    continue
            missing = [self._data.files[name] for name in self._data.people if name not in found]
            if missing:
                raise faceless(missing)
            self._faces[key] = found
        return self._faces[key]

    def _batch(
        self,
        fastface: FastFace,
        setting: Setting,
        batch: Sequence[Pair],
        faces: Mapping[str, Face],
    ) -> list[PictureResult]:
        fields = setting.request_fields(fastface.manifest.steps)
        made = fastface.generate(
            [fastface.request(pair.prompt, seed=pair.seed, **fields) for pair in batch],
            [faces[pair.person] for pair in batch],
            max_rows=self._options.max_rows,
        )
        samples = [
            Sample(np.asarray(image), pair) for image, pair in zip(made.images, batch, strict=True)
        ]
        judged = {judge.column.name: judge.judge(samples) for judge in self._judges}
        results = []
        for at, (sample, pair) in enumerate(zip(samples, batch, strict=True)):
            metrics = {name: values[at] for name, values in judged.items()}
            if self._experiment.pixels:
                metrics[PIXELS.name] = self._pixels(setting, sample)
            kept = None
            if pair.index < self._options.keep or setting.name in self._references:
                kept = self._folder.write_picture(
                    setting.name, pair.index, sample.picture, made.parameters[at]
                )
            results.append(
                PictureResult(
                    setting=setting.name,
                    pair=pair.index,
                    person=pair.person,
                    prompt=pair.prompt,
                    seed=pair.seed,
                    metrics=metrics,
                    unet_samples=sum(map(len, made.branches[at])),
                    seconds=made.seconds["total"] / len(batch),
                    picture=kept,
                )
            )
        return results

    def _pixels(self, setting: Setting, sample: Sample) -> float | None:
        if setting.baseline is None or setting.baseline == setting.name:
            return 0.0
        return pixel_distance(
            sample.picture, self._folder.read_picture(setting.baseline, sample.pair.index)
        )


def pixel_distance(picture: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float | None:
    """Mean absolute difference in 8-bit steps; None where the sizes differ."""
    if picture.shape != reference.shape:
        return None
    return float(np.abs(picture.astype(np.int16) - reference).mean())


def _record(
    experiment: Experiment,
    settings: Sequence[Setting],
    opened: Mapping[Source, FastFace],
    data: Dataset,
    judges: Sequence[Judge],
    options: RunOptions,
) -> RunRecord:
    """What is about to run; resolves every setting's request, so that mistakes show now."""
    first = data.pairs[0]
    records = []
    for setting in settings:
        fastface = opened[setting.source]
        manifest = fastface.manifest
        fields = setting.request_fields(manifest.steps)
        try:
            request = fastface.request(first.prompt, seed=first.seed, **fields)
        except InvalidRequest as error:
            raise InvalidRequest(f"Setting {setting.name}: {error.message}", error.hint) from None
        records.append(
            SettingRecord(
                name=setting.name,
                axes=dict(setting.axes),
                request=request.to_dict(),
                line=setting.line,
                baseline=setting.baseline,
                export=str(setting.source.export or options.export),
                checkpoint=manifest.checkpoint,
                scheduler=str(manifest.scheduler["class"]),
            )
        )
    digest = hashlib.sha256()
    for fastface in opened.values():
        digest.update(fastface.manifest.model_dump_json().encode())
    columns = [judge.column for judge in judges]
    return RunRecord(
        experiment=experiment.name,
        title=experiment.title,
        export=options.export,
        backend=options.backend,
        checkpoint=opened[settings[0].source].manifest.checkpoint,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=dict(describe_machine()),
        versions=_versions(),
        judges=(*columns, PIXELS) if experiment.pixels else tuple(columns),
        settings=tuple(records),
        pairs=len(data.pairs),
        seed=SEED,
        data=data.name,
        data_sha256=data.fingerprint(),
        engines_sha256=digest.hexdigest(),
        batch=options.batch,
        max_rows=options.max_rows,
        keep=options.keep,
    )


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {}
    for name in ("fastface-trt", "onnxruntime", "numpy", "insightface", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def export_with_lora_scale(
    folder: Path, scale: float, cache: Path | None, progress: Progress
) -> Path:
    """The folder of the same export with the LoRA at `scale`: itself where that is its own.

    Others lie in `exports` beside the engine cache. Raises `MissingDependency` without the export
    extra, `InvalidRequest` for an export that was not made of a registry checkpoint's weights,
    and what an export raises.
    """
    manifest = Export.open(folder).manifest
    own = next((lora.scale for lora in manifest.loras if lora.role == "faceid"), _TRAINED_SCALE)
    if own == scale:
        return folder
    digest = hashlib.sha256(f"{manifest.model_dump_json()}:{scale!r}".encode()).hexdigest()
    target = EngineCache(cache).root.parent / "exports" / digest
    try:
        verify_files(target, Export.open(target).manifest.files())
        return target
    except FastFaceError:
        _export(folder, manifest, scale, target, progress)
        return target


def _export(
    folder: Path, manifest: ExportManifest, scale: float, target: Path, progress: Progress
) -> None:
    try:
        from fastface_trt.checkpoints import find_checkpoint
        from fastface_trt.export.modules import unet_export
        from fastface_trt.export.onnx_writer import write_module
        from fastface_trt.export.options import ExportOptions
        from fastface_trt.export.probe import write_probe
        from fastface_trt.export.sources import quiet_libraries
        from fastface_trt.export.weights import CheckpointWeights
    except ImportError as error:
        raise MissingDependency(
            f"Another LoRA scale is another export, which needs {error.name}.",
            f"Install it with: {install_hint('export')}",
        ) from None
    if manifest.random_weights or manifest.quantization is not None:
        raise InvalidRequest(
            f"{folder} cannot be exported with another LoRA scale: its weights are "
            f"{'random' if manifest.random_weights else 'quantised'}.",
            "Give exports of your own with the axis export.",
        )
    if any(lora.role == "style" for lora in manifest.loras):
        raise InvalidRequest(
            f"{folder} cannot be exported with another LoRA scale: it has LoRAs of --lora.",
            "Export it with --lora-scale, and give the folders with the axis export.",
        )
    quiet_libraries()
    checkpoint = find_checkpoint(manifest.checkpoint)
    options = ExportOptions(
        checkpoint,
        precision=manifest.precision,
        weight_storage=manifest.weight_storage,
        steps=manifest.steps,
        height=manifest.height,
        width=manifest.width,
        fixed_size=manifest.fixed_size,
        faceid_lora_scale=scale,
    )
    progress(f"exporting the UNet with its LoRA at {scale:g}")
    weights = CheckpointWeights(options)
    unet = weights.unet()
    made_of = {(source.role, source.revision, source.sha256) for source in weights.sources}
    known = {(source.role, source.revision, source.sha256) for source in manifest.sources}
    if not made_of <= known:
        raise InvalidRequest(
            f"{folder} was exported from other weights than those of {manifest.checkpoint}.",
            "Export it with --lora-scale, and give the folders with the axis export.",
        )
    levels = len(unet.config.block_out_channels)
    export = unet_export(
        unet,
        tokens=manifest.image_token_count,
        masked=manifest.max_faces > 1,
        latent_size=options.latent_size(manifest.vae_scale_factor, levels),
        fixed_size=manifest.fixed_size,
    )
    compress = manifest.precision == "fp32" and manifest.weight_storage == "fp16"
    with finished_folder(target, EXPORT_MANIFEST) as draft:
        for entry in manifest.files():
            if not entry.path.startswith("unet/"):
                _link(folder / entry.path, draft.path / entry.path)
        spec = write_module(export, draft.path, fp16_storage=compress)
        probe = write_probe(export, draft.path, "fp16" if compress else manifest.precision)
        modules = manifest.modules | {"unet": spec.model_copy(update={"probe": probe})}
        draft.finish(
            manifest.model_copy(update={"modules": modules, "loras": tuple(weights.loras)})
        )


def _link(source: Path, target: Path) -> None:
    """The same bytes at another place, without a copy where the disk allows it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
