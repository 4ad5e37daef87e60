"""Writes a Triton model repository: config, model file, export and engines, complete or not at all.

OUT/fastface-triton.json             what is in it; written last
OUT/README.md
OUT/fastface/config.pbtxt            with our settings as its string parameters
OUT/fastface/1/model.py
OUT/fastface/1/export/               the export's manifest and small files, no ONNX modules
OUT/fastface/1/engines/KEY/          engines out of the cache, under their own keys
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Literal

from pydantic import ValidationError

from fastface_trt import __version__
from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import finished_folder, verify_files
from fastface_trt.engines.manifest import EXPORT_MANIFEST, EngineManifest, Strict, first_problem
from fastface_trt.engines.tensorrt.profiles import read_profiles, request_counts
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.export_folder import Export
from fastface_trt.serving.settings import Seconds, WorkerSettings
from fastface_trt.serving.triton.model_config import (
    DynamicBatching,
    InstanceGroup,
    InstanceKind,
    ModelConfig,
    QueuePolicy,
    TransactionPolicy,
)
from fastface_trt.serving.triton.tensors import INPUTS, OUTPUTS, STEP_OUTPUTS

REPOSITORY_FILE = "fastface-triton.json"
MODEL, VERSION = "fastface", "1"
ANY_COUNT_BATCH = 8
"""`max_batch_size` of engines that take any number of requests in a call."""


class RepositoryManifest(Strict):
    """What a repository was made of; `engines` are keys in the cache by module."""

    schema_version: Literal[1] = 1
    software: str
    checkpoint: str
    backend: str
    engines: dict[str, str]


@dataclass(frozen=True, slots=True)
class RepositoryOptions:
    """How Triton runs the model; see `ModelConfig`.

    max_batch: None for what the engines were built for. queue_delay: seconds that Triton waits for
    more requests before it hands over those it has; the loop joins later ones anyway, so this only
    saves calls between two processes. queue_timeout: seconds after which a request that still waits
    in Triton is refused; a client may ask for less. gpus: empty for all. execution_env: Triton's
    EXECUTION_ENV_PATH.
    """

    max_batch: int | None = None
    max_queue: int = 64
    queue_delay: float = 0.002
    queue_timeout: float = 60.0
    gpus: tuple[int, ...] = ()
    instances: int = 1
    decoupled: bool = False
    execution_env: str | None = None
    drain_seconds: float = 30.0


def write_repository(
    target: Path,
    worker: WorkerSettings,
    options: RepositoryOptions,
    progress: Progress = lambda line: None,
    *,
    build: bool = False,
    replace: bool = False,
) -> RepositoryManifest:
    """Write the repository to `target`, a new or empty folder, or with `replace` over another one.

    With `build` engines that the cache lacks are built into it first. Raises `InvalidRequest`,
    `EngineMismatch` for a missing engine, `StorageError` and the errors of exports and builds.
    """
    if not replace and target.is_dir() and any(target.iterdir()):
        raise InvalidRequest(
            f"{target} is not empty.", "Choose a new folder, or replace a repository: --replace."
        )
    export = Export.open(worker.export, schedule_of=worker.schedule_of)
    verify_files(export.folder, export.manifest.extra_files)
    with finished_folder(target, REPOSITORY_FILE) as draft:
        version = draft.path / MODEL / VERSION
        engines = _copy_engines(export, worker, version / "engines", progress, build)
        progress("Copying the export's small files")
        _copy_export(export, version / "export")
        source = files("fastface_trt.serving.triton")
        (version / "model.py").write_text((source / "model.py").read_text("utf-8"), "utf-8")
        config = model_config(worker, options, engines["unet"])
        (version.parent / "config.pbtxt").write_text(config.to_text(), "utf-8")
        readme = Template((source / "repository.md").read_text("utf-8"))
        text = readme.substitute(
            backend=worker.backend, checkpoint=export.manifest.checkpoint, version=__version__
        )
        (draft.path / "README.md").write_text(text, "utf-8")
        made = RepositoryManifest(
            software=f"FastFace-TRT {__version__}",
            checkpoint=export.manifest.checkpoint,
            backend=worker.backend,
            engines={name: engine.key for name, engine in engines.items()},
        )
        draft.finish(made)
    return made


def model_config(
    worker: WorkerSettings, options: RepositoryOptions, unet: EngineManifest
) -> ModelConfig:
    """The config of a model with these settings, whose UNet is `unet`."""
    counts = _request_counts(unet)
    largest = options.max_batch or max(counts, default=ANY_COUNT_BATCH)
    gpu = worker.backend != "onnxruntime"
    if options.gpus and not gpu:
        raise InvalidRequest("The backend onnxruntime runs on the CPU.", "Leave --gpus out.")
    group = InstanceGroup(
        InstanceKind.KIND_GPU if gpu else InstanceKind.KIND_CPU, options.instances, options.gpus
    )
    settings = TritonSettings.model_validate(
        worker.model_dump()
        | {"export": "export", "cache": "engines", "drain_seconds": options.drain_seconds}
    )
    triton = {"FORCE_CPU_ONLY_INPUT_TENSORS": "yes"}
    if options.execution_env is not None:
        triton["EXECUTION_ENV_PATH"] = options.execution_env
    return ModelConfig(
        name=MODEL,
        max_batch_size=largest,
        input=INPUTS,
        output=OUTPUTS + (STEP_OUTPUTS if options.decoupled else ()),
        instance_group=(group,),
        dynamic_batching=DynamicBatching(
            preferred_batch_size=tuple(count for count in counts if count <= largest),
            max_queue_delay_microseconds=round(options.queue_delay * 1e6),
            default_queue_policy=QueuePolicy(
                default_timeout_microseconds=round(options.queue_timeout * 1e6),
                allow_timeout_override=True,
                max_queue_size=options.max_queue,
            ),
        ),
        model_transaction_policy=TransactionPolicy(options.decoupled),
        parameters=settings.to_parameters() | triton,
    )


class TritonSettings(WorkerSettings):
    """Our parameters in `config.pbtxt`; paths are relative to the version's folder."""

    drain_seconds: Seconds = 30.0

    def to_parameters(self) -> dict[str, str]:
        """What differs from the defaults, as strings for `config.pbtxt`."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in values.items()
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], folder: Path) -> "TritonSettings":
        """The inverse of `to_parameters`, with paths below `folder`.

        Names in capitals are Triton's own. Raises `InvalidRequest` for a value that is not valid.
        """
        values: dict[str, Any] = {k: v for k, v in parameters.items() if not k.isupper()}
        try:
            if "engine_options" in values:
                values["engine_options"] = json.loads(values["engine_options"])
            settings = cls.model_validate(values)
        except (ValidationError, json.JSONDecodeError) as error:
            where, problem = (
                first_problem(error) if isinstance(error, ValidationError) else ("it", str(error))
            )
            raise InvalidRequest(
                f"The parameters of config.pbtxt are not valid at {where}: {problem}.",
                "Write the repository again: fastface-trt export-triton.",
            ) from None
        export = settings.export if settings.export == "mini" else str(folder / settings.export)
        cache = None if settings.cache is None else folder / settings.cache
        return settings.model_copy(update={"export": export, "cache": cache})


def _request_counts(unet: EngineManifest) -> Sequence[int]:
    """For how many requests a call of the UNet's engine was built; empty for any number."""
    if "profiles" not in unet.options:
        return ()
    return request_counts(unet.module, read_profiles(unet)) or ()


def _copy_engines(
    export: Export,
    worker: WorkerSettings,
    target: Path,
    progress: Progress,
    build: bool,
) -> dict[str, EngineManifest]:
    cache = EngineCache(worker.cache)
    builder = make_builder(
        export.manifest,
        worker.backend,
        threads=worker.threads,
        options=worker.engine_options,
        cache=cache,
    )
    engines = {}
    for name, module in export.manifest.modules.items():
        engine, place = cache.get(module, export.folder, builder, progress, build=build)
        progress(f"Copying {name}")
        shutil.copytree(place, target / engine.key)
        engines[name] = engine
    return engines


def _copy_export(export: Export, target: Path) -> None:
    """What opening engines needs of an export; their ONNX files are read only to build."""
    target.mkdir(parents=True)
    shutil.copy2(export.folder / EXPORT_MANIFEST, target)
    for entry in export.manifest.extra_files:
        place = target / entry.path
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copy2(export.folder / entry.path, place)
