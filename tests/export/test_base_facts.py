"""What a base says about itself reaches the export, or the export stops and says what it is."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastface_trt.checkpoints import CHECKPOINTS, FP16_VAE, HubItem
from fastface_trt.errors import FastFaceError, InvalidRequest, WeightsError
from fastface_trt.export.modules import VaeDecoderModule
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.weights import CheckpointWeights
from fastface_trt.runtime.schedule import make_schedule
from tests.helpers.ldm_layout import write_single_file

V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "prediction_type": "epsilon",
}
MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
LATENTS = {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny checkpoint as a folder, with changes to its configurations."""

    def make(name="fine-tune", **changes):
        target = tmp_path / name
        shutil.copytree(tiny / "checkpoint", target)
        for part, values in changes.items():
            plain = {"scheduler": "scheduler/scheduler_config.json", "index": "model_index.json"}
            file = target / plain.get(part, f"{part}/config.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return HubItem(str(target))

    return make


@pytest.fixture(scope="module")
def one_file(tiny, tmp_path_factory):
    """Tensors of the tiny checkpoint as a single file."""
    path = tmp_path_factory.mktemp("single") / "one.safetensors"
    write_single_file(tiny / "checkpoint", path)
    return load_file(path)


@pytest.fixture
def single(one_file, tmp_path):
    def make(name="fine-tune", tensors=None, metadata=None):
        path = tmp_path / f"{name}.safetensors"
        save_file(one_file | (tensors or {}), path, metadata)
        return HubItem(str(path))

    return make


@pytest.fixture
def weights(tiny_entry, monkeypatch):
    """Weights of a base under a registry entry's sampler and LoRA, and what was said."""
    # The registry's LoRA and Lightning's UNet are the hub's.
    monkeypatch.setattr("fastface_trt.export.weights.plan_loras", lambda requests, source: [])
    replaced = CheckpointWeights._replace

    def replace_local(self, name, item):
        return "" if name == "unet" else replaced(self, name, item)

    monkeypatch.setattr(CheckpointWeights, "_replace", replace_local)

    def make(base, like="mini", **options):
        entry = CHECKPOINTS[like]
        entry = replace(
            tiny_entry,
            name=like,
            scheduler=entry.scheduler,
            lora=entry.lora,
            unet=entry.unet,
            distilled_base=entry.distilled_base,
        )
        said = []
        made = CheckpointWeights(ExportOptions(entry, base=base, **options), said.append)
        made.said = "\n".join(said)
        return made

    return make


# What it predicts


@pytest.mark.parametrize(
    "own", ["EulerDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("like", ["mini", "lightning", "lcm", "turbo"])
def test_a_folders_prediction_and_zero_snr_go_with_the_registrys_sampler(
    folder, weights, like, own
):
    base = folder(scheduler=V | {"_class_name": own, "timestep_spacing": "leading"})
    made = weights(base, like, base_is_distilled=True)
    assert made.scheduler == CHECKPOINTS[like].scheduler | V
    assert "v_prediction with zero terminal SNR" in made.said


@pytest.mark.parametrize(
    ("tensors", "metadata", "facts"),
    [
        (["v_pred", "ztsnr"], {}, V),
        (["v_pred"], {}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.predict_key": "v", "ss_zero_terminal_snr": "True"}, V),
        ([], {"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.prediction_type": "epsilon"}, {}),
        ([], {}, {}),
    ],
)
def test_a_single_files_markers_and_metadata_say_the_same(
    single, weights, tensors, metadata, facts
):
    base = single(tensors={name: torch.tensor([]) for name in tensors}, metadata=metadata)
    assert weights(base).scheduler == CHECKPOINTS["mini"].scheduler | facts


def test_what_a_base_does_not_say_can_be_said(single, weights):
    made = weights(single(), prediction_type="v_prediction", zero_snr=True)
    assert made.scheduler == CHECKPOINTS["mini"].scheduler | V
    contradicting = single(
        "odd", {"v_pred": torch.tensor([])}, {"modelspec.prediction_type": "epsilon"}
    )
    with pytest.raises(WeightsError, match=r"odd\.safetensors contradicts itself.*modelspec"):
        weights(contradicting)
    assert weights(contradicting, prediction_type="epsilon").scheduler["prediction_type"] == (
        "epsilon"
    )


def test_other_betas_are_kept_and_another_samplers_spacing_is_said(folder, weights):
    own = {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_end": 0.02,
        "use_karras_sigmas": True,
    }
    made = weights(folder(scheduler=own))
    assert made.scheduler == CHECKPOINTS["mini"].scheduler | {"beta_end": 0.02}
    assert "DPMSolverMultistepScheduler with use_karras_sigmas" in made.said


# EDM, and whole pictures as diffusers makes them


def test_edm_is_read_from_a_folder_and_from_a_single_file(folder, single, weights):
    made = weights(folder(scheduler=PLAYGROUND, vae=LATENTS))
    assert made.scheduler["class"] == "EDMEulerScheduler"
    assert made.scheduler["sigma_max"] == 80
    statistics = {"edm_mean": torch.tensor([[MEAN]]), "edm_std": torch.tensor([[STD]])}
    alike = weights(single(tensors=statistics))
    assert make_schedule(alike.scheduler, 4) == make_schedule(made.scheduler, 4)
    for one in (made, alike):
        vae = one.vae().config
        np.testing.assert_allclose([vae.latents_mean, vae.latents_std], [MEAN, STD], rtol=1e-6)
        assert vae.scaling_factor == 0.5
    cosxl = weights(single("cosxl", {"edm_vpred.sigma_max": torch.tensor(120.0)})).scheduler
    assert (cosxl["sigma_max"], cosxl["sigma_data"]) == (120, 1)
    assert cosxl["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("like", "scheduler", "vae"),
    [
        ("mini", V, {}),
        ("lightning", V, {}),
        ("lightning", {"prediction_type": "v_prediction"}, {}),
        ("mini", PLAYGROUND, LATENTS),
    ],
    ids=["ddim-v-zero-snr", "euler-v-zero-snr", "euler-v", "edm-with-normalised-latents"],
)
def test_pictures_of_such_bases_are_those_of_diffusers_pipeline(
    folder, weights, like, scheduler, vae
):
    """The UNet without its adapter, our schedule and our decoder against the whole pipeline."""
    import diffusers

    base = folder(scheduler=scheduler, vae=vae)
    made = weights(base, like, base_is_distilled=True)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base.location)
    config = {key: value for key, value in made.scheduler.items() if key != "class"}
    pipe.scheduler = getattr(diffusers, made.scheduler["class"])(**config)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    text, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 77, 40), (1, 24)))
    theirs = pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=1.0,
        height=16,
        width=16,
        output_type="pt",
    ).images
    schedule = make_schedule(made.scheduler, 4)
    x = noise * schedule.initial_scale
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    with torch.no_grad():
        for step in schedule.steps:
            out = pipe.unet(
                step.input_scale * x, step.timestep, text, added_cond_kwargs=conditions
            ).sample
            x = step.latents * x + step.prediction * out
        ours, _ = VaeDecoderModule(made.vae())(x)
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


