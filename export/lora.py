"""LoRA files of every layout in the wild, read by one reader and fused into a checkpoint's weights.

A file's names are taken apart into what they name (a module) and what they hold of it (a part:
`down`, `up`, `alpha`, `hada_w1_a` …). Modules are found by their name with underscores for dots, in
a table made from the checkpoint itself: diffusers' names, and for the UNet those of the original
code. So `unet.…`, `lora_unet_…`, `diffusion_model.…` and `base_model.model.…` are one lookup.

A file is planned from its header before anything is exported: every tensor has a place and every
product the shape of its weight, or the file is refused. Each change is computed from the
checkpoint's own weight and they are added up, so that the order of files does not matter:

    W ← W + Σ scale · ΔW,   ΔW = alpha / rank · P
    P = up · down                                LoRA; of convolutions with a core, up · core · down
    P = (w1_a · w1_b) ⊙ (w2_a · w2_b)            LoHa, of KohakuBlueleaf's LyCORIS
    P = w1 ⊗ w2, each whole or a product         LoKr, of LyCORIS
    P = diff                                     a whole difference, without alpha
    ΔW = m · V / ‖V‖ - W,  V = W + alpha / rank · P        DoRA (Liu et al. 2024), of any P

‖V‖ is taken over each row, or each column where the magnitude m has one value per column.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastface_trt.checkpoints import HubItem
from fastface_trt.engines.manifest import LoraFused, LoraPart, LoraRole, Source
from fastface_trt.errors import WeightsError
from fastface_trt.export.file_kinds import OTHER_MODELS, family, identify, is_reduced, lora_kind
from fastface_trt.export.locations import locate
from fastface_trt.export.precision import Model
from fastface_trt.export.sources import CheckpointSource
from fastface_trt.export.weight_files import WeightsFile, open_weights
from fastface_trt.export.weight_layouts import OriginalUNet

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_FOLDER_FILES = ("pytorch_lora_weights", "adapter_model", "pytorch_lora_weights_fp16")
_SUFFIXES = (".safetensors", ".bin", ".pt")
_CONFIG = "adapter_config.json"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_ADAPTER = r"(?:\.(?!weight$)[^.]+)?"  # PEFT's name of an adapter, "default" in most files
_PARTS = (
    (
        "down",
        rf"(?:\.lora_(?:down|A){_ADAPTER}(?:\.weight)?|[._]lora(?:_linear_layer)?\.down\.weight)$",
    ),
    ("up", rf"(?:\.lora_(?:up|B){_ADAPTER}(?:\.weight)?|[._]lora(?:_linear_layer)?\.up\.weight)$"),
    ("mid", r"\.lora_mid\.weight$"),
    ("alpha", r"(?:[._]lora(?:_linear_layer)?)?\.alpha$"),
    ("dora", r"\.dora_scale$"),
    ("magnitude", rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?$"),
    ("diff", r"\.(?:diff|w_norm)$"),
    ("diff_b", r"\.(?:diff_b|b_norm)$"),
    ("", rf"\.((?:hada|lokr)_[wt][12](?:_[ab])?){_ADAPTER}$"),
)
_PART_PATTERNS = tuple((part, re.compile(pattern)) for part, pattern in _PARTS)

_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("text_encoder_2_", "text_encoder_2"),
    ("text_encoder_1_", "text_encoder"),
    ("text_encoder_", "text_encoder"),
    ("te1_", "text_encoder"),
    ("te2_", "text_encoder_2"),
    ("te_", "text_encoder"),
    ("clip_l_", "text_encoder"),
    ("clip_g_", "text_encoder_2"),
    ("conditioner_embedders_0_", "text_encoder"),
    ("conditioner_embedders_1_", "text_encoder_2"),
    ("unet_", "unet"),
    ("diffusion_model_", "unet"),
    ("text_encoders_", None),
    ("base_model_model_", None),
    ("lora_", None),
    ("lycoris_", None),
    ("model_", None),
    ("transformer_", None),
)
"""Beginnings of names, some of which say the component; several may stand one after the other."""

_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

Place = tuple[str, str]
"""A component and the name of a module in it."""


@dataclass(frozen=True)
class LoraRequest:
    """A file to fuse: what was asked for, and what for."""

    item: HubItem
    scale: float
    role: LoraRole

    @property
    def option(self) -> str:
        """The option that takes such a file."""
        return "--distillation-lora" if self.role == "distillation" else "--lora"


@dataclass(frozen=True)
class Update:
    """What a file has for one module: its tensors' names by part, and the factor of their product.

    `factor` is alpha / rank.
    """

    names: Mapping[str, str]
    factor: float

    @property
    def kind(self) -> str:
        """lora, loha, lokr or difference; dora, dora-loha … where there are magnitudes."""
        kind = _kind(self.names)
        if not self.names.keys() & {"dora", "magnitude"}:
            return kind
        return "dora" if kind == "lora" else f"dora-{kind}"


@dataclass(frozen=True)
class LoraPlan:
    """A file whose every tensor has a place; `updates` by component and module."""

    request: LoraRequest
    source: Source
    file: WeightsFile
    updates: Mapping[str, Mapping[str, Update]]

    def record(self) -> LoraFused:
        """The manifest's entry."""
        parts = {
            component: LoraPart(
                modules=len(updates),
                alphas=sum("alpha" in update.names for update in updates.values()),
                kinds=dict(Counter(update.kind for update in updates.values())),
            )
            for component, updates in self.updates.items()
        }
        return LoraFused(
            role=self.request.role,
            scale=self.request.scale,
            location=self.source.location,
            file=self.file.path.name,
            sha256=self.source.sha256,
            tensors=len(self.file.tensors),
            components=parts,
        )

    def tensors(self, component: str) -> dict[str, Tensor]:
        """The file's tensors for one component by their names, read from the disk."""
        wanted = {n for u in self.updates.get(component, {}).values() for n in u.names.values()}
        if not wanted:
            return {}
        return {name: tensor for name, tensor in self.file.items() if name in wanted}


