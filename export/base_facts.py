"""What a base says about itself, and what an export makes of it.

**The merge rule.** The manifest's scheduler is the registry's class and spacing (they belong to the
distillation: where it asks the network, and how it steps) with the base's facts: betas, prediction
type and zero terminal SNR (they belong to the weights). A base of EDM keeps its own schedule, with
Euler's steps, and takes no distillation. What a sampler would do beyond that to every picture
(thresholding, clipping, continuous timesteps, flow matching) is refused; how the base's own sampler
would have spaced its steps (Karras and the like) is said and not used.

A diffusers folder says it in `scheduler_config.json`, as diffusers reads it with the defaults of
its class; a single file in marker tensors (`v_pred`, `ztsnr`, `edm_mean`, `edm_std`,
`edm_vpred.sigma_max`, `edm_vpred.sigma_min`) and in its metadata (modelspec's and kohya's).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastface_trt.checkpoints import Checkpoint, HubItem
from fastface_trt.engines.engine import Progress
from fastface_trt.errors import FastFaceError, InvalidRequest, WeightsError
from fastface_trt.export.adapters import AdapterWeights
from fastface_trt.export.file_kinds import TEXT_WIDTHS, identify, in_channels, text_width
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.precision import Model
from fastface_trt.export.sources import CheckpointSource
from fastface_trt.export.weight_files import WeightsFile, open_weights
from fastface_trt.runtime.schedule import EDM, NETWORK_KEYS, make_schedule, with_network_of

MARKERS = frozenset(
    {
        "v_pred",
        "ztsnr",
        "edm_mean",
        "edm_std",
        "edm_vpred.sigma_max",
        "edm_vpred.sigma_min",
    }
)
"""Tensors of a single file that are no weights but say how its network was trained."""

UNET_PREFIX = "model.diffusion_model."

_OPTIONS = {" of SDXL": "--lora", "VAE": "--vae", "Adapter": "--adapter", "adapter": "--adapter"}
"""Options that take what `identify` says with such a word."""
_TAKES = "--base takes a text-to-image SDXL checkpoint: a diffusers folder, single file or hub id."
_FIX_CONFIGURATION = "If its scheduler_config.json is wrong about that, correct it there."

_SPACINGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)
_PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "v-pred": "v_prediction",
    "vpred": "v_prediction",
    "velocity": "v_prediction",
    "sample": "sample",
    "x0": "sample",
}
"""Words of metadata by diffusers' names."""

_DISTILLED = re.compile(
    r"lightning|turbo|dmd2|(?<![a-z])(lcm|tcd)(?![a-z])|hyper[-_ ]?(sd|xl)|hyper(?![a-z]|[-_ ]real)"
    r"|(?<!\d)[1-9][-_ ]?steps?(?![a-z])"
)
"""Words in the name of a checkpoint that say that it was distilled, in lower case."""

_PLAYGROUND = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
_PLAYGROUND_SCALING = 0.5
_COSXL = {"sigma_min": 0.002, "sigma_data": 1.0, "sigma_schedule": "exponential"}


@dataclass(frozen=True)
class LatentSpace:
    """From a UNet's latents x to its VAE's: z = x · std / scaling_factor + mean + shift, where std
    is 1 and mean and shift 0 if they are None."""

    scaling_factor: float
    shift_factor: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class BaseFacts:
    """What an export takes from its base.

    scheduler: the manifest's. size: (height, width) in pixels that it was made for. vae_overflows:
    whether it says that its VAE does in float16. distillation: the LoRA that is to be fused, with
    `{steps}` in its path.
    """

    name: str
    scheduler: dict[str, Any]
    size: tuple[int, int]
    latents: LatentSpace
    vae_overflows: bool
    distillation: HubItem | None

    def check_vae(self, vae: Model, name: str) -> None:
        """Give a VAE that stands in for the base's own the latents of the base, or refuse it."""
        channels, scaling = vae.config.latent_channels, vae.config.scaling_factor
        if channels != 4:
            raise WeightsError(
                f"{name} is a VAE of {channels} latent channels; SDXL's have 4.",
                "Give a VAE of SDXL.",
            )
        if vae.config._class_name == "AutoencoderTiny":  # its latents are the scaled ones
            return
        said = "scaling_factor" not in vae.config.get("_use_default_values", ())
        if said and abs(scaling / self.latents.scaling_factor - 1) > 1e-4 and not self.latents.mean:
            raise WeightsError(
                f"{name} is a VAE for latents scaled by {scaling}, {self.name} scales them by "
                f"{self.latents.scaling_factor}.",
                "Give a VAE of SDXL; if its config.json is wrong, correct scaling_factor there.",
            )
        self.give_latents(vae)

    def give_latents(self, vae: Model) -> None:
        """Write the base's latents into a VAE's configuration, where its decoder looks."""
        vae.register_to_config(
            scaling_factor=self.latents.scaling_factor,
            shift_factor=self.latents.shift_factor,
            latents_mean=self.latents.mean,
            latents_std=self.latents.std,
        )