# What is refused, by name


@pytest.mark.parametrize(
    ("part", "values", "what"),
    [
        ("unet", {"in_channels": 9}, "an inpainting checkpoint whose UNet has 9 input channels"),
        ("unet", {"in_channels": 8}, "an edit checkpoint whose UNet has 8 input channels"),
        ("unet", {"addition_embed_type": None, "cross_attention_dim": 768}, "SD 1.5"),
        ("unet", {"addition_embed_type": None, "cross_attention_dim": 1024}, "SD 2"),
        ("unet", {"cross_attention_dim": 1280}, "an SDXL refiner"),
        ("index", {"requires_aesthetics_score": True}, "an SDXL refiner"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "Kolors"),
        ("unet", {"time_cond_proj_dim": 256}, "distilled with its guidance as an input"),
        ("unet", {"out_channels": 8}, "predicts 8 channels"),
        ("unet", {"_class_name": "UNetMotionModel"}, "UNetMotionModel"),
        ("unet", {"mid_block_type": None}, "a reduced SDXL checkpoint"),
        ("vae", {"_class_name": "AutoencoderKLQwenImage"}, "AutoencoderKLQwenImage"),
        ("vae", {"latents_mean": MEAN}, "only one of latents_mean and latents_std"),
        ("scheduler", {"clip_sample": True}, "clip_sample"),
        ("scheduler", {"thresholding": True}, "thresholding"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "sigmoid"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "no signal"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "flow matching"),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ("scheduler", {"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler"),
        (
            "scheduler",
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "continuous timesteps",
        ),
    ],
)
def test_another_kind_of_folder_is_refused_by_name(folder, weights, part, values, what):
    with pytest.raises(FastFaceError) as refused:
        weights(folder(**{part: values}))
    assert what in str(refused.value)
    assert refused.value.hint


def test_a_folder_without_a_unet_is_named_by_its_pipeline(folder, weights):
    from pathlib import Path

    base = folder(index={"_class_name": "FluxPipeline"})
    shutil.rmtree(Path(base.location) / "unet")
    with pytest.raises(WeightsError, match="fine-tune is a FluxPipeline, not SDXL"):
        weights(base)


def test_another_kind_of_single_file_is_refused_by_name(one_file, single, weights):
    conv_in = "model.diffusion_model.input_blocks.0.0.weight"
    wide = torch.cat([one_file[conv_in], torch.zeros(8, 5, 3, 3)], dim=1)
    with pytest.raises(WeightsError, match=r"inpainting .*9 input channels"):
        weights(single("inpaint", {conv_in: wide}))
    text = {
        key: torch.zeros(value.shape[0], 1280)
        for key, value in one_file.items()
        if "attn2.to_k" in key or "attn2.to_v" in key
    }
    with pytest.raises(WeightsError, match="an SDXL refiner checkpoint"):
        weights(single("refiner", text))
    with pytest.raises(WeightsError, match="only one of edm_mean and edm_std"):
        weights(single("half", {"edm_mean": torch.zeros(4)}))
    with pytest.raises(WeightsError, match="predicts 'flow'"):
        weights(single("flow", metadata={"modelspec.prediction_type": "flow"}))


def test_a_single_file_with_fewer_layers_is_refused(one_file, tmp_path, weights):
    fewer = {k: v for k, v in one_file.items() if ".middle_block.1." not in k}
    save_file(fewer, tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match=r"small\.safetensors is .*6 cross-attention layers"):
        weights(HubItem(str(tmp_path / "small.safetensors")))


def test_a_lora_given_as_a_base_is_told_where_it_goes(tmp_path, weights):
    name = "lora_unet_output_blocks_1_1_transformer_blocks_9_attn2_to_k"
    factors = {"lora_down": torch.zeros(4, 2048), "lora_up": torch.zeros(1280, 4)}
    state = {f"{name}.{part}.weight": tensor for part, tensor in factors.items()}
    save_file(state, tmp_path / "style.safetensors")
    with pytest.raises(WeightsError, match=r"style\.safetensors is a LoRA of SDXL") as refused:
        weights(HubItem(str(tmp_path / "style.safetensors")))
    assert "--lora" in refused.value.hint


def test_fewer_layers_work_with_an_adapter_that_was_trained_for_them(folder, tmp_path, weights):
    from diffusers import UNet2DConditionModel

    from tests.helpers.tiny_sdxl import UNET, adapter_tensors

    reduced = {"mid_block_type": None}
    base = folder(unet=reduced)
    unet = UNet2DConditionModel(**UNET | reduced)
    unet.save_pretrained(base.location + "/unet")
    save_file(adapter_tensors(unet), tmp_path / "adapter.safetensors")
    made = weights(base, adapter=HubItem(str(tmp_path / "adapter.safetensors")))
    assert len(made.unet().attn_processors) == len(unet.attn_processors) == 12


def test_an_lcm_bases_own_steps_are_kept(folder, weights):
    own = {"_class_name": "LCMScheduler", "original_inference_steps": 40}
    made = weights(folder(scheduler=own), "lcm", base_is_distilled=True)
    assert made.scheduler["original_inference_steps"] == 40


# Distillation


@pytest.mark.parametrize("like", ["hyper", "lightning", "lcm"])
def test_a_base_of_ones_own_is_distilled_by_the_registrys_lora(folder, weights, like):
    base, steps = folder(), "{steps}" if like != "lcm" else "pytorch"
    lora = weights(base, like)._base.distillation
    assert lora == CHECKPOINTS[like].lora
    assert steps in lora.path
    assert weights(base, like, base_is_distilled=True)._base.distillation is None
    assert weights(base, "mini")._base.distillation is None


def test_lightnings_own_base_takes_its_unet_and_no_lora(weights):
    assert weights(None, "lightning")._base.distillation is None
    assert weights(None, "hyper")._base.distillation == CHECKPOINTS["hyper"].lora


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("DreamShaperXL_Lightning-v2", {}),
        ("realvis-turbo", {}),
        ("model-4step", {}),
        ("fine-tune", {"_class_name": "LCMScheduler"}),
    ],
)
def test_a_base_that_seems_distilled_is_not_distilled_again_unasked(
    folder, weights, name, scheduler
):
    base = folder(name, scheduler=scheduler)
    with pytest.raises(InvalidRequest, match=f"{name} seems to be distilled") as refused:
        weights(base, "hyper")
    assert "--base-is-distilled" in refused.value.hint
    assert weights(base, "hyper", base_is_distilled=False)._base.distillation
    assert weights(base, "hyper", base_is_distilled=True)._base.distillation is None
    own = HubItem("lora.safetensors")
    assert weights(base, "hyper", distillation_lora=own)._base.distillation == own


