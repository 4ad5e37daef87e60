"""Adapter files: read them, tell their kind, check that they fit, and put them into a UNet.

An IP-Adapter FaceID file has two parts: `image_proj` (the projection) and `ip_adapter`, whose keys
start with the index of a layer in `unet.attn_processors`: `N.to_k_ip`, `N.to_v_ip` and, per
projection, the LoRA `N.to_{q,k,v,out}_lora.{down,up}`. FaceID-Portrait has no LoRA, and 16 tokens
for each of several pictures of a person. A PuLID file has `id_adapter` and
`id_adapter_attn_layers` with `N.id_to_k` and `N.id_to_v`, and no LoRA.

The projection makes image tokens of a face: FaceID and FaceID-Plus-v2 of its embedding (and CLIP
features), FaceID-Portrait of the embedding alone, the "unnorm" file with queries that read one of
any length, PuLID for SDXL of an embedding and the features of a vision tower. PuLID 1.1
(`IDFormer`) lets learned queries read the features, version 1 (`IDEncoder`) is made of MLPs alone;
the arithmetic is that of PuLID's public code (Guo et al. 2024). Parameter names are those of the
published files, so that their tensors load as they are.

Shape legend: B rows, E face-embedding size (512), P width of the picture's embedding (768), S
positions of a level, K its width, V = 5 levels of the vision tower, I inner width of the resampler
or PuLID's id tokens (5), Q queries (32), W inner width, T tokens, C text width of the UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeAlias, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastface_trt.engines.manifest import AdapterKind, Dimension, Orthogonal
from fastface_trt.errors import WeightsError
from fastface_trt.export.attention import attach_processors
from fastface_trt.export.file_kinds import identify
from fastface_trt.export.precision import Model
from fastface_trt.export.weight_files import State, open_weights

Projection: TypeAlias = "FaceProjection | FaceIdProjection | QueryResampler | IDFormer | IDEncoder"

HEAD_SIZE = 64
EMBEDDING = 512
LEVELS = 5
ID_TOKENS = 5

_USE = (
    "Use ip-adapter-faceid-plusv2_sdxl.bin, ip-adapter-faceid_sdxl.bin, "
    "ip-adapter-faceid-portrait_sdxl.bin, pulid_v1.1.safetensors or a file of the same layout."
)
_FACEID_TOKENS = 4
_QUERIES = {"latents", "proj_in.weight", "proj_out.weight", "norm_out.weight"}
_OF_LAYOUT: dict[str, tuple[AdapterKind, ...]] = {
    "resampler": ("faceid-plus-v2",),
    "mlp": ("faceid", "faceid-portrait"),
    "queries": ("faceid-portrait-unnorm",),
}
"""The kinds that the layouts of `image_proj` may be of."""
_LORA_TARGETS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}


@dataclass(frozen=True)
class AdapterWeights:
    """The two parts of an adapter file under the names of an IP-Adapter, and which kind it is."""

    kind: AdapterKind
    image_proj: State
    ip_adapter: State

    @property
    def tokens(self) -> int:
        """Image tokens per picture: 4 in the published FaceID files, 16 in FaceID-Portrait's."""
        return load_projection(self).tokens

    @property
    def features(self) -> int | None:
        """Width of the CLIP features that a FaceID-Plus-v2 projection reads."""
        weight = self.image_proj.get("perceiver_resampler.proj_in.weight")
        return None if weight is None else weight.shape[1]

    @property
    def embedding(self) -> int | None:
        """Length of the face vector that an IP-Adapter's projection reads."""
        state = self.image_proj
        weight = state.get("proj.0.weight", state.get("proj_in.weight"))
        return None if weight is None else weight.shape[1]

    @property
    def has_lora(self) -> bool:
        """Whether the file has a LoRA for the UNet's attention."""
        return any("_lora." in key for key in self.ip_adapter)


