"""The modules of an export that hold weights, with their example inputs and dynamic sizes.

Those that look at a face are in `fastface_trt.export.face_modules`.

Shape legend: B rows, R requests, T image tokens, C text width, P pooled width, h × w latent size.

Types at the boundaries are those of `fastface_trt.export.precision`, whatever a module computes in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastface_trt.engines import contract
from fastface_trt.engines.contract import TEXT_POSITIONS
from fastface_trt.engines.manifest import Dimension
from fastface_trt.export.operators import SPELLED, Operators
from fastface_trt.export.precision import Model, boundary_dtype, keep_group_norms_in_float32
from fastface_trt.export.quantization.graph import QuantizationPlan

EXAMPLE_REQUESTS = 2  # at least 2, or the exporter takes the size for a constant
EXAMPLE_ROWS = 6


@dataclass(frozen=True)
class ModuleExport:
    """What the writer needs to export one module.

    `inputs` maps names to example tensors, in the order of `module.forward`; `shapes` gives every
    input's and output's shape with names for its dynamic sizes.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[Dimension, ...]]
    multiples: Mapping[str, int] = field(default_factory=dict)
    """Dynamic sizes that are multiples of a number (height and width of the UNet)."""
    quantization: QuantizationPlan | None = None


class TextEncoderModule(nn.Module):
    """input_ids [B,77] to the penultimate hidden states [B,77,C], and the pooled text [B,P]."""

    def __init__(self, encoder: Model, *, pooled: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooled = pooled

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states, and the projected pooled output where the encoder is SDXL's second."""
        output = self.encoder(input_ids, output_hidden_states=True)
        dtype = boundary_dtype(self.encoder.dtype)
        hidden = output.hidden_states[-2].to(dtype)
        return (hidden, output.text_embeds.to(dtype)) if self.pooled else hidden


class _CastOutput(nn.Module):
    """Runs a module and casts what it returns.

    SDXL concatenates the pooled text with an embedding of `time_ids` that is always float32. Eager
    PyTorch promotes silently; ONNX does not, and TensorRT rejects a Concat of two types.
    """

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """The inner module's output in the chosen dtype."""
        return self.inner(x).to(self.dtype)


class UNetModule(nn.Module):
    """A diffusers SDXL UNet with decoupled attention behind the contract of the UNet module.

    Latents come and noise predictions go in float32.
    """

    def __init__(self, unet: Model) -> None:
        super().__init__()
        keep_group_norms_in_float32(unet)
        if not isinstance(unet.add_time_proj, _CastOutput):
            unet.add_time_proj = _CastOutput(unet.add_time_proj, unet.dtype)
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        image_tokens: Tensor,
        ip_adapter_scale: Tensor,
        attention_manipulation: Tensor,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Noise prediction [B,4,h,w]; shapes of the inputs in `fastface_trt.engines.contract`."""
        dtype = self.unet.dtype
        prediction = self.unet(
            sample.to(dtype),
            timestep,
            encoder_hidden_states.to(dtype),
            added_cond_kwargs={"text_embeds": text_embeds.to(dtype), "time_ids": time_ids},
            cross_attention_kwargs={
                "image_tokens": image_tokens.to(dtype),
                "ip_adapter_scale": ip_adapter_scale,
                "attention_manipulation": attention_manipulation,
            }
            | ({} if token_mask is None else {"token_mask": token_mask}),
            return_dict=False,
        )[0]
        return prediction.float()


class VaeDecoderModule(nn.Module):
    """Scheduler latents [B,4,h,w] to a picture in [0, 1], float32 [B,3,H,W], and to its pixels.

    Pixels are uint8 [B,H,W,3], computed in float32 in whatever type the VAE computes.
    """

    def __init__(self, vae: Model) -> None:
        super().__init__()
        keep_group_norms_in_float32(vae)
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Undo the VAE's scaling, decode, map [−1, 1] to [0, 1], and round that to bytes."""
        config = self.vae.config
        shift: Tensor | float = getattr(config, "shift_factor", None) or 0.0
        mean, std = (getattr(config, f"latents_{of}", None) for of in ("mean", "std"))
        if mean is not None and std is not None:
            latents = latents * latents.new_tensor(std).reshape(1, -1, 1, 1)
            shift = shift + latents.new_tensor(mean).reshape(1, -1, 1, 1)
        latents = latents / config.scaling_factor + shift
        picture = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        picture = (picture.float() / 2 + 0.5).clamp(0, 1)
        # The cast comes last of all: TensorRT takes uint8 nowhere but at an output.
        return picture, (picture * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


def text_encoder_export(name: str, encoder: Model) -> ModuleExport:
    """One of SDXL's two text encoders; the second also gives the pooled text."""
    pooled = name == "text_encoder_2"
    shapes: dict[str, tuple[Dimension, ...]] = {
        "input_ids": ("batch", TEXT_POSITIONS),
        "hidden_states": ("batch", TEXT_POSITIONS, encoder.config.hidden_size),
    }
    if pooled:
        shapes["text_embeds"] = ("batch", encoder.config.projection_dim)
    ids = torch.zeros((EXAMPLE_REQUESTS, TEXT_POSITIONS), dtype=torch.int64)
    ids[:, 5:] = encoder.config.eos_token_id
    return ModuleExport(
        name,
        TextEncoderModule(encoder, pooled=pooled),
        {"input_ids": ids},
        ("hidden_states", "text_embeds") if pooled else ("hidden_states",),
        shapes,
    )


def unet_export(
    unet: Model,
    *,
    tokens: int,
    latent_size: tuple[int, int],
    fixed_size: bool,
    operators: Operators = SPELLED,
    masked: bool = False,
) -> ModuleExport:
    """The UNet with its adapter attached; `latent_size` is (h, w), fixed or only the example's.

    With `masked` it takes a mask of the image tokens, of which `tokens` are the most.
    """
    operators.apply(unet)
    config, dtype, rows = unet.config, boundary_dtype(unet.dtype), EXAMPLE_ROWS
    text_width = config.cross_attention_dim
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    parts, columns = len(contract.PARTS), len(contract.MANIPULATION_COLUMNS)
    height, width = latent_size
    size: tuple[Dimension, Dimension] = latent_size if fixed_size else ("height", "width")
    inputs = {
        contract.SAMPLE: torch.zeros(rows, config.in_channels, height, width),
        contract.TIMESTEP: torch.zeros(rows),
        contract.TEXT: torch.zeros(rows, TEXT_POSITIONS, text_width, dtype=dtype),
        contract.POOLED_TEXT: torch.zeros(rows, pooled_width, dtype=dtype),
        contract.TIME_IDS: torch.zeros(rows, 6),
        contract.IMAGE_TOKENS: torch.zeros(rows, tokens, text_width, dtype=dtype),
        contract.IP_ADAPTER_SCALE: torch.zeros(EXAMPLE_REQUESTS, parts),
        contract.MANIPULATION: torch.zeros(EXAMPLE_REQUESTS, parts, columns),
    }
    if masked:
        inputs[contract.TOKEN_MASK] = torch.zeros(rows, tokens)
    shapes: dict[str, tuple[Dimension, ...]] = {
        name: (
            ("requests" if tensor.shape[0] == EXAMPLE_REQUESTS else "batch"),
            *tensor.shape[1:],
        )
        for name, tensor in inputs.items()
    }
    shapes[contract.SAMPLE] = ("batch", config.in_channels, *size)
    shapes[contract.TEXT] = ("batch", "text", text_width)
    shapes[contract.NOISE_PREDICTION] = ("batch", config.out_channels, *size)
    levels = 2 ** (len(config.block_out_channels) - 1)
    return ModuleExport(
        "unet",
        UNetModule(unet),
        inputs,
        (contract.NOISE_PREDICTION,),
        shapes,
        {} if fixed_size else {"height": levels, "width": levels},
    )


def vae_decoder_export(
    vae: Model,
    *,
    latent_size: tuple[int, int],
    scale_factor: int,
    fixed_size: bool,
    operators: Operators = SPELLED,
) -> ModuleExport:
    """The VAE's decoder (AutoencoderKL or the tiny one)."""
    operators.apply(vae)
    channels = vae.config.latent_channels
    size: tuple[Dimension, Dimension] = latent_size if fixed_size else ("height", "width")
    picture: tuple[Dimension, Dimension] = (
        (latent_size[0] * scale_factor, latent_size[1] * scale_factor)
        if fixed_size
        else (f"{scale_factor}*height", f"{scale_factor}*width")
    )
    return ModuleExport(
        "vae_decoder",
        VaeDecoderModule(vae),
        {contract.LATENTS: torch.zeros(EXAMPLE_REQUESTS, channels, *latent_size)},
        (contract.PICTURE, contract.PIXELS),
        {
            contract.LATENTS: ("batch", channels, *size),
            contract.PICTURE: ("batch", 3, *picture),
            contract.PIXELS: ("batch", *picture, 3),
        },
    )
