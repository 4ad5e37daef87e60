"""One export from start to finish: its modules, tokenizers, the face model and the manifest.

Modules are made one after the other and dropped, so the peak is the largest module (the UNet) and
not the sum. The folder appears under its name only when everything in it is complete.
"""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from fastface_trt.engines.engine import Engine, Progress
from fastface_trt.engines.files import describe_file, finished_folder
from fastface_trt.engines.manifest import (
    EMBEDDING_ALONE,
    EXPORT_MANIFEST,
    AdapterKind,
    ExportManifest,
    FileEntry,
    ModuleSpec,
)
from fastface_trt.engines.onnx.file import check_references
from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.export import face_modules, guidance_step, modules
from fastface_trt.export.modules import ModuleExport
from fastface_trt.export.onnx_writer import MODEL_FILE, write_module
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from fastface_trt.export.precision import Model
from fastface_trt.export.probe import write_probe
from fastface_trt.export.quantization.modules import quantize_unet, quantize_vae
from fastface_trt.export.quantization.ranges import calibration_twin, modelopt_version
from fastface_trt.export.weights import CheckpointWeights, RandomWeights, Weights
from fastface_trt.measure.memory import GB, peak_bytes
from fastface_trt.runtime.face_files import copy_models

_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "fastface-trt")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
FACE_PARSER = "face_parser"


def run_export(options: ExportOptions, out: Path, progress: Progress) -> ExportManifest:
    """Write the export to folder `out` and return its manifest.

    Raises `WeightsError`, `InvalidRequest` or `StorageError`; then nothing is left at `out` that
    was not there before. `progress` is told every phase with its seconds and the peak memory.
    """
    if options.quantized or options.quantize_vae:
        modelopt_version()  # not after an hour of exporting
    with finished_folder(out, EXPORT_MANIFEST) as draft:
        weights: Weights = (
            RandomWeights(options)
            if options.random_weights
            else CheckpointWeights(options, progress)
        )
        height, width = options.height or weights.size[0], options.width or weights.size[1]
        options = replace(options, height=height, width=width)
        for name in _TOKENIZERS:
            weights.copy_tokenizer(name, draft.path / name)
        face_model = _copy_face_model(weights.face_model, draft.path)
        face_parser = _copy_face_parser(options, weights.adapter_kind, draft.path, progress)
        extra = [
            describe_file(draft.path, path)
            for folder in (*_TOKENIZERS, "face", FACE_PARSER)
            for path in sorted((draft.path / folder).rglob("*"))
            if path.is_file()
        ]
        specs: dict[str, ModuleSpec] = {}

        def so_far() -> ExportManifest:
            facts = makers.facts | {"face_model": face_model, "face_parser": face_parser}
            return _manifest(options, weights, facts, specs, extra)

        def calibrate(unet: Engine) -> int:
            assert options.calibration is not None  # or the options would have been refused
            return options.calibration.run(unet, so_far(), draft.path, progress)

        makers = _Makers(options, weights, calibrate)
        for name, make in makers.in_order().items():
            specs[name] = _write(name, make, draft.path, options, progress)
        specs[guidance_step.NAME] = guidance_step.write_guidance_step(
            draft.path,
            channels=makers.facts["latent_channels"],
            latent_size=options.latent_size(makers.facts["vae_scale_factor"], 1),
            fixed_size=options.fixed_size,
        )
        manifest = so_far()
        draft.finish(manifest)
    return manifest


def _write(
    name: str,
    make: Callable[[], ModuleExport],
    folder: Path,
    options: ExportOptions,
    progress: Progress,
) -> ModuleSpec:
    started = perf_counter()
    progress(f"{name}: loading")
    export = make()
    progress(f"{name}: exporting to ONNX")
    compress = options.precision == "fp32" and options.weight_storage == "fp16"
    spec = write_module(export, folder, fp16_storage=compress)
    progress(f"{name}: computing a probe")
    # What is not quantised in a quantised export is fp16.
    precision = "fp16" if compress or options.quantized else options.precision
    if export.quantization is not None:
        precision = export.quantization.form
    probe = write_probe(export, folder, precision)
    spec = spec.model_copy(update={"probe": probe})
    del export
    gc.collect()  # modules and their graphs hold each other in cycles
    size = sum(f.bytes for f in spec.files) / 2**20
    seconds = perf_counter() - started
    progress(f"{name}: {size:.1f} MB in {seconds:.0f} s, peak memory {peak_bytes() / GB:.1f} GB")
    return spec