def read_adapter(path: Path, kind: AdapterKind | None = None) -> AdapterWeights:
    """Read an adapter file and tell its kind by its keys and shapes, unless `kind` says it.

    FaceID-Portrait's "unnorm" file looks like InstantID's: its name tells it, or `kind`. Raises
    `WeightsError` for a file of no kind that `AdapterKind` names, or not of the one that was said.
    """
    file = open_weights(path)
    parts: dict[str, State] = {}
    for key, tensor in file.items():
        part, _, rest = _published_name(key).partition(".")
        parts.setdefault(part, {})[rest] = tensor
    training = "image_proj" in parts and "image_proj.norm.weight" not in file.tensors
    if training:
        parts.pop("unet", None)  # frozen, and saved with the rest by the training script
    if parts.keys() == {"id_adapter", "id_adapter_attn_layers"}:
        attention = {_ip_adapter_name(key): v for key, v in parts["id_adapter_attn_layers"].items()}
        _require_kind(path.name, kind, ("pulid",))
        return AdapterWeights("pulid", parts["id_adapter"], attention)
    if parts.keys() != {"image_proj", "ip_adapter"}:
        others = sorted(parts.keys() - {"image_proj", "ip_adapter"})
        lacks = sorted({"image_proj", "ip_adapter"} - parts.keys())
        fault = f"it lacks {' and '.join(lacks)}" if lacks else f"it also has {', '.join(others)}"
        raise WeightsError(
            f"{path.name} is {identify(file)}, and neither an IP-Adapter nor a PuLID file of this "
            f"kind: {fault}.",
            _USE,
        )
    found = _ip_adapter_kind(path.name, parts["image_proj"], parts["ip_adapter"], kind)
    return AdapterWeights(found, parts["image_proj"], parts["ip_adapter"])


_TRAINED = {"image_proj_model": "image_proj", "adapter_modules": "ip_adapter"}


def _published_name(key: str) -> str:
    """A key of a published file: IP-Adapter's training names its two parts otherwise, and some
    trainers wrap them into a `model`."""
    part, _, rest = key.removeprefix("model.").partition(".")
    return f"{_TRAINED.get(part, part)}.{rest}"


def _ip_adapter_name(key: str) -> str:
    """PuLID's name of an attention weight as an IP-Adapter's; both number layers alike."""
    return key.replace("id_to_k", "to_k_ip").replace("id_to_v", "to_v_ip")


def _ip_adapter_kind(
    name: str, image_proj: State, ip_adapter: State, said: AdapterKind | None
) -> AdapterKind:
    layout = _layout(image_proj)
    if layout is None:
        raise WeightsError(f"{name} is neither a FaceID-Plus-v2 nor a FaceID adapter.", _USE)
    _require_kind(name, said, _OF_LAYOUT[layout])
    if said is not None:
        return said
    if layout == "queries":
        if "unnorm" not in name.lower():
            raise WeightsError(
                f"{name} may be FaceID-Portrait's unnorm file or InstantID's: their layout is the "
                "same.",
                "Say --adapter-kind faceid-portrait-unnorm if it is that; InstantID is not read.",
            )
        return "faceid-portrait-unnorm"
    if layout == "mlp":
        tokens = image_proj["proj.2.weight"].shape[0] // image_proj["norm.weight"].shape[0]
        has_lora = any("_lora." in key for key in ip_adapter)
        return "faceid" if has_lora or tokens == _FACEID_TOKENS else "faceid-portrait"
    return "faceid-plus-v2"


def _layout(image_proj: State) -> str | None:
    """Which of `_OF_LAYOUT` the keys of a projection are."""
    if "perceiver_resampler.proj_in.weight" in image_proj:
        return "resampler"
    # Other IP-Adapters have a `proj` too; FaceID's normalises its tokens outside of it.
    if image_proj.keys() >= {"proj.0.weight", "proj.2.weight", "norm.weight"}:
        return "mlp"
    return "queries" if image_proj.keys() >= _QUERIES else None


def _require_kind(name: str, said: AdapterKind | None, possible: Sequence[AdapterKind]) -> None:
    if said is not None and said not in possible:
        raise WeightsError(
            f"{name} is no adapter of kind {said}.",
            f"By its keys it is one of kind {' or '.join(possible)}.",
        )