def read_base(
    options: ExportOptions,
    source: CheckpointSource,
    adapter: AdapterWeights,
    progress: Progress,
) -> BaseFacts:
    """What the base of an export says, from configurations and headers alone.

    Raises `WeightsError` for a base that is no text-to-image SDXL or that the adapter does not fit,
    `InvalidRequest` for options that contradict it. `progress` is told what is replaced.
    """
    entry, name = options.checkpoint, base_name(options.base or options.checkpoint.base)
    file = open_weights(source.single_file) if source.single_file else None
    _refuse_other_models(name, source, file)
    _check_adapter(name, source, file, adapter)
    latents, overflows = _latent_space(name, source, file)
    if options.tiny_vae and latents.mean:
        raise InvalidRequest(
            f"{name} normalises its latents, which no tiny VAE undoes.", "Leave out --tiny-vae."
        )
    network, own = (
        _network_of_file(name, file, options) if file else _network_of_folder(name, source, options)
    )
    distillation = _distillation(options, name, _distilled_words(name, file, own), progress)
    scheduler = _merged(options, name, network, own, distillation, progress)
    size = _size(source, file) if options.base else (entry.size, entry.size)
    return BaseFacts(name, scheduler, size, latents, overflows, distillation)


def base_name(item: HubItem) -> str:
    """What messages call a base: the hub's name, or the last part of a path."""
    local = Path(item.location).expanduser()
    return Path(item.path).name if item.path else local.name if local.exists() else item.location


# What it is


def _refuse_other_models(name: str, source: CheckpointSource, file: WeightsFile | None) -> None:
    """Refuse whatever is not SDXL from text to image, saying what it is instead."""

    def refuse(what: str, hint: str = _TAKES) -> NoReturn:
        raise WeightsError(f"{name} is {what}.", hint)

    if file:
        _refuse_other_files(file, source.config("unet"), refuse)
        return
    index = source.folder / "model_index.json"
    pipeline = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    said = pipeline.get("_class_name")
    if pipeline.get("requires_aesthetics_score"):
        refuse(_REFINER)
    if said and not (source.folder / "unet").is_dir():
        refuse(f"a checkpoint for {said}, which is not SDXL")
    _refuse_other_unets(source.config("unet"), refuse)


def _refuse_other_files(
    file: WeightsFile, config: Mapping[str, Any], refuse: Callable[..., NoReturn]
) -> None:
    unet = {k: v for k, v in file.tensors.items() if k.startswith(UNET_PREFIX)}
    phrase = identify(file)
    channels = in_channels(file) if unet or " UNet" in phrase else None
    if channels not in (None, 4) and "input channels" not in phrase:
        refuse(_other_use(channels))
    fits = (
        bool(unet)
        and in_channels(file) == config["in_channels"]
        and text_width(file) == config["cross_attention_dim"]
        and UNET_PREFIX + "label_emb.0.0.weight" in unet
    )
    alone = ("an SDXL UNet", f"a UNet for text of width {config['cross_attention_dim']}")
    if not fits and phrase not in alone:  # what it lacks is said where it is loaded
        option = next((option for word, option in _OPTIONS.items() if word in phrase), None)
        refuse(phrase, *([f"Give it with {option} beside a base."] if option else []))
    out = unet.get(UNET_PREFIX + "out.2.weight")
    if out is not None and out.shape[0] != config["out_channels"]:
        refuse(f"{phrase} that predicts {out.shape[0]} channels instead of 4")
    if any("cond_proj" in key for key in unet):
        refuse(*_GUIDANCE_EMBEDDED)


_REFINER = "an SDXL refiner, which only goes on with another model's pictures"
_GUIDANCE_EMBEDDED = (
    "a UNet that was distilled with its guidance as an input (time_cond_proj_dim), which decoupled "
    "guidance cannot give",
    "Use --checkpoint lcm with the base that it was distilled from: its LoRA does the same.",
)