def plan_loras(requests: Sequence[LoraRequest], source: CheckpointSource) -> list[LoraPlan]:
    """Plan every file against the checkpoint; raises `WeightsError` for one that does not fit."""
    if not requests:
        return []
    skeletons = {name: source.skeleton(name) for name in COMPONENTS}
    return [plan_lora(request, skeletons) for request in requests]


def plan_lora(request: LoraRequest, models: Mapping[str, Model]) -> LoraPlan:
    """Find the place of every tensor of a file in `models`, whose weights are not read.

    Raises `WeightsError` when a tensor has no place or another shape, is no finite number, or when
    the file is none of the kinds in this module's docstring.
    """
    path, source = _locate(request)
    file = open_weights(path)
    places = _find_places(request, file, models)
    alphas = _read_alphas(file)
    facts = _Facts.of(file)
    updates: dict[str, dict[str, Update]] = {}
    misfits: list[str] = []
    for candidates, names in places.items():
        shapes = {part: file.tensors[name].shape for part, name in names.items()}
        fitting = [place for place in candidates if _fits(models, place, shapes)]
        if not fitting:
            misfits.append(_misfit(models, candidates[0], shapes))
            continue
        if len(fitting) > 1:
            raise _refusal(
                request,
                file,
                f"{next(iter(names.values()))} does not say which text encoder it is for",
                "Rename its tensors so that they begin with text_encoder. or text_encoder_2.",
            )
        component, module = fitting[0]
        alpha = alphas.get(names.get("alpha", ""))
        factor = facts.factor(component, module, shapes, alpha)
        if not math.isfinite(factor):
            raise _refusal(
                request, file, f"its alpha ({names.get('alpha', 'metadata')}) is not finite"
            )
        updates.setdefault(component, {})[module] = Update(names, factor)
    if misfits:
        more = f" ({len(misfits)} such modules)" if len(misfits) > 1 else ""
        raise _refusal(request, file, f"its shapes do not fit this checkpoint: {misfits[0]}{more}")
    if family(file) in OTHER_MODELS:  # text encoders of SD 1.5 have the shapes of SDXL's first
        raise _refusal(request, file, "it was trained for that model")
    return LoraPlan(request, source, file, updates)


@torch.no_grad()
def fuse(component: str, model: Model, plans: Sequence[LoraPlan]) -> None:
    """Add what all files have for a component to its weights, in place, in float32 or better.

    Raises `WeightsError` when a weight leaves the range of its type.
    """
    changes: dict[str, list[tuple[LoraPlan, Update, dict[str, Tensor]]]] = {}
    for plan in plans:
        tensors = plan.tensors(component)
        for module, update in plan.updates.get(component, {}).items():
            changes.setdefault(module, []).append((plan, update, tensors))
    for module, updates in changes.items():
        for name, change in (("weight", weight_change), ("bias", bias_change)):
            parameter = getattr(model.get_submodule(module), name, None)
            if parameter is None:
                continue
            work = torch.promote_types(parameter.dtype, torch.float32)
            old = parameter.to(work)
            new = old.clone()
            for plan, update, tensors in updates:
                parts = {part: tensors[n].to(work) for part, n in update.names.items()}
                new += plan.request.scale * change(parts, old, update.factor)
            parameter.copy_(new)
            if not parameter.isfinite().all():
                files = ", ".join(plan.file.path.name for plan, _, _ in updates)
                raise WeightsError(
                    f"With {files} fused, {module} of the {component} leaves the range of "
                    f"{str(parameter.dtype).removeprefix('torch.')}.",
                    "Use a smaller scale, or --precision bf16 or fp32.",
                )