def load_projection(adapter: AdapterWeights, zero_tokens: int | None = None) -> Projection:
    """The face projection of an adapter, in float32.

    `zero_tokens` is PuLID's; None takes the number that its demonstration does. Raises
    `WeightsError` when a tensor is missing or of another shape.
    """
    state = {key: tensor.float() for key, tensor in adapter.image_proj.items()}
    try:
        if adapter.kind in ("faceid", "faceid-portrait"):
            return FaceIdProjection.from_state_dict(state)
        if adapter.kind == "faceid-portrait-unnorm":
            return QueryResampler.from_state_dict(state)
        if adapter.kind == "faceid-plus-v2":
            return FaceProjection.from_state_dict(state)
        encoder = IDFormer if "latents" in state else IDEncoder
        return encoder.from_state_dict(state, zero_tokens)
    except (KeyError, RuntimeError, IndexError) as error:
        raise WeightsError(
            f"The adapter's projection is incomplete: {' '.join(str(error).split())[:200]}.",
            "Download the adapter again.",
        ) from error


def check_adapter(adapter: AdapterWeights, skeleton: Model, orthogonal: Orthogonal) -> None:
    """Raise what `attach_adapter` raises, for a UNet on the meta device, which it changes."""
    shapes = {key: torch.empty_like(t, device="meta") for key, t in adapter.ip_adapter.items()}
    with torch.device("meta"):
        attach_adapter(
            skeleton, replace(adapter, ip_adapter=shapes), lora_scale=1.0, orthogonal=orthogonal
        )


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