def _refuse_other_unets(config: Mapping[str, Any], refuse: Callable[..., NoReturn]) -> None:
    kind, width = config.get("_class_name"), config.get("cross_attention_dim") or 0
    if kind not in (None, "UNet2DConditionModel"):
        refuse(f"a checkpoint whose UNet is {kind}, which is not SDXL's")
    if config.get("encoder_hid_dim_type"):
        refuse(
            f"a UNet that reads something besides text ({config['encoder_hid_dim_type']}, such as "
            "Kolors)"
        )
    if config.get("addition_embed_type") != "text_time":
        refuse(f"a checkpoint of {TEXT_WIDTHS.get(width, 'another model')}, not of SDXL")
    channels = config.get("in_channels", 4)
    if channels != 4:
        refuse(_other_use(channels))
    pooled = config.get("projection_class_embeddings_input_dim") or 0
    times = config.get("addition_time_embed_dim") or 0
    if width == 1280 or (width == 2048 and pooled - 5 * times == 1280):
        refuse(_REFINER)
    if config.get("out_channels", 4) != 4:
        refuse(f"a UNet that predicts {config['out_channels']} channels instead of 4")
    if config.get("time_cond_proj_dim"):
        refuse(*_GUIDANCE_EMBEDDED)
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        refuse("a UNet with classes as an input, which is not SDXL's")


def _other_use(channels: int | None) -> str:
    use = {5: "a depth", 7: "an upscaling", 8: "an edit", 9: "an inpainting"}.get(channels or 0)
    return f"{use or 'a'} checkpoint whose UNet has {channels} input channels instead of 4"


def _check_adapter(
    name: str, source: CheckpointSource, file: WeightsFile | None, adapter: AdapterWeights
) -> None:
    """Refuse a UNet with fewer cross-attention layers than its configuration or the adapter has."""
    bones = source.skeleton("unet")
    layers = [
        tuple(bones.get_submodule(layer.removesuffix(".processor")).to_k.weight.shape)
        for layer in bones.attn_processors
        if layer.endswith("attn2.processor")
    ]
    if file:
        found = Counter(
            header.shape
            for key, header in file.tensors.items()
            if key.endswith("attn2.to_k.weight")
        )
        if found and found != Counter(layers):
            raise WeightsError(
                f"{name} is {_reduced(file)}: {found.total()} cross-attention layers instead of "
                f"{len(layers)}.",
                "Use a checkpoint with all of SDXL's layers; one with others works as a diffusers "
                "folder with an adapter that was trained for it.",
            )
    mine = sum(key.endswith("to_k_ip.weight") for key in adapter.ip_adapter)
    if mine > len(layers):
        raise WeightsError(
            f"{name} is a reduced SDXL checkpoint (SSD-1B, Vega or KOALA): its UNet has "
            f"{len(layers)} cross-attention layers, the adapter is for {mine}.",
            "Use a base with all of SDXL's layers, or an adapter that was trained for this one.",
        )


def _reduced(file: WeightsFile) -> str:
    phrase = identify(file)
    return phrase if "reduced" in phrase else f"{phrase} with other layers"


# How it was trained


