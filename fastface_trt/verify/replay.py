"""Replay: run recorded cases through a backend and write what every step computed.

The folder layout is that of a recording of the method: a model folder with `unet/` (diffusers) and
one adapter file, `cases.json`, and a safetensors file with the inputs (`input.*`) and, where a
scheduler is stochastic, the noise that it drew (`CASE.stepN.noise`). It is the tool for finding out
where a backend leaves the method.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.device import Device, HostDevice
from fastface_trt.engines.engine import Engine, EngineBuilder, Progress
from fastface_trt.engines.files import sha256_file, storage_errors
from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.tensorrt.flavour import FLAVOURS
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.errors import MissingDependency, UnknownName, WeightsError, install_hint
from fastface_trt.runtime.guidance import FACE, TEXT, TEXT_AND_FACE, UNCONDITIONAL, VARIANTS
from fastface_trt.runtime.manipulation import AttentionManipulation
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import (
    INITIAL_LATENTS,
    Condition,
    EngineGuidance,
    Guidance,
    HostGuidance,
    Sample,
    StepTrace,
    denoise,
    require_finite,
)
from fastface_trt.runtime.schedule import make_schedule

Array = NDArray[np.float32]
Tensors = dict[str, NDArray[Any]]
Plan = Literal["full", "exact"]

_MANIPULATION_NAMES = {"d": "sharpness"}
_DCG_TYPES = {1: 1, 3: 2, 2: 3}
"""The recordings number the variants as the authors' code does; here they are the appendix's."""


class Recording:
    """Cases and tensors of a recording; missing pieces raise `WeightsError` with their name."""

    def __init__(self, cases: Path, tensors: Path) -> None:
        try:
            self.cases: list[dict[str, Any]] = json.loads(cases.read_text(encoding="utf-8"))
            self.tensors: Tensors = load_file(tensors)
        except FileNotFoundError as error:
            raise WeightsError(f"There is no file {error.filename}.", "Check the path.") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise WeightsError(f"{cases} is not JSON.", "Record it again.") from None
        except SafetensorError as error:
            raise WeightsError(f"{tensors} is not readable: {error}.", "Record it again.") from None

    def select(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The cases called `names`, or all; an unknown name raises `UnknownName`."""
        known = {case["name"]: case for case in self.cases}
        for name in names:
            if name not in known:
                raise UnknownName("case", name, known)
        return [known[name] for name in names] if names else self.cases

    def latent_sizes(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Height and width of the latents of the cases called `names`, or of all."""
        shapes = (self.require(str(case["name"]), "latents").shape for case in self.select(names))
        return sorted({(shape[-2], shape[-1]) for shape in shapes})

    def input(self, case: str, name: str) -> Array | None:
        """An input of a case, its own (`CASE.input.NAME`) or the shared one; None if absent."""
        found = self.tensors.get(f"{case}.input.{name}", self.tensors.get(f"input.{name}"))
        return None if found is None else found.astype(np.float32)

    def require(self, case: str, name: str) -> Array:
        """`input`, or a `WeightsError`."""
        found = self.input(case, name)
        if found is None:
            raise WeightsError(f"The recording has no tensor input.{name}.", "Record it again.")
        return found


def read_manipulation(case: Mapping[str, Any]) -> AttentionManipulation:
    """Attention manipulation of a recorded case, by part of the UNet."""
    kind = case.get("attention_manipulation")
    parts: dict[str, dict[str, Any]] = {}
    for part, recorded in (case.get("attention_manipulation_parameters") or {}).items():
        values = {_MANIPULATION_NAMES.get(k, k): v for k, v in recorded.items() if v is not None}
        if not values.pop("adain", True):
            values["adain_weight"] = 1.0
        if kind == "softmask":
            values.setdefault("invert_first_token", False)
        parts[part] = values | {"kind": kind or "off"}
    return AttentionManipulation.from_dict(parts)


def make_sample(
    case: Mapping[str, Any],
    recording: Recording,
    tokens: Callable[[str], Array],
    plan: Plan,
    device: Device,
) -> Sample:
    """A recorded case as a sample on `device`; it assumes no parameter."""
    name, guidance = str(case["name"]), case.get("guidance") or {}
    timesteps = case.get("timesteps")
    config = case["scheduler"]
    steps = len(timesteps) if timesteps else int(case["steps"])
    schedule = make_schedule(config, steps, timesteps=timesteps)
    variant = _DCG_TYPES[int(guidance.get("dcg_type") or 3)]
    request = GenerationRequest(
        prompt=name,
        steps=steps,
        height=8,
        width=8,
        ip_adapter_scale=case.get("ip_adapter_scale", 1.0),
        alpha=guidance.get("alpha", 1.0),
        beta=guidance.get("beta", 1.0),
        guidance_rescale=guidance.get("rescale_phi"),
        dcg_variant=variant,
        manipulation=read_manipulation(case),
        plan=plan,
    )
    latents = recording.require(name, "latents")
    text, pooled = (recording.require(name, key)[0] for key in ("prompt_embeds", "pooled"))
    negative_text, negative_pooled = (
        np.zeros_like(like) if found is None else found[0]
        for like, found in (
            (text, recording.input(name, "negative_prompt_embeds")),
            (pooled, recording.input(name, "negative_pooled")),
        )
    )
    no_face, face = tokens(name)[[0, 1]]

    def told(text: Array, pooled: Array, image_tokens: Array) -> Condition:
        return Condition(*(device.upload(array) for array in (text, pooled, image_tokens)))

    def noise(stream: int, shape: tuple[int, ...]) -> Array:
        if stream == INITIAL_LATENTS:
            return np.asarray(latents[0])
        recorded = recording.tensors.get(f"{name}.step{stream - 1}.noise")
        if recorded is None:
            raise WeightsError(
                f"Case {name} has no recorded noise for step {stream - 1}.",
                "Its scheduler is stochastic; record it again with the noise.",
            )
        return np.asarray(recorded[0], dtype=np.float32)

    sample = Sample(
        request,
        schedule,
        {
            UNCONDITIONAL: told(negative_text, negative_pooled, no_face),
            TEXT: told(text, pooled, no_face),
            FACE: told(negative_text, negative_pooled, face),
            TEXT_AND_FACE: told(text, pooled, face),
        },
        latents.shape[1:],
        device,
        noise,
    )
    sample.time_ids = recording.require(name, "time_ids")[0]
    return sample


def replay(
    *,
    model: Path,
    cases: Path,
    tensors: Path,
    out: Path,
    backend: str = "onnxruntime",
    names: Sequence[str] = (),
    plan: Plan = "full",
    cache: EngineCache | None = None,
    progress: Progress = lambda line: None,
) -> Tensors:
    """Run recorded cases and write `CASE.stepN.model_input|eps|guided|latents` to `out`.

    `eps` is [branches,C,h,w] in the order of the guidance variant (u, i, ti); with `plan="exact"`
    branches are skipped as in production and `model_input` and `eps` are left out. Returns what was
    written. Needs the `export` extra, since engines are made from PyTorch weights.
    """
    recording = Recording(cases, tensors)
    provider = _UNetProvider(
        model, backend, cache or EngineCache(), progress, recording.latent_sizes(names)
    )
    results: Tensors = {}
    for case in recording.select(names):
        name = str(case["name"])
        engine, guidance = provider.unet(float(case.get("faceid_lora_scale", 1.0)))
        tokens = partial(provider.image_tokens, recording)
        sample = make_sample(case, recording, tokens, plan, engine.device)
        order = VARIANTS[sample.request.dcg_variant][0]

        def record(trace: StepTrace, name: str = name, order: Sequence[str] = order) -> None:
            key = f"{name}.step{trace.step}"
            if plan == "full":
                predictions = trace.predictions
                results[f"{key}.model_input"] = trace.model_input[None]
                results[f"{key}.eps"] = np.stack([predictions[b] for b in order])
            results[f"{key}.guided"] = trace.guided[None]
            results[f"{key}.latents"] = trace.latents[None]

        progress(f"{name}: {len(sample.schedule)} steps")
        (latents,) = denoise(engine, [sample], guidance=guidance, on_step=record)
        require_finite(engine.device, latents)
    provider.close()
    with storage_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: np.ascontiguousarray(v) for k, v in results.items()}, out)
    return results


def _builder(backend: str, latent_sizes: Sequence[tuple[int, int]]) -> EngineBuilder:
    if backend in FLAVOURS:
        return builder_for(backend, options=TensorRTOptions(latent_sizes=tuple(latent_sizes)))
    return builder_for(backend)


class _UNetProvider:
    """UNets of a model folder by LoRA scale, on one backend."""

    def __init__(
        self,
        model: Path,
        backend: str,
        cache: EngineCache,
        progress: Progress,
        latent_sizes: Sequence[tuple[int, int]],
    ) -> None:
        try:
            from fastface_trt.export import adapters as adapter
        except ImportError as error:
            raise MissingDependency(
                f"Replay exports the model first and needs {error.name}.",
                f"Install it with: {install_hint('export')}",
            ) from None
        self._model, self._cache, self._progress = model, cache, progress
        # Fail on an unknown backend before minutes of export.
        self._builder = None if backend == "torch" else _builder(backend, latent_sizes)
        files = [p for p in sorted(model.glob("*")) if p.suffix in (".safetensors", ".bin")]
        if not (model / "unet" / "config.json").is_file() or len(files) != 1:
            raise WeightsError(
                f"{model} does not hold a unet folder and exactly one adapter file.",
                "Lay it out as unet/config.json, unet/*.safetensors and one .safetensors or .bin.",
            )
        self._adapter = adapter.read_adapter(files[0])
        if self._adapter.kind == "pulid":
            raise WeightsError(
                f"{files[0].name} is a PuLID file; recordings are of IP-Adapters.",
                "Replay it with the FaceID adapter that it was recorded with.",
            )
        self._adapter_file = files[0]
        self._engines: list[Engine] = []
        self._by_scale: dict[float, tuple[Engine, Guidance]] = {}

    def unet(self, lora_scale: float) -> tuple[Engine, Guidance]:
        """The UNet with the adapter's LoRA fused at `lora_scale`, and guidance for its device."""
        if lora_scale not in self._by_scale:
            self._by_scale[lora_scale] = self._open(lora_scale)
        return self._by_scale[lora_scale]

    def _open(self, lora_scale: float) -> tuple[Engine, Guidance]:
        if self._builder is None:
            from fastface_trt.export.oracle import TorchUNet

            return TorchUNet(self._torch_unet(lora_scale), self._adapter.tokens), HostGuidance()
        from fastface_trt.export.oracle import export_unet_once

        identity = hashlib.sha256(repr(lora_scale).encode())
        for file in (self._adapter_file, *sorted((self._model / "unet").iterdir())):
            identity.update(f"{file.name}:{sha256_file(file)}".encode())
        export, folder = export_unet_once(
            self._cache.root / "replay",
            identity.hexdigest(),
            lambda: self._torch_unet(lora_scale),
            self._adapter.tokens,
            self._progress,
        )

        def opened(module: ModuleSpec, builder: EngineBuilder) -> Engine:
            self._engines.append(self._cache.open(module, folder, builder, self._progress))
            return self._engines[-1]

        unet = opened(export.module, self._builder)
        if isinstance(unet.device, HostDevice):
            return unet, HostGuidance()
        return unet, EngineGuidance(opened(export.guidance_step, self._builder))

    def _torch_unet(self, lora_scale: float) -> Any:
        from fastface_trt.export.adapters import attach_adapter
        from fastface_trt.export.sources import load_unet_folder

        unet = load_unet_folder(self._model / "unet")
        attach_adapter(unet, self._adapter, lora_scale=lora_scale)
        return unet

    def image_tokens(self, recording: Recording, case: str) -> Array:
        """Tokens [2, T, C] of no face and of the face.

        Recorded tokens are used where there are any, so that the UNet is seen by itself; the
        projection's own deviation from them is reported.
        """
        embedding = recording.input(case, "id_embeds")
        features, no_features = (
            recording.input(case, key) for key in ("clip_embeds", "negative_clip_embeds")
        )
        recorded = recording.input(case, "iptokens")
        projected: Array | None = None
        if embedding is not None:
            embeddings = np.concatenate((np.zeros_like(embedding), embedding))
            if self._adapter.kind == "faceid":
                projected = self._project(embeddings)
            elif features is not None and no_features is not None:
                projected = self._project(embeddings, np.concatenate((no_features, features)))
        if recorded is None:
            if projected is None:
                raise WeightsError(
                    "The recording has neither image tokens nor face and CLIP embeddings.",
                    "Record input.iptokens, or input.id_embeds and input.clip_embeds.",
                )
            return projected
        tokens = recorded[[0, 1]]
        if projected is not None:
            off = float(np.linalg.norm(projected - tokens) / np.linalg.norm(tokens))
            self._progress(f"{case}: projection deviates from the recorded tokens by {off:.1e}")
        return tokens

    def _project(self, *inputs: Array) -> Array:
        import torch

        from fastface_trt.export.adapters import load_projection

        with torch.inference_mode():
            projection = load_projection(self._adapter)
            tokens = projection(*(torch.from_numpy(array) for array in inputs))
        return np.asarray(tokens.numpy(), dtype=np.float32)

    def close(self) -> None:
        """Free the engines and their device."""
        for engine in self._engines:
            engine.close()
        if self._builder is not None and self._engines:
            self._builder.device().close()


__all__ = ["Recording", "make_sample", "read_manipulation", "replay"]