class _Makers:
    """Makes the modules that hold weights, in an order in which each finds its sizes in `facts`."""

    def __init__(
        self, options: ExportOptions, weights: Weights, calibrate: Callable[[Engine], int]
    ) -> None:
        self._options = options
        self._weights = weights
        self._calibrate = calibrate
        self._clip_positions: int | str = "positions"
        self._vae_kept: Model | None = None
        self.facts: dict[str, Any] = {}

    def in_order(self) -> dict[str, Callable[[], ModuleExport]]:
        makers: dict[str, Callable[[], ModuleExport]] = {
            "text_encoder": lambda: self._text_encoder("text_encoder"),
            "text_encoder_2": lambda: self._text_encoder("text_encoder_2"),
            "image_encoder": self._image_encoder,
            "face_projection": self._face_projection,
            "vae_decoder": self._vae_decoder,
            "unet": self._unet,
        }
        if self._weights.adapter_kind in EMBEDDING_ALONE:
            del makers["image_encoder"]
        if self._options.quantize_vae:  # on latents of the UNet
            del makers["vae_decoder"]
            makers["unet"] = self._unet_before_vae
            makers["vae_decoder"] = self._vae_decoder
        return makers

    def _text_encoder(self, name: str) -> ModuleExport:
        return modules.text_encoder_export(name, self._weights.text_encoder(name))

    def _image_encoder(self) -> ModuleExport:
        encoder = self._weights.image_encoder()
        mean, std = self._weights.image_normalisation()
        self.facts |= {
            "image_encoder_size": encoder.config.image_size,
            "image_mean": mean,
            "image_std": std,
        }
        export = face_modules.image_encoder_export(encoder)
        self._clip_positions = export.shapes[export.outputs[-1]][-2]
        return export

    def _face_projection(self) -> ModuleExport:
        projection = self._weights.projection()
        self.facts["max_faces"] = self._weights.max_faces
        self.facts["image_token_count"] = projection.tokens * self._weights.max_faces
        self.facts["zero_tokens"] = getattr(projection, "zero_tokens", 0)
        return face_modules.face_projection_export(projection, self._clip_positions)

    def _vae(self) -> Model:
        vae = self._vae_kept or self._weights.vae()
        self.facts |= {
            "vae_scale_factor": vae_scale_factor(vae),
            "latent_channels": vae.config.latent_channels,
        }
        return vae

    def _unet_before_vae(self) -> ModuleExport:
        self._vae_kept = self._vae()  # its sizes; loaded once, for what it says of its source
        return self._unet()

    def _vae_decoder(self) -> ModuleExport:
        vae = self._vae()
        factor = self.facts["vae_scale_factor"]
        plan = None
        if self._options.quantize_vae:
            assert self._options.calibration is not None
            plan, self.facts["vae_quantization"] = quantize_vae(
                vae, self._options, self._options.calibration.latents
            )
        export = modules.vae_decoder_export(
            vae,
            latent_size=self._options.latent_size(factor, 1),
            scale_factor=factor,
            fixed_size=self._options.fixed_size,
            operators=self._options.operators,
        )
        return replace(export, quantization=plan)

    @property
    def _unet_tokens(self) -> dict[str, Any]:
        """How many image tokens the UNet takes, and whether a mask says which are there."""
        tokens: int = self.facts["image_token_count"]
        return {"tokens": tokens, "masked": self._weights.max_faces > 1}

    def _unet(self) -> ModuleExport:
        unet = self._weights.unet()
        levels = len(unet.config.block_out_channels)
        plan = None
        if self._options.quantized:
            plan, self.facts["quantization"] = quantize_unet(
                unet, self._options, calibrate=self._calibrate, **self._unet_tokens
            )
        elif self._options.quantize_vae:
            twin = calibration_twin(unet)
            self._calibrate(TorchUNet(twin, **self._unet_tokens))
        export = modules.unet_export(
            unet,
            **self._unet_tokens,
            latent_size=self._options.latent_size(self.facts["vae_scale_factor"], levels),
            fixed_size=self._options.fixed_size,
            operators=self._options.operators,
        )
        return replace(export, quantization=plan)


def vae_scale_factor(vae: Model) -> int:
    """Pixels per latent along a side: a VAE halves between its blocks, the tiny one likewise."""
    config = vae.config
    blocks = getattr(config, "block_out_channels", None) or config.decoder_block_out_channels
    return int(2 ** (len(blocks) - 1))


def _copy_face_model(model: str, draft: Path) -> str:
    """Copy the two files of a folder into the export; a pack's name is only recorded."""
    if not Path(model).is_dir():
        return model
    copy_models(Path(model), draft / "face")
    return "face"


def _copy_face_parser(
    options: ExportOptions, kind: AdapterKind, draft: Path, progress: Progress
) -> str | None:
    """Copy PuLID's face parser into the export; say so where there is none."""
    if options.face_parser is None:
        if kind == "pulid":
            progress(
                "No face parser: the face encoder will see the background of faces, which PuLID "
                "was trained without (--face-parser)"
            )
        return None
    if kind != "pulid":
        raise InvalidRequest(
            f"An adapter of kind {kind} parses no faces.", "Leave out --face-parser."
        )
    if not options.face_parser.is_file():
        raise WeightsError(f"There is no {options.face_parser} (face parser).", "Check the path.")
    check_references(options.face_parser.parent, options.face_parser.name, ())  # one file is copied
    (draft / FACE_PARSER).mkdir()
    copy = draft / FACE_PARSER / MODEL_FILE
    shutil.copyfile(options.face_parser, copy)
    return str(copy.relative_to(draft))


def _manifest(
    options: ExportOptions,
    weights: Weights,
    facts: dict[str, Any],
    specs: dict[str, ModuleSpec],
    extra: list[FileEntry],
) -> ExportManifest:
    checkpoint = options.checkpoint
    return ExportManifest(
        checkpoint=checkpoint.name,
        adapter=weights.adapter_name,
        adapter_kind=weights.adapter_kind,
        orthogonal=weights.orthogonal,
        precision=options.precision,
        weight_storage=options.stored,
        attention_operator=options.attention_operator,
        group_norm=options.group_norm,
        modules=specs,
        extra_files=tuple(extra),
        sources=tuple(weights.sources),
        loras=tuple(weights.loras),
        scheduler=weights.scheduler,
        steps=options.steps or checkpoint.steps,
        allowed_steps=checkpoint.allowed_steps,
        height=options.height or weights.size[0],
        width=options.width or weights.size[1],
        fixed_size=options.fixed_size,
        force_zeros_for_empty_prompt=weights.force_zeros_for_empty_prompt,
        random_weights=options.random_weights,
        tool_versions={name: version(name) for name in _PACKAGES},
        **facts,
    )