def test_turbo_distils_no_other_base(folder, weights):
    with pytest.raises(InvalidRequest, match="Nothing distils fine-tune"):
        weights(folder(), "turbo")
    with pytest.raises(InvalidRequest, match="EDM"):
        weights(folder("edm", scheduler=PLAYGROUND, vae=LATENTS), "hyper")
    with pytest.raises(InvalidRequest, match="asked of one of your own"):
        ExportOptions(CHECKPOINTS["hyper"], base_is_distilled=True)


# Sizes and the VAE


def test_a_base_of_ones_own_says_its_size(folder, single, weights):
    assert weights(None).size == (32, 32)
    assert weights(folder(unet={"sample_size": [16, 24]})).size == (32, 48)
    assert weights(single(metadata={"modelspec.resolution": "64x32"})).size == (32, 64)


def test_a_base_of_ones_own_keeps_its_vae_and_says_where_it_overflows(folder, weights):
    sound = weights(folder(vae={"force_upcast": False}), precision="fp16")
    assert sound.vae().dtype == torch.float16
    overflowing = weights(folder("other"), precision="fp16")
    said = []
    overflowing._progress = said.append
    assert overflowing.vae().dtype == torch.float32
    assert "force_upcast" in said[0]
    assert "vae" not in [source.role for source in overflowing.sources]


