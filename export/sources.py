"""The models of a checkpoint, checked by headers when they are named and loaded one at a time.

Loading is lazy because a full-size export would not fit otherwise: each model is loaded, exported
and dropped before the next. A `Part` knows beforehand where each of its weights lies, so that
whatever is missing, left over or of another shape stops the command before anything long.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastface_trt.checkpoints import HubItem
from fastface_trt.engines.manifest import Source
from fastface_trt.errors import WeightsError
from fastface_trt.export.file_kinds import identify, in_channels
from fastface_trt.export.full_size import sdxl_config
from fastface_trt.export.locations import (
    Located,
    is_local,
    locate,
    pick_weights,
    weights_errors,
)
from fastface_trt.export.number_formats import check_config
from fastface_trt.export.precision import Model
from fastface_trt.export.weight_files import WeightsFile, open_weights
from fastface_trt.export.weight_layouts import Found, Place, find_weights

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")

_NAMES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "first text encoder",
    "text_encoder_2": "second text encoder",
    "image_encoder": "image encoder",
}
_VAES = ("AutoencoderKL", "AutoencoderTiny")
_NEEDLESS = re.compile(
    r"(^|\.)(position_ids|logit_scale|num_batches_tracked|global_step)$"
    r"|^(model_ema|ema_model|denoiser|loss|first_stage_model\.loss)\."
    r"|^(log_one_minus_|sqrt_|posterior_|lvlb_)?(betas|alphas_cumprod|\w*_cumprod\w*|posterior_\w+"
    r"|lvlb_weights|logvar)$"
    r"|^conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?$"
    r"|^(v_pred|ztsnr|edm_\w+(\.\w+)?)$"
)
"""What files keep beside weights: buffers that a model computes itself, copies of training, marks
of the schedule (which `fastface_trt.export.base_facts` reads), CLIP-L's head that SDXL has none of.
"""
_COPIES = ("model_ema.", "ema_model.")
_OTHER_TOWER = re.compile(
    r"^(text_model|transformer|token_embedding|ln_final|text)\.|^(text_projection|attn_mask)"
    r"|^(positional_embedding|logit_bias)$"
)
"""The text half of a CLIP model whose image encoder is asked for."""


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint: its class and configuration, and where each weight lies."""

    what: str
    """For sentences: "UNet of x.safetensors"."""
    cls: Any
    config: Mapping[str, Any]
    places: Mapping[str, Place]

    def skeleton(self) -> Model:
        """The model on torch's meta device: names and shapes of its weights without values."""
        with weights_errors(f"The {self.what}"), torch.device("meta"):
            return _make(self.cls, self.config).eval()

    def load(self, dtype: torch.dtype) -> Model:
        """The model with its weights, all of `dtype`."""
        from accelerate import init_empty_weights

        with weights_errors(f"The {self.what}"):
            with init_empty_weights(include_buffers=False):
                model = _make(self.cls, self.config)
            wanted = model.state_dict()
            state: dict[str, Tensor] = {}
            uses: dict[int, dict[str, list[str]]] = {}
            files = {id(place.file): place.file for place in self.places.values()}
            for name, place in self.places.items():
                uses.setdefault(id(place.file), {}).setdefault(place.name, []).append(name)
            for key, names in uses.items():
                for spelled, tensor in files[key].items(names):
                    for name in names[spelled]:
                        value = self.places[name].take(tensor).reshape(wanted[name].shape)
                        state[name] = value.to(dtype).contiguous()
            model.load_state_dict(state, assign=True)
        return model.eval()


def _make(cls: Any, config: Mapping[str, Any]) -> Model:
    if cls.__module__.startswith("transformers"):
        return cls(cls.config_class.from_dict(dict(config)))
    return cls.from_config(dict(config))