def _assign(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    if parameter.shape != value.shape:
        raise WeightsError(
            f"The adapter does not fit this checkpoint: {key} is {tuple(value.shape)}, "
            f"the UNet needs {tuple(parameter.shape)}.",
            "Use an adapter made for the same base model (SDXL adapters for SDXL checkpoints).",
        )
    parameter.copy_(value)


class FaceIdProjection(nn.Module):
    """FaceID: tokens = norm(MLP(embedding)), which are all that the UNet learns of a face."""

    def __init__(
        self, *, tokens: int = 4, embedding: int = 512, mlp_hidden: int = 1024, width: int = 2048
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.width = width
        self._embedding = embedding
        self.proj = nn.Sequential(
            nn.Linear(embedding, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width * tokens)
        )
        self.norm = nn.LayerNorm(width)

    def input_shapes(self, positions: Dimension) -> dict[str, tuple[Dimension, ...]]:
        """Shapes of the inputs by name, without rows."""
        return {"face_embeds": (self._embedding,)}

    @classmethod
    def from_state_dict(cls, state: State) -> FaceIdProjection:
        """Build and load from a file's `image_proj` part; sizes are read off its tensors."""
        module = cls(**_mlp_sizes(state))
        module.load_state_dict(state)
        return module

    def forward(self, face_embeds: Tensor) -> Tensor:
        """Image tokens [B,T,C] from face embeddings [B,E]."""
        return self.norm(self.proj(face_embeds).unflatten(-1, (self.tokens, -1)))


class FaceProjection(nn.Module):
    """tokens = MLP(embedding); out = tokens + shortcut_scale · resampler(tokens, CLIP features)."""

    def __init__(
        self,
        *,
        tokens: int = 4,
        embedding: int = 512,
        mlp_hidden: int = 1024,
        features: int = 1280,
        width: int = 2048,
        inner: int = 2048,
        hidden: int = 8192,
        depth: int = 4,
        shortcut_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.width = width
        self._embedding = embedding
        self.shortcut_scale = shortcut_scale
        self.proj = nn.Sequential(
            nn.Linear(embedding, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width * tokens)
        )
        self.norm = nn.LayerNorm(width)
        self.perceiver_resampler = PerceiverResampler(width, inner, hidden, depth, features, width)

    def input_shapes(self, positions: Dimension) -> dict[str, tuple[Dimension, ...]]:
        """Shapes of the inputs by name, without rows, for so many CLIP positions."""
        features = self.perceiver_resampler.proj_in.in_features
        return {
            "face_embeds": (self._embedding,),
            "clip_embeds": (positions, features),
        }

    @classmethod
    def from_state_dict(cls, state: State) -> FaceProjection:
        """Build and load from a file's `image_proj` part; sizes are read off its tensors."""
        resampler = "perceiver_resampler."
        depth = len({k.split(".")[2] for k in state if k.startswith(resampler + "layers.")})
        module = cls(
            **_mlp_sizes(state),
            features=state[resampler + "proj_in.weight"].shape[1],
            inner=state[resampler + "layers.0.0.to_q.weight"].shape[0],
            hidden=state[resampler + "layers.0.1.1.weight"].shape[0],
            depth=depth,
        )
        module.load_state_dict(state)
        return module

    def forward(self, face_embeds: Tensor, clip_embeds: Tensor) -> Tensor:
        """Image tokens [B,T,C] from face embeddings [B,E] and CLIP features [B,S,K]."""
        tokens_BTC = self.norm(self.proj(face_embeds).unflatten(-1, (self.tokens, -1)))
        return tokens_BTC + self.shortcut_scale * self.perceiver_resampler(tokens_BTC, clip_embeds)


def _mlp_sizes(state: State) -> dict[str, int]:
    """Sizes of the MLP that both adapters begin with."""
    width = state["norm.weight"].shape[0]
    return {
        "tokens": state["proj.2.weight"].shape[0] // width,
        "embedding": state["proj.0.weight"].shape[1],
        "mlp_hidden": state["proj.0.weight"].shape[0],
        "width": width,
    }


class QueryResampler(nn.Module):
    """FaceID-Portrait unnorm: learned queries read a face embedding of the recogniser's length."""

    def __init__(
        self,
        *,
        tokens: int = 16,
        embedding: int = 512,
        inner: int = 1280,
        attended: int = 1280,
        hidden: int = 5120,
        depth: int = 4,
        width: int = 2048,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.width = width
        self.latents = nn.Parameter(torch.randn(1, tokens, inner) * inner**-0.5)
        self.proj_in = nn.Linear(embedding, inner)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(inner, attended), feed_forward(inner, hidden)))
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(inner, width)
        self.norm_out = nn.LayerNorm(width)

    def input_shapes(self, positions: Dimension) -> dict[str, tuple[Dimension, ...]]:
        """Shapes of the inputs by name, without rows."""
        return {"face_embeds": (self.proj_in.in_features,)}

    @classmethod
    def from_state_dict(cls, state: State) -> QueryResampler:
        """Build and load from a file's `image_proj` part; sizes are read off its tensors."""
        module = cls(
            tokens=state["latents"].shape[1],
            embedding=state["proj_in.weight"].shape[1],
            inner=state["latents"].shape[2],
            attended=state["layers.0.0.to_q.weight"].shape[0],
            hidden=state["layers.0.1.1.weight"].shape[0],
            depth=len({key.split(".")[1] for key in state if key.startswith("layers.")}),
            width=state["proj_out.weight"].shape[0],
        )
        module.load_state_dict(state)
        return module

    def forward(self, face_embeds: Tensor) -> Tensor:
        """Image tokens [B,T,C] from face embeddings [B,E]."""
        context_B1I = self.proj_in(face_embeds)[:, None]
        x_BTI = self.latents.expand(face_embeds.shape[0], -1, -1)
        for layer in self.layers:
            attention, forward = cast(nn.ModuleList, layer)
            x_BTI = attention(context_B1I, x_BTI) + x_BTI
            x_BTI = forward(x_BTI) + x_BTI
        return self.norm_out(self.proj_out(x_BTI))


class PerceiverResampler(nn.Module):
    """Layers of attention and feed-forward that let the tokens read the CLIP features."""

    def __init__(
        self, width: int, inner: int, hidden: int, depth: int, features: int, output: int
    ) -> None:
        super().__init__()
        self.proj_in = nn.Linear(features, width)
        self.proj_out = nn.Linear(width, output)
        self.norm_out = nn.LayerNorm(output)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(width, inner), feed_forward(width, hidden)))
            for _ in range(depth)
        )

    def forward(self, tokens_BTC: Tensor, features_BSK: Tensor) -> Tensor:
        """Resampled tokens [B,T,C]."""
        features = self.proj_in(features_BSK)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            tokens_BTC = attention(features, tokens_BTC) + tokens_BTC
            tokens_BTC = feed_forward(tokens_BTC) + tokens_BTC
        return self.norm_out(self.proj_out(tokens_BTC))