def test_the_vae_that_stands_in_for_the_registrys_is_said(folder, tiny_entry, monkeypatch):
    from fastface_trt.export import weights as module

    fixed = folder("fixed", vae={"force_upcast": False})
    local, model_part = HubItem(f"{fixed.location}/vae"), module.model_part

    def local_part(name, item, *rest, **options):
        return model_part(name, local if item == FP16_VAE else item, *rest, **options)

    monkeypatch.setattr(module, "model_part", local_part)
    said = []
    options = ExportOptions(replace(tiny_entry, fp16_vae=FP16_VAE), precision="fp16")
    made = CheckpointWeights(options, said.append)
    assert made.vae().dtype == torch.float16
    assert said == [f"checkpoint: its VAE overflows in fp16, {FP16_VAE.location} stands in for it"]
    assert "vae" in [source.role for source in made.sources]


def test_a_vae_for_other_latents_is_refused(folder, weights):
    other = folder("sd15", vae={"scaling_factor": 0.18215})
    vae = HubItem(other.location + "/vae")
    with pytest.raises(WeightsError, match=r"scaled by 0\.18215, fine-tune scales them by 0\.5"):
        weights(folder(), vae=vae).vae()


def test_a_vae_that_overflows_is_noticed_before_its_pictures_are_black(folder, weights, tmp_path):
    """Weights a thousand times too large in one layer: infinite in fp16, which the clamp hides."""
    from fastface_trt.export.modules import vae_decoder_export
    from fastface_trt.export.probe import write_probe

    vae = weights(folder(vae={"force_upcast": False}), precision="fp16").vae()
    vae.decoder.conv_out.bias.data.fill_(6e4)
    vae.decoder.conv_out.weight.data.fill_(3e3)
    export = vae_decoder_export(vae, latent_size=(8, 8), scale_factor=2, fixed_size=False)
    with pytest.raises(WeightsError, match=r"vae_decoder .* fp16.*conv_out") as refused:
        write_probe(export, tmp_path, "fp16")
    assert "--vae" in refused.value.hint