def _class_of(component: str, config: Mapping[str, Any]) -> Any:
    import diffusers
    import transformers

    if component == "vae":
        return getattr(diffusers, config.get("_class_name", "AutoencoderKL"))
    return {
        "unet": diffusers.UNet2DConditionModel,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "image_encoder": transformers.CLIPVisionModelWithProjection,
    }[component]


def find_part(
    component: str, config: Mapping[str, Any], files: Sequence[WeightsFile], where: str
) -> tuple[Part, Found] | None:
    """The model `component` in `files`, None where they have nothing of it.

    Raises `WeightsError` where a weight is missing or of another shape.
    """
    what = f"{_NAMES[component]} of {where}"
    check_config(f"The {what}", config)
    cls = _class_of(component, config)
    bare = Part(what, cls, config, {})
    shapes = {name: tuple(t.shape) for name, t in bare.skeleton().state_dict().items()}
    found = find_weights(component, shapes, config, files)
    if found is None:
        return None
    faults = []
    if found.missing:
        faults.append(f"{_some(found.missing)} {_is(found.missing)} missing")
    if found.misshapen:
        spelled, has, wanted = found.misshapen[0]
        others = [name for name, *_ in found.misshapen]
        faults.append(
            f"{_some(others)} {_is(others)} of another shape ({spelled} is {list(has)} instead of "
            f"{list(wanted)})"
        )
    if faults:
        raise _misfit(component, what, faults, files)
    return Part(what, cls, config, found.places), found


def _misfit(
    component: str, what: str, faults: Sequence[str], files: Sequence[WeightsFile]
) -> WeightsError:
    channels = in_channels(files[0])
    kind = identify(files[0])
    if channels not in (None, 4) and "input channels" not in kind:
        kind += f" with {channels} input channels, as for inpainting or edits"
    return WeightsError(
        f"The {what}, {kind}, does not fit: {'; '.join(faults)}.",
        f"Give {_TAKES[component]}."
        if component in ("vae", "image_encoder")
        else "Use complete weights of one SDXL model; one of other sizes needs its configuration, "
        "as a diffusers folder or with --base-text FOLDER.",
    )


def _some(names: Sequence[str]) -> str:
    """ "3 tensors (a, b, c)": how many, and the first three."""
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({few})"