def weight_change(parts: Mapping[str, Tensor], weight: Tensor, factor: float) -> Tensor:
    """ΔW of the module's docstring in `weight`'s shape; `factor` is alpha / rank.

    Raises `RuntimeError` when the shapes do not go together.
    """
    product = _product(parts)
    if product is None:  # only a bias changes
        return torch.zeros_like(weight)
    if _rows(product).shape != _rows(weight).shape:
        raise RuntimeError(f"{tuple(product.shape)} is not {tuple(weight.shape)}")
    change = factor * product.reshape(weight.shape)
    magnitude = parts.get("magnitude", parts.get("dora"))
    if magnitude is None:
        return change
    direction = weight + change
    of_rows = "magnitude" in parts or magnitude.ndim == 1 or len(magnitude) == len(weight)
    axis = 0 if of_rows else 1
    norm = direction.transpose(0, axis).flatten(1).norm(dim=1)
    if magnitude.numel() != norm.numel():
        raise RuntimeError(f"{tuple(magnitude.shape)} magnitudes for {tuple(weight.shape)}")
    shape = [-1 if dimension == axis else 1 for dimension in range(weight.ndim)]
    return (magnitude.flatten() / norm).view(shape) * direction - weight


def bias_change(parts: Mapping[str, Tensor], bias: Tensor, factor: float) -> Tensor:
    """The difference of a bias, which no alpha scales."""
    return parts["diff_b"].reshape(bias.shape) if "diff_b" in parts else torch.zeros_like(bias)


def _rows(tensor: Tensor) -> Tensor:
    """A row per output: a 1x1 convolution and a linear layer have the same."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def _product(parts: Mapping[str, Tensor]) -> Tensor | None:
    """P of the module's docstring, None where the parts have none."""
    kind = _kind(parts)
    if kind == "lora":
        up, down = parts["up"].flatten(1), parts["down"].flatten(1)
        return up @ down if "mid" not in parts else _tucker(parts["mid"], up.T, down)
    if kind == "loha":
        left, right = _factor(parts, "hada_w1"), _factor(parts, "hada_w2")
        if left.shape != right.shape:
            raise RuntimeError(f"{tuple(left.shape)} is not {tuple(right.shape)}")
        return left * right
    if kind == "lokr":
        left, right = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2")
        return torch.kron(left.flatten(1), right.flatten(1))
    return parts.get("diff")


def _factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """A factor that a file has whole, as a product, or as a product with a core."""
    if name in parts:
        return parts[name]
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    core = parts.get(name.replace("_w", "_t"))
    return left @ right.flatten(1) if core is None else _tucker(core, left, right)


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ core[m, n, …] left[m, i] right[n, j]: a Tucker decomposition of a convolution's weight."""
    return torch.einsum("mn...,mi,nj->ij...", core, left, right)


def _kind(parts: Iterable[str]) -> str:
    """Which of the products the parts make."""
    for kind, beginning in (("lora", ("up", "down", "mid")), ("loha", "hada"), ("lokr", "lokr")):
        if any(part.startswith(beginning) for part in parts):
            return kind
    return "difference"


def _is_complete(parts: Set[str]) -> bool:
    """Whether the parts make a product, and nothing of them is left over."""
    if {"dora", "magnitude"} <= parts:
        return False
    kind = _kind(parts)
    rest = parts - {"alpha", "dora", "magnitude", "diff_b"}
    if kind == "lora":
        return {"up", "down"} <= rest <= {"up", "down", "mid"}
    if kind == "difference":
        return "alpha" not in parts and (rest == {"diff"} or parts == {"diff_b"})
    stem = "hada" if kind == "loha" else "lokr"
    needed: set[str] = set()
    for factor in ("1", "2"):
        whole, pair = f"{stem}_w{factor}", {f"{stem}_w{factor}_a", f"{stem}_w{factor}_b"}
        core = {f"{stem}_t{factor}"} & rest
        needed |= {whole} if whole in rest and kind == "lokr" else pair | core
    return rest == needed