class PerceiverAttention(nn.Module):
    """Tokens attend to the CLIP features and to themselves; the width of a head is 64."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.heads = max(1, inner // HEAD_SIZE)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features_BSC: Tensor, tokens_BTC: Tensor) -> Tensor:
        """Attended tokens [B,T,C]."""
        features = self.norm1(features_BSC)
        tokens = self.norm2(tokens_BTC)
        q_BTI = self.to_q(tokens)
        k_BSI, v_BSI = self.to_kv(torch.cat((features, tokens), dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q_BTI, k_BSI, v_BSI))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(attended.transpose(1, 2).flatten(2))


def feed_forward(width: int, inner: int) -> nn.Sequential:
    """The MLP of a resampler's layer, its norm first."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, width, bias=False),
    )


class _IdEncoder(nn.Module):
    """What both versions share: their inputs, and the zero tokens behind the others.

    A zero token has a key and a value of zero, so it takes attention away from the face: with more
    of them a picture is easier to edit and less alike.
    """

    def __init__(self, *, tokens: int, width: int, identity: int, zero_tokens: int) -> None:
        super().__init__()
        self.tokens = tokens + zero_tokens
        self.width = width
        self.zero_tokens = zero_tokens
        self._identity = identity

    def input_shapes(self, positions: Dimension) -> dict[str, tuple[Dimension, ...]]:
        """Shapes of the inputs by name, without rows, for so many positions of the tower."""
        mapping = cast(nn.Sequential, self.get_submodule("mapping_0"))
        features = cast(nn.Linear, mapping[0]).in_features
        return {
            "face_embeds": (EMBEDDING,),
            "clip_embeds": (self._identity - EMBEDDING,),
            "clip_hidden_states": (LEVELS, positions, features),
        }

    def _with_zero_tokens(self, tokens_BTC: Tensor) -> Tensor:
        return functional.pad(tokens_BTC, (0, 0, 0, self.zero_tokens))


class IDFormer(_IdEncoder):
    """PuLID 1.1: queries and id tokens attend to one level of the tower after the other."""

    default_zero_tokens: ClassVar[int] = 20
    """Of PuLID's demonstration of this version."""

    def __init__(
        self,
        *,
        queries: int = 32,
        width: int = 1024,
        inner: int = 1024,
        hidden: int = 4096,
        depth: int = 10,
        output: int = 2048,
        identity: Sequence[int] = (1280, 1024, 1024, 1024 * ID_TOKENS),
        features: Sequence[int] = (1024, 1024, 1024, 1024),
        zero_tokens: int = 0,
    ) -> None:
        super().__init__(
            tokens=queries, width=output, identity=identity[0], zero_tokens=zero_tokens
        )
        self.latents = nn.Parameter(torch.randn(1, queries, width) * width**-0.5)
        self.proj_out = nn.Parameter(torch.randn(width, output) * width**-0.5)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(width, inner), feed_forward(width, hidden)))
            for _ in range(depth)
        )
        for level in range(LEVELS):
            self.add_module(f"mapping_{level}", _mapping(features))
        self.id_embedding_mapping = _mapping(identity)

    @classmethod
    def from_state_dict(cls, state: State, zero_tokens: int | None = None) -> IDFormer:
        """Build and load from a file's `id_adapter` part; sizes are read off its tensors."""
        module = cls(
            queries=state["latents"].shape[1],
            width=state["latents"].shape[2],
            inner=state["layers.0.0.to_q.weight"].shape[0],
            hidden=state["layers.0.1.1.weight"].shape[0],
            depth=len({key.split(".")[1] for key in state if key.startswith("layers.")}),
            output=state["proj_out"].shape[1],
            identity=_mapping_sizes(state, "id_embedding_mapping"),
            features=_mapping_sizes(state, "mapping_0"),
            zero_tokens=cls.default_zero_tokens if zero_tokens is None else zero_tokens,
        )
        module.load_state_dict(state)
        return module

    def forward(
        self, face_embeds: Tensor, clip_embeds: Tensor, clip_hidden_states: Tensor
    ) -> Tensor:
        """Id tokens [B,T,C] from [B,E] of ArcFace's own length, [B,P] of length 1, [B,V,S,K]."""
        identity = self.id_embedding_mapping(torch.cat((face_embeds, clip_embeds), dim=-1))
        identity_BIW = identity.unflatten(-1, (-1, self.latents.shape[-1]))
        queries_BQW = self.latents.expand(identity_BIW.shape[0], -1, -1)
        tokens = torch.cat((queries_BQW, identity_BIW), dim=1)
        per_level = len(self.layers) // LEVELS
        for index, layer in enumerate(self.layers):
            level = index // per_level
            if index % per_level == 0:
                features_BSW = self.get_submodule(f"mapping_{level}")(clip_hidden_states[:, level])
                context = torch.cat((identity_BIW, features_BSW), dim=1)
            attention, forward = cast(nn.ModuleList, layer)
            tokens = attention(context, tokens) + tokens
            tokens = forward(tokens) + tokens
        return self._with_zero_tokens(tokens[:, : self.latents.shape[1]] @ self.proj_out)