def _is(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _left_over(files: Iterable[WeightsFile], used: Collection[str], also: str = "") -> list[str]:
    """Names that no model uses, but for those that are needless or match `also`."""
    return [
        name
        for file in files
        for name in file.tensors
        if name not in used and not _NEEDLESS.search(name) and not (also and re.match(also, name))
    ]


def _refuse_left_over(
    component: str, what: str, names: Sequence[str], files: Sequence[WeightsFile]
) -> None:
    if names:
        raise _misfit(component, what, [f"{_some(names)} {_is(names)} of no place in it"], files)


def model_config(folder: Path) -> dict[str, Any]:
    """The configuration in a model's folder."""
    return _read_config(folder / "config.json", f"The model of {folder}")


def _read_config(file: Path, what: str) -> dict[str, Any]:
    with weights_errors(what):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def folder_part(folder: Path, component: str, dtype: torch.dtype, where: str) -> Part:
    """The model in a folder of its own, as diffusers and transformers write it."""
    what = f"{_NAMES[component]} of {where}"
    if not (folder / "config.json").is_file():
        raise WeightsError(f"The {what} has no configuration ({folder}/config.json).", _COMPLETE)
    config = _of_tower(_read_config(folder / "config.json", f"The {what}"), component)
    names = [path.name for path in folder.iterdir() if path.is_file()]
    picked = pick_weights(names, f"The {what}", dtype)
    try:
        files = [open_weights(folder / name) for name in picked]
    except WeightsError as error:
        raise WeightsError(f"{folder.name} of {where}: {error.message}", error.hint) from error
    result = find_part(component, config, files, where)
    if result is None:
        raise _misfit(component, what, ["none of its weights is there"], files)
    part, found = result
    tower = _OTHER_TOWER.pattern if component == "image_encoder" else ""
    _refuse_left_over(component, what, _left_over(files, found.used(), tower), files)
    return part


_COMPLETE = "Download the checkpoint completely, with every folder's config.json."


def _of_tower(config: dict[str, Any], component: str) -> dict[str, Any]:
    """A CLIP model's configuration holds those of both its towers."""
    tower = "vision_config" if component == "image_encoder" else "text_config"
    inner = config.get(tower)
    if not isinstance(inner, dict):
        return config
    return {"projection_dim": config.get("projection_dim", 512)} | inner


class CheckpointSource:
    """Models of one SDXL checkpoint: a diffusers folder, a hub id, or a single file.

    `config` is the registry's base, `base_text` where text encoders, tokenizers and configurations
    come from that a checkpoint has none of, `without` names models that others replace. `find`
    checks everything. Raises `WeightsError`.
    """

    def __init__(
        self,
        item: HubItem,
        dtype: torch.dtype,
        config: HubItem,
        *,
        base_text: HubItem | None = None,
        without: Collection[str] = (),
    ) -> None:
        self.dtype = dtype
        self.parts: dict[str, Part] = {}
        """The models by their names; others may be put in place of them."""
        self._wanted = [c for c in ("unet", "vae", *TEXT_ENCODERS) if c not in without]
        self.located = locate(item, "checkpoint", choose=self._choose)
        self.sources = [self.located.source]
        self.notes: list[str] = []
        self._without = without
        self.single_file = self.located.path if self.located.path.is_file() else None
        own_name = is_local(item) or self.single_file
        self.where = self.located.path.name if own_name else self.located.source.location
        self._text = self._locate_text(base_text)
        self._configs = [self._text.path] if self._text else []
        if self.single_file:
            self.folder = self._folder_of_tokenizers(config)
        else:
            self.folder = self.located.path
            self._configs.insert(0, self.folder)
            self._check_folder()

    def find(self) -> None:
        """Find every model's weights, by headers alone; raises `WeightsError`."""
        if self.single_file:
            from_text = self._find_in_file(open_weights(self.single_file))
        else:
            from_text = self._find_in_folder()
        if self._text:
            role = "text encoders and tokenizers" if from_text else "tokenizers"
            self.sources.append(self._text.source.model_copy(update={"role": role}))

    def _choose(self, names: Sequence[str]) -> list[str]:
        """Of a repository's files the configurations, the tokenizers and one set of weights."""
        if not any(name.startswith("unet/") for name in names):
            files = [n for n in names if n.endswith((".safetensors", ".ckpt")) and "/" not in n]
            raise WeightsError(
                "It is no SDXL pipeline in diffusers' layout: it has no folder unet.",
                f"Name one of its files: owner/name/{files[0]}." if files else _COMPLETE,
            )
        return _of_pipeline(names, self._wanted, self.dtype)

    def _locate_text(self, item: HubItem | None) -> Located | None:
        if item is None:
            return None

        def choose(names: Sequence[str]) -> list[str]:
            lacks = self.single_file is None or not _has_text(open_weights(self.single_file))
            return _of_pipeline(names, TEXT_ENCODERS if lacks else (), self.dtype)

        located = locate(item, "text encoders and tokenizers", choose=choose)
        if located.path.is_file():
            raise WeightsError(
                f"--base-text takes a diffusers folder or a hub id, and {located.path.name} is "
                f"{identify(open_weights(located.path))}.",
                "Give the folder that has text_encoder, text_encoder_2 and the tokenizers.",
            )
        return located

    def _folder_of_tokenizers(self, config: HubItem) -> Path:
        """Where a single file's tokenizers lie, and its scheduler: the registry's base, for which
        the hub is asked only without `base_text`."""
        if is_local(config):
            folder = locate(config, "configuration").path
            self._configs.append(folder)
            return folder
        if self._text:
            return self._text.path
        try:
            return locate(
                config, "tokenizers", choose=lambda names: _of_pipeline(names, (), self.dtype)
            ).path
        except WeightsError as error:
            raise WeightsError(
                f"{self.where} is one file, without tokenizers, and those of {config.location} "
                "cannot be fetched.",
                "Add --base-text FOLDER, an SDXL pipeline's folder with tokenizer and tokenizer_2, "
                "or go online.",
            ) from error

    def _find_in_file(self, file: WeightsFile) -> list[str]:
        """Fill `parts`; returns which are those of `base_text`."""
        used: set[str] = set()
        replaced, absent = "", []
        for component in ("unet", "vae", *TEXT_ENCODERS):
            if component in self._without:
                replaced += {"vae": r"|first_stage_model\.|vae\.", "unet": r"|model\."}[component]
                continue
            config = self._config_of_single(component)
            result = find_part(component, config, [file], self.where)
            if result:
                self.parts[component], found = result
                used |= found.used()
            else:
                absent.append(component)
        from_text = [name for name in absent if self._text and name in TEXT_ENCODERS]
        if absent != from_text:
            raise _lacking(self.where, file, [n for n in absent if n not in from_text])
        _refuse_left_over(
            "unet", f"checkpoint {self.where}", _left_over([file], used, replaced[1:]), [file]
        )
        for component in from_text:
            self.parts[component] = self._text_part(component)
        copies = sum(name.startswith(_COPIES) for name in file.tensors)
        if copies:
            self.notes.append(f"{self.where}: {copies} tensors are EMA copies and are left out")
        return from_text

    def _text_part(self, component: str) -> Part:
        if self._text is None:
            raise WeightsError(f"{self.where} has no {_NAMES[component]}.", _ADD["text_encoder"])
        where = self._text.source.location
        return folder_part(self._text.path / component, component, self.dtype, where)

    def _check_folder(self) -> None:
        _check_pipeline(self.folder, self.where)
        own_text = all((self.folder / name).is_dir() for name in (*TEXT_ENCODERS, *TOKENIZERS))
        if self._text and own_text:
            raise WeightsError(
                f"{self.where} has text encoders and tokenizers of its own.",
                "Leave out --base-text.",
            )

    def _find_in_folder(self) -> list[str]:
        from_text = []
        for component in self._wanted:
            folder = self.folder / component
            if folder.is_dir():
                self.parts[component] = folder_part(folder, component, self.dtype, self.where)
            elif component in TEXT_ENCODERS:
                self.parts[component] = self._text_part(component)
                from_text.append(component)
            else:
                hint = _ADD.get(component, _COMPLETE)
                raise WeightsError(f"{self.where} has no folder {component}.", hint)
        return from_text

    def _config_of_single(self, component: str) -> dict[str, Any]:
        for folder in self._configs:
            file = folder / component / "config.json"
            if file.is_file():
                return _read_config(file, f"The configuration of {component}")
        return sdxl_config(component)

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of `unet`, `vae`, `text_encoder`, `text_encoder_2` or `scheduler`.

        A single file has none; it gets that of `base_text`, of a local registry's base, or SDXL's,
        and a scheduler's only of the last two, since `base_text` does not say what it was trained
        with.
        """
        if component in self.parts:
            return dict(self.parts[component].config)
        if component == "scheduler":
            file = self.folder / "scheduler" / "scheduler_config.json"
            of_text = self.single_file and self._text and self.folder == self._text.path
            if not of_text and file.is_file():
                return _read_config(file, f"The scheduler of {self.where}")
            return sdxl_config("scheduler")
        return self._config_of_single(component)

    def skeleton(self, component: str) -> Model:
        """The component on torch's meta device: names and shapes of its weights without values."""
        if component in self.parts:
            return self.parts[component].skeleton()
        config = self.config(component)
        return Part(component, _class_of(component, config), config, {}).skeleton()

    def component(self, name: str) -> Model:
        """`unet` (without an adapter), `vae`, `text_encoder` or `text_encoder_2`."""
        if name not in self.parts:
            self.find()
        return self.parts[name].load(self.dtype)

    def tokenizer(self, name: str) -> Path:
        """The folder of `tokenizer` or `tokenizer_2`; that of `base_text` where it has one."""
        folders = [self._text.path, self.folder] if self._text else [self.folder]
        if not self.single_file:
            folders.reverse()
        for folder in folders:
            if (folder / name / "vocab.json").is_file() or (
                folder / name / "tokenizer.json"
            ).is_file():
                return folder / name
        raise WeightsError(
            f"{folders[0]} has no {name}.", "Download it completely, or add --base-text FOLDER|ID."
        )

    def force_zeros_for_empty_prompt(self) -> bool:
        """Whether an empty negative prompt means zero embeddings (true for SDXL base)."""
        index = self.folder / "model_index.json"
        if not index.is_file():
            return True
        return bool(json.loads(index.read_text()).get("force_zeros_for_empty_prompt", True))


_ADD = {
    "vae": "Add --vae FILE|FOLDER|ID, for example madebyollin/sdxl-vae-fp16-fix.",
    "text_encoder": "Add --base-text FOLDER|ID: the SDXL checkpoint whose text encoders it was "
    "made with, often stabilityai/stable-diffusion-xl-base-1.0.",
}


def _lacking(where: str, file: WeightsFile, absent: Sequence[str]) -> WeightsError:
    """The error of a single file that models are missing from, with an option for each."""
    if "unet" in absent:
        return WeightsError(
            f"{where} is {identify(file)} and has no UNet.",
            "--base takes an SDXL checkpoint: a diffusers folder, one file, or a hub id.",
        )
    names = " and no ".join(_NAMES[name] for name in absent)
    options = {_ADD.get(name, _ADD["text_encoder"]): None for name in absent}
    return WeightsError(f"{where} is {identify(file)}: it has no {names}.", " ".join(options))


def _has_text(file: WeightsFile) -> bool:
    return any(name.startswith("conditioner.") for name in file.tensors)


def _of_pipeline(names: Sequence[str], weights: Iterable[str], dtype: torch.dtype) -> list[str]:
    """Of a pipeline's files its configurations, tokenizers, and the weights of some models."""
    chosen = [n for n in names if n.endswith("config.json") or n == "model_index.json"]
    chosen += [n for n in names if n.startswith(("tokenizer/", "tokenizer_2/"))]
    for component in weights:
        below = [n.partition("/")[2] for n in names if n.startswith(f"{component}/")]
        if below:
            picked = pick_weights(below, f"The folder {component}", dtype)
            chosen += [f"{component}/{name}" for name in picked]
    return sorted(set(chosen))


def _check_pipeline(folder: Path, where: str) -> None:
    """Refuse a folder that is no SDXL pipeline, saying what it is."""
    index = folder / "model_index.json"
    if index.is_file():
        name = str(_read_config(index, f"{where}").get("_class_name"))
        if not name.startswith("StableDiffusionXL"):
            raise WeightsError(f"{where} is a {name}, not SDXL.", "--base takes SDXL checkpoints.")
        return
    if (folder / "unet").is_dir():
        return
    inner = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    files = [p for s in ("safetensors", "ckpt") for p in sorted(folder.glob(f"*.{s}"))]
    if inner:
        hint = f"Name the folder in it: {folder / inner[0]}."
    elif (folder / "config.json").is_file():
        hint = "It is the folder of one model: name the pipeline's folder above it."
    elif files:
        hint = f"Name the file in it: {files[0]}."
    else:
        hint = "A diffusers folder has unet, vae, text_encoder, text_encoder_2 and tokenizers."
    raise WeightsError(f"{where} is no SDXL checkpoint: it has no folder unet.", hint)


def load_unet_folder(folder: Path) -> Model:
    """A UNet from its diffusers folder, in float32."""
    return folder_part(folder, "unet", torch.float32, str(folder)).load(torch.float32)


def single_part(
    component: str, item: HubItem, config: Mapping[str, Any], role: str
) -> tuple[Part, Source]:
    """A model that is one file, in any layout that it is shared in, with `config`."""
    located = locate(item, role)
    file, what = open_weights(located.path), f"{_NAMES[component]} of {located.path.name}"
    result = find_part(component, config, [file], located.path.name)
    if result is None:
        option = "--" + component.replace("_", "-")
        raise WeightsError(
            f"{located.path.name} is {identify(file)}; {option} takes {_TAKES[component]}.",
            f"Give {_TAKES[component]}.",
        )
    part, found = result
    tower = _OTHER_TOWER.pattern if component == "image_encoder" else ""
    _refuse_left_over(component, what, _left_over([file], found.used(), tower), [file])
    return part, located.source


_TAKES = {
    "unet": "an SDXL UNet",
    "vae": "an SDXL VAE, as a folder or one file",
    "image_encoder": "the CLIP ViT-H vision model of IP-Adapter, as a folder or one file",
}


def model_part(
    component: str,
    item: HubItem,
    dtype: torch.dtype,
    config: Mapping[str, Any],
    *,
    inside: Sequence[str] = (),
) -> tuple[Part, Path, Source]:
    """A VAE or an image encoder of its own: its folder, a pipeline's folder that has it under one
    of the names `inside`, or one file, whose configuration is `config`. With where it lies."""
    places = ("", *inside)

    def choose(names: Sequence[str]) -> list[str]:
        for place in places:
            below = [n.removeprefix(f"{place}/") for n in names if _is_below(n, place)]
            if "config.json" in below:
                picked = pick_weights(
                    [n for n in below if "/" not in n], f"The {_NAMES[component]}", dtype
                )
                wanted = [*picked, "config.json", "preprocessor_config.json"]
                return [f"{place}/{n}" if place else n for n in wanted if n in below]
        raise WeightsError(
            f"{item.location} has no config.json of a model; it holds {', '.join(names[:6])}.",
            f"Give {_TAKES[component]}: name a folder or file in it, or another.",
        )

    one_file = (Path(item.location).expanduser() / (item.path or "")).is_file()
    if one_file or (item.path and "." in Path(item.path).name):
        part, source = single_part(component, item, config, component)
        return part, Path(item.location), source
    if is_local(item):
        root = Path(item.location).expanduser() / (item.path or "")
        within = (p for p in places if (root / p / "config.json").is_file())
        item = replace(item, location=str(root), path=next(within, "") or None)
    located = locate(item, component, choose=choose)
    within = (p for p in places if (located.path / p / "config.json").is_file())
    place = next(within, None)
    if place is None:
        names = sorted(path.name for path in located.path.iterdir())
        raise WeightsError(
            f"{located.path} has no config.json of a model; it holds {', '.join(names[:6])}.",
            f"Give {_TAKES[component]}: name a folder or file in it, or another.",
        )
    folder = located.path / place
    stated = _read_config(folder / "config.json", f"The {_NAMES[component]} of {folder}")
    if component == "vae" and stated.get("_class_name") not in _VAES:
        raise WeightsError(
            f"{folder} is of a {stated.get('_class_name')}, not a VAE that SDXL latents fit.",
            f"Give {_TAKES['vae']}.",
        )
    return folder_part(folder, component, dtype, located.source.location), folder, located.source


def _is_below(name: str, place: str) -> bool:
    return name.startswith(f"{place}/") if place else True


def quiet_libraries() -> None:
    """Switch off progress bars and notices of diffusers, transformers and the hub client's loader.

    For commands only: it changes the libraries' own settings for the whole process.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
