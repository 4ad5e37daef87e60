"""Replay: run recorded cases through a backend and write what every step computed.

The folder layout is that of a recording of the method: a model folder with `unet/` (diffusers) and
one adapter file, `cases.json`, and a safetensors file with the inputs (`input.*`) and, where a
scheduler is stochastic, the noise that it drew (`CASE.stepN.noise`). It is the tool for finding out
where a backend leaves the method.

A set of recordings of several adapters shares the UNet: then a model folder holds adapter files
alone, of which a case names its own, and the tokens are projected from the face embeddings that the
case names. Its cases of plain guidance ε_u + s (ε_ti − ε_u) are α = β = s, in which ε_i cancels.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.device import Device, HostDevice
from fastface_trt.engines.engine import Engine, EngineBuilder, Progress
from fastface_trt.engines.files import sha256_file, storage_errors
from fastface_trt.engines.manifest import PORTRAIT, ModuleSpec
from fastface_trt.engines.tensorrt.flavour import FLAVOURS
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.errors import MissingDependency, UnknownName, WeightsError, install_hint
from fastface_trt.runtime.conditioning import token_mask
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

if TYPE_CHECKING:
    from fastface_trt.export.adapters import AdapterWeights

Array = NDArray[np.float32]
Tensors = dict[str, NDArray[Any]]
Plan = Literal["full", "exact"]

_MANIPULATION_NAMES = {"d": "sharpness"}
_BRANCHES = {"uncond": UNCONDITIONAL, "text": TEXT, "id": FACE, "text+id": TEXT_AND_FACE}
"""How recordings of a set name the branches."""
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
    tokens: Array,
    plan: Plan,
    device: Device,
    most_tokens: int | None = None,
) -> Sample:
    """A recorded case as a sample on `device`; it assumes no parameter.

    `tokens` are those of no face and of the face, [2,T,C]; they are padded to `most_tokens`, with a
    mask, where the UNet takes one.
    """
    name, guidance = str(case["name"]), case.get("guidance") or {}
    timesteps = case.get("timesteps")
    config = case["scheduler"]
    steps = len(timesteps) if timesteps else int(case["steps"])
    schedule = make_schedule(config, steps, timesteps=timesteps)
    variant = _DCG_TYPES[int(guidance.get("dcg_type") or 3)]
    if guidance.get("kind") == "cfg":
        # At a scale of 1 and below there is one row, which diffusers then runs alone.
        scale = max(float(guidance["scale"]), 1.0)
        guidance, plan = {"alpha": scale, "beta": scale}, "exact"
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
        strength_for_tokens=False,  # recordings have the constants as they are
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
    no_face, face = tokens
    mask = None
    if most_tokens is not None:
        mask, lacking = token_mask(len(face), most_tokens), most_tokens - len(face)
        no_face, face = (np.pad(one, ((0, lacking), (0, 0))) for one in (no_face, face))

    def told(text: Array, pooled: Array, image_tokens: Array) -> Condition:
        return Condition(
            device.upload(text), device.upload(pooled), device.upload(image_tokens), mask
        )

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
    shared: Path | None = None,
    backend: str = "onnxruntime",
    names: Sequence[str] = (),
    plan: Plan = "full",
    cache: EngineCache | None = None,
    progress: Progress = lambda line: None,
) -> Tensors:
    """Run recorded cases and write `CASE.stepN.model_input|eps|guided|latents` to `out`.

    `eps` is [branches,C,h,w] in the order of the guidance variant (u, i, ti); with `plan="exact"`
    branches are skipped as in production and `model_input` and `eps` are left out. `shared` is the
    folder with the `unet/` of a set of recordings, whose cases say their order of branches and get
    `CASE.iptokens` too. Returns what was written. Needs the `export` extra, since engines are made
    from PyTorch weights.
    """
    recording = Recording(cases, tensors)
    provider = _UNetProvider(
        model, shared, recording, backend, cache or EngineCache(), progress, names
    )
    results: Tensors = {}
    for case in recording.select(names):
        name = str(case["name"])
        engine, guidance = provider.unet(case)
        tokens = provider.image_tokens(case)
        sample = make_sample(
            case, recording, tokens, plan, engine.device, provider.most_tokens(case)
        )
        order = VARIANTS[sample.request.dcg_variant][0]
        if "branches" in case:
            order = tuple(_BRANCHES[branch] for branch in case["branches"])
            of_face = [int(branch in (FACE, TEXT_AND_FACE)) for branch in order]
            results[f"{name}.iptokens"] = tokens[of_face]

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
    """UNets of a model folder by adapter and LoRA scale, on one backend."""

    def __init__(
        self,
        model: Path,
        shared: Path | None,
        recording: Recording,
        backend: str,
        cache: EngineCache,
        progress: Progress,
        names: Sequence[str],
    ) -> None:
        try:
            from fastface_trt.export.adapters import read_adapter
        except ImportError as error:
            raise MissingDependency(
                f"Replay exports the model first and needs {error.name}.",
                f"Install it with: {install_hint('export')}",
            ) from None
        self._recording, self._cache, self._progress = recording, cache, progress
        # Fail on an unknown backend before minutes of export.
        self._builder = (
            None if backend == "torch" else _builder(backend, recording.latent_sizes(names))
        )
        files = [p for p in sorted(model.glob("*")) if p.suffix in (".safetensors", ".bin")]
        self._unet_folder = (shared or model) / "unet"
        has_unet = (self._unet_folder / "config.json").is_file()
        if shared is not None and not (has_unet and files):
            raise WeightsError(
                f"{shared} does not hold a unet folder, or {model} no adapter file.",
                "Give the folder that the recordings share, and one adapter's model folder.",
            )
        if shared is None and not (has_unet and len(files) == 1):
            raise WeightsError(
                f"{model} does not hold a unet folder and exactly one adapter file.",
                "Lay it out as unet/config.json, unet/*.safetensors and one .safetensors or .bin.",
            )
        known = {file.name: file for file in files}
        wanted = {str(case.get("adapter_file", files[0].name)) for case in recording.select(names)}
        for name in wanted:
            if name not in known:
                raise UnknownName("adapter file", name, known)
        self._files = {name: known[name] for name in sorted(wanted)}
        self._adapters = {name: read_adapter(file) for name, file in self._files.items()}
        for name, adapter in self._adapters.items():
            if adapter.kind == "pulid":
                raise WeightsError(
                    f"{name} is a PuLID file; recordings are of IP-Adapters.",
                    "Replay it with the FaceID adapter that it was recorded with.",
                )
        self._engines: list[Engine] = []
        self._opened: dict[tuple[str, float], tuple[Engine, Guidance]] = {}

    def _name(self, case: Mapping[str, Any]) -> str:
        """The adapter file of a case."""
        return str(case.get("adapter_file", next(iter(self._files))))

    def most_tokens(self, case: Mapping[str, Any]) -> int | None:
        """The most image tokens of any case where the UNet takes a mask of them, else None."""
        adapter = self._adapters[self._name(case)]
        if adapter.kind not in PORTRAIT:
            return None
        return adapter.tokens * max(int(one.get("faces", 1)) for one in self._recording.cases)

    def unet(self, case: Mapping[str, Any]) -> tuple[Engine, Guidance]:
        """The UNet with the adapter of a case and its LoRA fused, and guidance for its device."""
        key = (self._name(case), float(case.get("faceid_lora_scale", 1.0)))
        if key not in self._opened:
            self._opened[key] = self._open(*key, self.most_tokens(case))
        return self._opened[key]

    def _open(self, name: str, lora_scale: float, most: int | None) -> tuple[Engine, Guidance]:
        tokens = most or self._adapters[name].tokens
        if self._builder is None:
            from fastface_trt.export.oracle import TorchUNet

            unet = self._torch_unet(name, lora_scale)
            return TorchUNet(unet, tokens, masked=most is not None), HostGuidance()
        from fastface_trt.export.oracle import export_unet_once

        identity = hashlib.sha256(repr(lora_scale).encode())
        for file in (self._files[name], *sorted(self._unet_folder.iterdir())):
            identity.update(f"{file.name}:{sha256_file(file)}".encode())
        export, folder = export_unet_once(
            self._cache.root / "replay",
            identity.hexdigest(),
            lambda: self._torch_unet(name, lora_scale),
            tokens,
            self._progress,
            masked=most is not None,
        )

        def opened(module: ModuleSpec, builder: EngineBuilder) -> Engine:
            self._engines.append(self._cache.open(module, folder, builder, self._progress))
            return self._engines[-1]

        engine = opened(export.module, self._builder)
        if isinstance(engine.device, HostDevice):
            return engine, HostGuidance()
        return engine, EngineGuidance(opened(export.guidance_step, self._builder))

    def _torch_unet(self, name: str, lora_scale: float) -> Any:
        from fastface_trt.export.adapters import attach_adapter
        from fastface_trt.export.sources import load_unet_folder

        unet = load_unet_folder(self._unet_folder)
        attach_adapter(unet, self._adapters[name], lora_scale=lora_scale)
        return unet

    def image_tokens(self, case: Mapping[str, Any]) -> Array:
        """Tokens [2, T, C] of no face and of the face, or of as many faces as the case has.

        Recorded tokens are used where they are among the inputs, so that the UNet is seen by
        itself; the projection's own deviation from them is reported.
        """
        name = str(case["name"])
        recorded = self._recording.input(name, "iptokens")
        projected = self._projected(case)
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
            self._progress(f"{name}: projection deviates from the recorded tokens by {off:.1e}")
        return tokens

    def _projected(self, case: Mapping[str, Any]) -> Array | None:
        """What the projection makes of the recorded embeddings, None where they are not there."""
        name, adapter = str(case["name"]), self._adapters[self._name(case)]
        key = str(case.get("face_embeddings", "input.id_embeds")).rpartition("input.")[2]
        embeddings = self._recording.input(name, key)
        if embeddings is None:
            return None
        if adapter.kind in PORTRAIT:
            faces = embeddings.reshape(-1, embeddings.shape[-1])[: int(case.get("faces", 1))]
            groups = [self._project(adapter, one) for one in (np.zeros_like(faces), faces)]
            return np.stack([tokens.reshape(-1, tokens.shape[-1]) for tokens in groups])
        both = np.concatenate((np.zeros_like(embeddings), embeddings))
        if adapter.kind == "faceid":
            return self._project(adapter, both)
        features, no_features = (
            self._recording.input(name, key) for key in ("clip_embeds", "negative_clip_embeds")
        )
        if features is None or no_features is None:
            return None
        return self._project(adapter, both, np.concatenate((no_features, features)))

    def _project(self, adapter: "AdapterWeights", *inputs: Array) -> Array:
        import torch

        from fastface_trt.export.adapters import load_projection

        with torch.inference_mode():
            projection = load_projection(adapter)
            tokens = projection(*(torch.from_numpy(array) for array in inputs))
        return np.asarray(tokens.numpy(), dtype=np.float32)

    def close(self) -> None:
        """Free the engines and their device."""
        for engine in self._engines:
            engine.close()
        if self._builder is not None and self._engines:
            self._builder.device().close()


__all__ = ["Recording", "make_sample", "read_manipulation", "replay"]
