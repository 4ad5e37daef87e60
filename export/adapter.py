"""Adapter files: read them, tell their kind, check that they fit, and put them into a UNet.

An IP-Adapter FaceID file has two parts: `image_proj` (the projection) and `ip_adapter`, whose keys
start with the index of a layer in `unet.attn_processors`: `N.to_k_ip`, `N.to_v_ip` and, per
projection, the LoRA `N.to_{q,k,v,out}_lora.{down,up}`. A PuLID file has `id_adapter` and
`id_adapter_attn_layers` with `N.id_to_k` and `N.id_to_v`, and no LoRA.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastface_trt.engines.manifest import AdapterKind, Orthogonal
from fastface_trt.errors import WeightsError
from fastface_trt.export.attention import attach_processors
from fastface_trt.export.model import Model
from fastface_trt.export.projection import FaceIdProjection, FaceProjection
from fastface_trt.export.pulid import IDEncoder, IDFormer

State = dict[str, Tensor]
Projection = FaceProjection | FaceIdProjection | IDFormer | IDEncoder
_USE = (
    "Use ip-adapter-faceid-plusv2_sdxl.bin, ip-adapter-faceid_sdxl.bin, pulid_v1.1.safetensors or "
    "a file of the same layout."
)
_LORA_TARGETS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}


@dataclass(frozen=True)
class AdapterWeights:
    """The two parts of an adapter file under the names of an IP-Adapter, and which kind it is."""

    kind: AdapterKind
    image_proj: State
    ip_adapter: State

    @property
    def tokens(self) -> int:
        """Image tokens per face: 4 in the published IP-Adapter files."""
        return load_projection(self).tokens

    @property
    def has_lora(self) -> bool:
        """Whether the file has a LoRA for the UNet's attention."""
        return any("_lora." in key for key in self.ip_adapter)


def read_tensors(path: Path) -> State:
    """Tensors of a `.safetensors` or a `.bin` file (weights only), nested dicts joined by dots."""
    if not path.is_file():
        raise WeightsError(f"There is no file {path}.", "Check the path, or download it again.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        nested = torch.load(path, map_location="cpu", weights_only=True)
        return {
            f"{outer}.{inner}" if isinstance(value, dict) else outer: tensor
            for outer, value in nested.items()
            for inner, tensor in (value.items() if isinstance(value, dict) else [("", value)])
        }
    except Exception as error:
        raise WeightsError(
            f"{path.name} is not a readable weights file ({type(error).__name__}).",
            "It may be truncated or hold something else: download it again.",
        ) from error


def read_adapter(path: Path) -> AdapterWeights:
    """Read an adapter file and tell its kind by its keys.

    Raises `WeightsError` for a file of no kind that `AdapterKind` names.
    """
    parts: dict[str, State] = {}
    for key, tensor in read_tensors(path).items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    if "id_adapter" in parts and "id_adapter_attn_layers" in parts:
        attention = {_ip_adapter_name(key): v for key, v in parts["id_adapter_attn_layers"].items()}
        return AdapterWeights("pulid", parts["id_adapter"], attention)
    if "image_proj" not in parts or "ip_adapter" not in parts:
        raise WeightsError(
            f"{path.name} is neither an IP-Adapter nor a PuLID file: it lacks image_proj or "
            "ip_adapter.",
            _USE,
        )
    kind = _ip_adapter_kind(path.name, parts["image_proj"])
    return AdapterWeights(kind, parts["image_proj"], parts["ip_adapter"])


def _ip_adapter_name(key: str) -> str:
    """PuLID's name of an attention weight as an IP-Adapter's; both number layers alike."""
    return key.replace("id_to_k", "to_k_ip").replace("id_to_v", "to_v_ip")


def _ip_adapter_kind(name: str, image_proj: State) -> AdapterKind:
    if "perceiver_resampler.proj_in.weight" in image_proj:
        return "faceid-plus-v2"
    # Other IP-Adapters have a `proj` too; FaceID's normalises its tokens outside of it.
    if image_proj.keys() >= {"proj.0.weight", "proj.2.weight", "norm.weight"}:
        return "faceid"
    raise WeightsError(f"{name} is neither a FaceID-Plus-v2 nor a FaceID adapter.", _USE)


def load_projection(adapter: AdapterWeights, zero_tokens: int | None = None) -> Projection:
    """The face projection of an adapter, in float32.

    `zero_tokens` is PuLID's; None takes the number that its demonstration does. Raises
    `WeightsError` when a tensor is missing or of another shape.
    """
    state = {key: tensor.float() for key, tensor in adapter.image_proj.items()}
    try:
        if adapter.kind == "faceid":
            return FaceIdProjection.from_state_dict(state)
        if adapter.kind == "faceid-plus-v2":
            return FaceProjection.from_state_dict(state)
        encoder = IDFormer if "latents" in state else IDEncoder
        return encoder.from_state_dict(state, zero_tokens)
    except (KeyError, RuntimeError, IndexError) as error:
        raise WeightsError(
            f"The adapter's projection is incomplete: {str(error).splitlines()[0]}.",
            "Download the adapter again.",
        ) from error


def _assign(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    if parameter.shape != value.shape:
        raise WeightsError(
            f"The adapter does not fit this checkpoint: {key} is {tuple(value.shape)}, "
            f"the UNet needs {tuple(parameter.shape)}.",
            "Use an adapter made for the same base model (SDXL adapters for SDXL checkpoints).",
        )
    parameter.copy_(value)


@torch.no_grad()
def attach_adapter(
    unet: Model, adapter: AdapterWeights, *, lora_scale: float, orthogonal: Orthogonal = "off"
) -> None:
    """Attach decoupled attention to `unet` and fuse the adapter's LoRA: W ← W + scale · up · down.

    Works on the UNet in place. `lora_scale` is the user-facing scale of the LoRA (1.0 and 0.5 in
    the paper), separate from λ; it is fused, so another value is another export. Raises
    `WeightsError` when a layer is missing, left over, or of another shape.
    """
    attach_processors(unet, orthogonal)
    remaining = dict(adapter.ip_adapter)

    def take(key: str) -> Tensor:
        if key not in remaining:
            raise WeightsError(
                f"The adapter does not fit this checkpoint: it has no {key}.",
                "Use an adapter made for the same base model (SDXL adapters for SDXL checkpoints).",
            )
        return remaining.pop(key)

    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            for projection in ("to_k_ip", "to_v_ip"):
                key = f"{index}.{projection}.weight"
                _assign(getattr(attention.processor, projection).weight, take(key), key)
        for source, target in _LORA_TARGETS.items() if adapter.has_lora else ():
            down = take(f"{index}.{source}_lora.down.weight").float()
            up = take(f"{index}.{source}_lora.up.weight").float()
            weight = attention.get_submodule(target).weight
            if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
                raise WeightsError(
                    f"The adapter does not fit this checkpoint: the LoRA of {index}.{source} is "
                    f"{up.shape[0]}x{down.shape[1]}, the UNet's weight {tuple(weight.shape)}.",
                    "Use an adapter made for the same base model.",
                )
            weight.copy_(weight.float() + lora_scale * (up @ down))
    if remaining:
        raise WeightsError(
            f"The adapter does not fit this checkpoint: {len(remaining)} of its tensors have no "
            f"place in the UNet, first {next(iter(remaining))}.",
            "Use an adapter made for the same base model.",
        )