def _find_places(
    request: LoraRequest, file: WeightsFile, models: Mapping[str, Model]
) -> dict[tuple[Place, ...], dict[str, str]]:
    """Names by part for every module; more than one place where a name does not tell which."""
    kind = lora_kind(file.tensors)
    if kind is None or not identify(file).startswith(kind):
        raise _refusal(request, file, "not a LoRA")
    if is_reduced(file) and getattr(models["unet"].mid_block, "attentions", None):
        raise _refusal(request, file, "its layers are not those of this checkpoint")
    tables = {name: _table(name, model) for name, model in models.items()}
    places: dict[tuple[Place, ...], dict[str, str]] = {}
    left_over: list[str] = []
    for name, header in file.tensors.items():
        found = _take_apart(name)
        place = _find(found[1], tables) if found else ()
        if not found or not place or found[0] in places.get(place, {}):
            left_over.append(name)
            continue
        if header.dtype not in _FLOATS and found[0] != "alpha":
            raise _refusal(request, file, f"{name} holds numbers of type {header.dtype}")
        places.setdefault(place, {})[found[0]] = name
    for place in [place for place, names in places.items() if not _is_complete(names.keys())]:
        left_over += places.pop(place).values()
    if left_over:
        shown = ", ".join(left_over[:3]) + (", …" if len(left_over) > 3 else "")
        raise _refusal(
            request,
            file,
            f"{len(left_over)} of its {len(file.tensors)} tensors cannot be applied to this "
            f"checkpoint ({shown})",
        )
    return places


def _take_apart(name: str) -> tuple[str, str] | None:
    """The part that a tensor's name ends with, and the module's name before it."""
    for part, pattern in _PART_PATTERNS:
        match = pattern.search(name)
        if match:
            return part or match[1], name[: match.start()]
    return None


def _find(stem: str, tables: Mapping[str, Mapping[str, str]]) -> tuple[Place, ...]:
    """The places that a module's name in a file may mean: none, one, or one per text encoder."""
    flat = stem.replace(".", "_").replace("_processor_", "_")
    components = tuple(tables)
    while True:
        found = tuple((c, tables[c][flat]) for c in components if flat in tables[c])
        if found:
            return found
        for prefix, component in _PREFIXES:
            if flat.startswith(prefix):
                flat = flat.removeprefix(prefix)
                components = (component,) if component else components
                break
        else:
            return ()


def _table(component: str, model: Model) -> dict[str, str]:
    """Modules with weights by every name that they go by in LoRA files, underscores for dots."""
    modules = [n for n, m in model.named_modules() if getattr(m, "weight", None) is not None]
    original = OriginalUNet(model.config) if component == "unet" else None
    table: dict[str, str] = {}
    for module in modules:
        for name in _unet_names(original, module) if original else _text_names(module):
            table[name.replace(".", "_")] = module
    return table


def _unet_names(original: OriginalUNet, module: str) -> Iterator[str]:
    """A UNet module's name in diffusers, there without the index of `to_out`, and in sgm."""
    for name in (module, original.name_of(f"{module}.weight").removesuffix(".weight")):
        yield name
        yield name.replace("to_out.0", "to_out")


def _text_names(module: str) -> Iterator[str]:
    """A text encoder module's name with and without `text_model`, and diffusers' first ones."""
    inner = module.removeprefix("text_model.")
    stem, _, last = inner.rpartition(".")
    for name in (inner, f"{stem}.{_OLD_ATTENTION.get(last, last)}"):
        yield name
        yield f"text_model.{name}"


def _fits(models: Mapping[str, Model], place: Place, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the parts make a change of the weight's shape, tried on tensors without values."""
    if any(0 in shape for shape in shapes.values()):
        return False
    module = models[place[0]].get_submodule(place[1])
    parts = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
    try:
        weight_change(parts, torch.empty(module.weight.shape, device="meta"), 1.0)
        if "diff_b" in parts:
            if getattr(module, "bias", None) is None:
                return False
            bias_change(parts, torch.empty(module.bias.shape, device="meta"), 1.0)
    except (RuntimeError, IndexError, ValueError):
        return False
    return math.prod(shapes.get("alpha", ())) == 1


def _misfit(
    models: Mapping[str, Model], place: Place, shapes: Mapping[str, tuple[int, ...]]
) -> str:
    component, module = place
    weight = models[component].get_submodule(module).weight
    ours = " and ".join(_size(shape) for part, shape in shapes.items() if part != "alpha")
    return f"{ours} for {module} of the {component}, which is {_size(weight.shape)}"


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def _read_alphas(file: WeightsFile) -> dict[str, float]:
    """The values of all alphas; every other tensor is looked at for numbers that are none."""
    alphas = {}
    for name, tensor in file.items():
        if name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name] = float(tensor)
        elif not tensor.float().isfinite().all():
            raise WeightsError(
                f"{file.path.name} holds numbers that are not finite: {name}.",
                "Its training or its conversion failed; take another version of it.",
            )
    return alphas