class IDEncoder(_IdEncoder):
    """PuLID 1: five tokens of the embeddings, and one of each level of the tower."""

    default_zero_tokens: ClassVar[int] = 8
    """Of PuLID's demonstration of this version, in its mode for fidelity."""

    def __init__(
        self,
        *,
        output: int = 2048,
        identity: Sequence[int] = (1280, 1024, 1024, 2048 * ID_TOKENS),
        features: Sequence[int] = (1024, 1024, 1024, 2048),
        zero_tokens: int = 0,
    ) -> None:
        super().__init__(
            tokens=identity[3] // output + LEVELS,
            width=output,
            identity=identity[0],
            zero_tokens=zero_tokens,
        )
        self.body = _mapping(identity)
        for level in range(LEVELS):
            self.add_module(f"mapping_{level}", _mapping(features))
            self.add_module(f"mapping_patch_{level}", _mapping(features))

    @classmethod
    def from_state_dict(cls, state: State, zero_tokens: int | None = None) -> IDEncoder:
        """Build and load from a file's `id_adapter` part; sizes are read off its tensors."""
        features = _mapping_sizes(state, "mapping_0")
        module = cls(
            output=features[3],
            identity=_mapping_sizes(state, "body"),
            features=features,
            zero_tokens=cls.default_zero_tokens if zero_tokens is None else zero_tokens,
        )
        module.load_state_dict(state)
        return module

    def forward(
        self, face_embeds: Tensor, clip_embeds: Tensor, clip_hidden_states: Tensor
    ) -> Tensor:
        """Id tokens [B,T,C]; inputs as of `IDFormer.forward`."""
        identity = self.body(torch.cat((face_embeds, clip_embeds), dim=-1))
        tokens = [identity.unflatten(-1, (-1, self.width))]
        for level in range(LEVELS):
            states_BSK = clip_hidden_states[:, level]
            of_picture = self.get_submodule(f"mapping_{level}")(states_BSK[:, :1])
            of_patches = self.get_submodule(f"mapping_patch_{level}")(states_BSK[:, 1:])
            tokens.append(of_picture + of_patches.mean(dim=1, keepdim=True))
        return self._with_zero_tokens(torch.cat(tokens, dim=1))


def _mapping(sizes: Sequence[int]) -> nn.Sequential:
    """Three linear layers, the first two normalised and leaky: every MLP of PuLID."""
    return nn.Sequential(
        nn.Linear(sizes[0], sizes[1]),
        nn.LayerNorm(sizes[1]),
        nn.LeakyReLU(),
        nn.Linear(sizes[1], sizes[2]),
        nn.LayerNorm(sizes[2]),
        nn.LeakyReLU(),
        nn.Linear(sizes[2], sizes[3]),
    )


def _mapping_sizes(state: State, name: str) -> tuple[int, ...]:
    first, second, third = (state[f"{name}.{layer}.weight"].shape for layer in (0, 3, 6))
    return first[1], first[0], second[0], third[0]