def _network_of_folder(
    name: str, source: CheckpointSource, options: ExportOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `scheduler_config.json` says of the network (the registry, if absent), and all of it."""
    import diffusers

    if not (source.folder / "scheduler" / "scheduler_config.json").is_file():
        return dict(options.checkpoint.scheduler), {}
    said = source.config("scheduler")
    kind = str(said.get("_class_name"))
    cls = getattr(diffusers, kind, None)
    if cls is None or not hasattr(cls, "set_timesteps"):
        raise WeightsError(
            f"{name} says that its scheduler is {kind}, which diffusers does not have.",
            _FIX_CONFIGURATION,
        )
    own = {"class": kind}
    for key, parameter in signature(cls.__init__).parameters.items():
        if parameter.default is not parameter.empty:
            own[key] = said.get(key, parameter.default)
    _refuse_other_arithmetic(name, own)
    if kind.startswith("EDM"):
        keys = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "prediction_type")
        return {"class": EDM, **{key: own[key] for key in keys if key in own}}, own
    return {key: own[key] for key in NETWORK_KEYS if own.get(key) is not None}, own


def _refuse_other_arithmetic(name: str, own: Mapping[str, Any]) -> None:
    flow = "flow" in str(own.get("prediction_type")).lower() or own.get("use_flow_sigmas")
    refused = {
        "flow matching": "Flow" in own["class"] or flow,
        "thresholding": own.get("thresholding"),
        "clip_sample": own.get("clip_sample"),
        "noise that is not given by betas": "beta_start" not in own
        and not own["class"].startswith("EDM"),
        "continuous timesteps": own.get("timestep_type") == "continuous",
        "final_sigmas_type": own["class"].startswith("EDM")
        and own.get("final_sigmas_type", "zero") != "zero",
    }
    what = next((word for word, is_so in refused.items() if is_so), None)
    if what:
        raise WeightsError(
            f"{name} says that its sampler ({own['class']}) uses {what}, which the schedules of "
            "this program do not.",
            _FIX_CONFIGURATION,
        )


def _network_of_file(
    name: str, file: WeightsFile, options: ExportOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a single file's markers and metadata say of the network; the registry's else."""
    markers = MARKERS & file.tensors.keys()
    if len(markers & {"edm_mean", "edm_std"}) == 1:
        raise WeightsError(
            f"{name} holds only one of edm_mean and edm_std, which undo its latents' "
            "normalisation together.",
            "Download it again, or use the diffusers folder of this checkpoint.",
        )
    if "edm_mean" in markers:
        return {"class": EDM, **_PLAYGROUND, "prediction_type": "epsilon"}, {}
    if "edm_vpred.sigma_max" in markers:
        values = {key: float(tensor) for key, tensor in _tensors(file, "edm_vpred.").items()}
        facts = {key.removeprefix("edm_vpred."): value for key, value in values.items()}
        return {"class": EDM, **_COSXL, **facts, "prediction_type": "v_prediction"}, {}
    network = dict(options.checkpoint.scheduler)
    prediction = _prediction_of_file(name, file, options)
    if prediction:
        network["prediction_type"] = prediction
    zero = "ztsnr" in markers or _true(file.metadata.get("ss_zero_terminal_snr"))
    if zero:
        network["rescale_betas_zero_snr"] = True
    return network, {}


def _prediction_of_file(name: str, file: WeightsFile, options: ExportOptions) -> str | None:
    said = {"v_pred": "v_prediction"} if "v_pred" in file.tensors else {}
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        word = file.metadata.get(key, "").strip().lower()
        if word and word not in _PREDICTIONS:
            raise WeightsError(
                f"{name} predicts {word!r} ({key}), for which there are no schedules here.",
                "Use a checkpoint that predicts epsilon, v or the sample.",
            )
        if word:
            said[key] = _PREDICTIONS[word]
    if _true(file.metadata.get("ss_v_parameterization")):
        said["ss_v_parameterization"] = "v_prediction"
    if len(set(said.values())) > 1 and options.prediction_type is None:
        words = ", ".join(f"{kind} ({key})" for key, kind in said.items())
        raise WeightsError(
            f"{name} contradicts itself about what it predicts: {words}.",
            "Say which is right: --prediction-type epsilon or v_prediction.",
        )
    return next(iter(said.values()), None)


def _true(word: str | None) -> bool:
    return (word or "").strip().lower() in ("true", "1")


def _tensors(file: WeightsFile, prefix: str) -> dict[str, torch.Tensor]:
    return dict(file.items([name for name in file.tensors if name.startswith(prefix)]))


def _merged(
    options: ExportOptions,
    name: str,
    network: dict[str, Any],
    own: Mapping[str, Any],
    distillation: HubItem | None,
    progress: Progress,
) -> dict[str, Any]:
    """The manifest's scheduler by the merge rule; every number of steps is tried on it."""
    entry = options.checkpoint
    said = (
        ("prediction_type", options.prediction_type),
        ("rescale_betas_zero_snr", options.zero_snr),
    )
    network |= {key: value for key, value in said if value is not None}
    if not network.get("rescale_betas_zero_snr"):
        network.pop("rescale_betas_zero_snr", None)
    if network.get("class") == EDM and (distillation or (entry.unet and not options.base)):
        raise InvalidRequest(
            f"{name} is a checkpoint of EDM, and {entry.name} was distilled for another schedule.",
            "Use --checkpoint base with it.",
        )
    scheduler = with_network_of(entry.scheduler, network)
    if own.get("class") == scheduler["class"] == "LCMScheduler":
        scheduler |= {key: own[key] for key in ("original_inference_steps", "timestep_scaling")}
    for steps in {options.steps or entry.steps, min(entry.allowed_steps)}:
        try:
            make_schedule(scheduler, steps)
        except FastFaceError as error:
            raise WeightsError(f"{name} cannot be scheduled. {error.message}", error.hint) from None
    kind, prediction = scheduler["class"], scheduler["prediction_type"]
    spacing = next((f" with {key}" for key in _SPACINGS if own.get(key)), "")
    if spacing or (options.base and own and own["class"] != kind):
        whose = "its first order" if kind == EDM else f"that of checkpoint {entry.name}"
        progress(f"{name}: its own sampler ({own['class']}{spacing}) gives way to {whose} ({kind})")
    if prediction != "epsilon" or scheduler.get("rescale_betas_zero_snr"):
        zero = " with zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
        progress(f"{name}: {prediction}{zero}, which {kind} is set to")
        if distillation:
            progress(
                f"{name}: distillation LoRAs are made for networks that predict epsilon; on one "
                f"of {prediction} pictures may be worse than --checkpoint base with more steps"
            )
    return scheduler


# Whether it is distilled already


def _distilled_words(name: str, file: WeightsFile | None, own: Mapping[str, Any]) -> str | None:
    """Why a base seems to be distilled, as the end of a sentence; None where it does not."""
    if own.get("class") in ("LCMScheduler", "TCDScheduler"):
        return f"its scheduler is {own['class']}"
    titles = {"its name": name}
    if file:
        titles["its title"] = file.metadata.get("modelspec.title", "")
    for what, title in titles.items():
        found = _DISTILLED.search(Path(title).name.lower())
        if found:
            return f'{what} says "{found[0]}"'
    return None


def _distillation(
    options: ExportOptions, name: str, words: str | None, progress: Progress
) -> HubItem | None:
    """The distillation LoRA to fuse into the base; raises where nobody knows whether to."""
    entry, asked = options.checkpoint, options.distillation_lora
    other = options.base is not None and not _is_base_of(entry, options.base)
    if asked:
        if words and other:
            progress(f"{name}: {words}, and a distillation LoRA is fused into it all the same")
        return asked
    if not other:
        return entry.lora if options.base or not entry.unet else None
    if options.base_is_distilled:
        return None
    if entry.distilled_base:
        raise InvalidRequest(
            f"Nothing distils {name} for checkpoint {entry.name}, which is a distilled base itself "
            "and has no LoRA.",
            "Add --base-is-distilled if it was made from it, or use --checkpoint hyper or "
            "lightning, which fuse their LoRA.",
        )
    if entry.lora and words and options.base_is_distilled is None:
        raise InvalidRequest(
            f"{name} seems to be distilled already ({words}), and checkpoint {entry.name} would "
            "fuse a distillation LoRA into it.",
            "Add --base-is-distilled to leave the LoRA out, or --base-is-not-distilled to fuse it.",
        )
    return entry.lora


def _is_base_of(entry: Checkpoint, base: HubItem) -> bool:
    return base.location.partition("@")[0] == entry.base.location and not base.path


# Its sizes and latents


def _latent_space(
    name: str, source: CheckpointSource, file: WeightsFile | None
) -> tuple[LatentSpace, bool]:
    """The latents that the base was trained with, and whether its VAE overflows in float16."""
    config = source.config("vae")
    overflows = bool(config.get("force_upcast", True))
    if file and {"edm_mean", "edm_std"} <= file.tensors.keys():
        values = _tensors(file, "edm_")
        statistics = (tuple(values[key].flatten().tolist()) for key in ("edm_mean", "edm_std"))
        return LatentSpace(_PLAYGROUND_SCALING, None, *statistics), overflows
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise WeightsError(
            f"{name} is a checkpoint whose VAE is {kind}; SDXL's is another.", _TAKES
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise WeightsError(
            f"The VAE of {name} has only one of latents_mean and latents_std.",
            "Correct its config.json: both, or none.",
        )
    return (
        LatentSpace(
            float(config.get("scaling_factor", 0.18215)),
            config.get("shift_factor"),
            tuple(mean) if mean is not None else None,
            tuple(std) if std is not None else None,
        ),
        overflows,
    )


def _size(source: CheckpointSource, file: WeightsFile | None) -> tuple[int, int]:
    """(height, width) in pixels that a base was made for: `sample_size`, or modelspec's."""
    unet, vae = source.config("unet"), source.config("vae")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    sample = unet.get("sample_size") or 128
    height, width = (sample, sample) if isinstance(sample, int) else tuple(sample)
    size = height * factor, width * factor
    said = re.fullmatch(
        r"(\d+)\s*[x×,]\s*(\d+)", (file.metadata if file else {}).get("modelspec.resolution", "")
    )
    unit = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    if said and int(said[1]) % unit == 0 == int(said[2]) % unit:
        size = int(said[2]), int(said[1])
    return size