@dataclass(frozen=True)
class _Facts:
    """What a file says about alpha besides its tensors.

    `peft` are PEFT's configurations by component ("" is any), `alpha` and `conv_alpha` kohya's.
    """

    peft: Mapping[str, Mapping[str, Any]]
    alpha: float | None = None
    conv_alpha: float | None = None

    @classmethod
    def of(cls, file: WeightsFile) -> "_Facts":
        """Read the metadata of `file` and PEFT's configuration beside it."""
        metadata = file.metadata
        peft: dict[str, dict[str, Any]] = {}
        for key, value in _json(metadata.get("lora_adapter_metadata")).items():  # of diffusers
            component, _, field = key.partition(".")
            peft.setdefault(component, {})[field] = value
        beside = file.path.parent / _CONFIG
        of_peft = any(name.startswith("base_model.model.") for name in file.tensors)
        if beside.is_file() and (of_peft or file.path.stem == "adapter_model"):
            peft[""] = _json(beside.read_text(encoding="utf-8"))
        arguments = _json(metadata.get("ss_network_args"))
        return cls(
            peft, _number(metadata.get("ss_network_alpha")), _number(arguments.get("conv_alpha"))
        )

    def factor(
        self,
        component: str,
        module: str,
        shapes: Mapping[str, tuple[int, ...]],
        alpha: float | None,
    ) -> float:
        """alpha / rank: by the file's alpha, PEFT's configuration, kohya's metadata, or 1."""
        names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        found = (float(shapes[name][0]) for name in names if name in shapes)
        rank = next(found, None)
        peft = self.peft.get(component, self.peft.get("", {}))
        if alpha is None and peft:
            alpha = _number(
                _by_pattern(peft.get("alpha_pattern"), module)
                or peft.get("lora_alpha", peft.get("alpha"))
            )
            rank = rank or _number(_by_pattern(peft.get("rank_pattern"), module) or peft.get("r"))
            if rank and alpha is not None:
                return alpha / (math.sqrt(rank) if peft.get("use_rslora") else rank)
        if rank is None:
            return 1.0  # whole factors of a LoKr, and differences, are not scaled
        if alpha is None:
            convolution = len(shapes.get("down", ())) == 4 and max(shapes["down"][2:]) > 1
            alpha = self.conv_alpha if convolution and self.conv_alpha else self.alpha
        return 1.0 if alpha is None else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, module: str) -> Any:
    """PEFT's value for one module, None where no pattern is the end of its name."""
    found = (v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module))
    return next(found, None)


def _json(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _locate(request: LoraRequest) -> tuple[Path, Source]:
    """The file of a request: itself, or the only one that a LoRA folder has."""
    role = "distillation_lora" if request.role == "distillation" else "lora"
    item = request.item
    located = locate(item, role, patterns=[*(f"{name}.*" for name in _FOLDER_FILES), _CONFIG])
    if located.path.stem == "adapter_model" and item.path and not Path(item.location).exists():
        config = str(Path(item.path).with_name(_CONFIG))
        locate(HubItem(item.location, item.revision, config), role)
    if located.path.is_file():
        return located.path, located.source
    files = [p for p in sorted(located.path.glob("*")) if p.suffix in _SUFFIXES]
    named = [p for p in files if p.stem in _FOLDER_FILES] or files
    if len(named) != 1:
        raise WeightsError(
            f"The folder {located.path.name} has {len(named)} files of weights.",
            f"Name the file: {request.option} {item.location}/FILE.",
        )
    if located.source.revision is not None:
        return named[0], located.source
    return named[0], locate(HubItem(str(named[0]), licence=item.licence), role).source


def _refusal(
    request: LoraRequest, file: WeightsFile, problem: str, hint: str | None = None
) -> WeightsError:
    """One sentence: the file, what it is, and what of it cannot be used."""
    what, name = identify(file), file.path.name
    link = ", " if problem.startswith("not a") else ": "
    hint = hint or (
        f"{request.option} takes LoRA, DoRA, LoHa and LoKr files that were made for the UNet and "
        "the text encoders of SDXL."
    )
    return WeightsError(f"{name} is {what}{link}{problem}.", hint)
