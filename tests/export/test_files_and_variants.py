"""Folders, variants, hub repositories and single files: what is taken, and what is said of the
rest before anything is exported."""

import fnmatch
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastface_trt.checkpoints import CHECKPOINTS, HubItem, find_checkpoint
from fastface_trt.errors import WeightsError
from fastface_trt.export.full_size import sdxl_config
from fastface_trt.export.locations import pick_weights
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.sources import CheckpointSource, model_part
from fastface_trt.export.weights import CheckpointWeights
from fastface_trt.mini import folders
from tests.helpers.ldm_layout import open_clip, unet_key, vae_key, write_single_file

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
STEMS = dict(zip(COMPONENTS, ["diffusion_pytorch_model"] * 2 + ["model"] * 2, strict=True))
SOME = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _no_request(monkeypatch):
    """Nothing here asks the hub, but the tests that put a hub of their own in its place."""

    def request(*arguments, **_):
        raise AssertionError(f"asked the hub for {arguments}")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", request)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", request)


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny checkpoint."""
    return Path(shutil.copytree(tiny / "checkpoint", tmp_path / "checkpoint"))


def source(path, dtype=torch.float32, base=None, **options):
    base = base or HubItem("stabilityai/stable-diffusion-xl-base-1.0")
    read = CheckpointSource(HubItem(str(path)), dtype, base, **options)
    read.find()
    return read


def weights_of(folder, component):
    return load_file(folder / component / f"{STEMS[component]}.safetensors")


def rewrite(folder, component, names, change=lambda t: t):
    """Put a component's weights into the files `names`, its first one removed."""
    state = {k: change(v) for k, v in weights_of(folder, component).items()}
    (folder / component / f"{STEMS[component]}.safetensors").unlink()
    for number, name in enumerate(names):
        part = {k: state[k] for k in list(state)[number :: len(names)]}
        path = folder / component / name
        if path.suffix == ".bin":
            torch.save(part, path)
        else:
            save_file(part, path)
    return state


SHARDS = [
    ["S.safetensors"],
    ["S.fp16.safetensors"],
    ["S.non_ema.safetensors"],
    ["S-00001-of-00002.safetensors", "S-00002-of-00002.safetensors"],
    ["S-00001-of-00002.fp16.safetensors", "S-00002-of-00002.fp16.safetensors"],
    ["S.fp16-00001-of-00002.safetensors", "S.fp16-00002-of-00002.safetensors"],
    ["S.bin"],
    ["S.fp16.bin"],
]


@pytest.mark.parametrize("names", SHARDS, ids=lambda names: names[0])
@pytest.mark.parametrize("dtype", SOME, ids=str)
def test_a_folder_with_one_set_of_weights_is_read(folder, names, dtype):
    expected = {}
    for component, stem in STEMS.items():
        named = [name.replace("S", stem, 1) for name in names]
        expected[component] = rewrite(folder, component, named)
    read = source(folder, dtype)
    for component, state in expected.items():
        model = read.component(component).state_dict()
        assert model.keys() == state.keys()
        assert all(torch.equal(model[k], state[k].to(dtype)) for k in state)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1.0), (torch.float16, 2.0)])
def test_of_both_variants_the_one_of_the_precision_is_read(folder, dtype, value):
    for number, name in ((1.0, "S.safetensors"), (2.0, "S.fp16.safetensors"), (3.0, "S.bin")):
        state = {k: torch.full_like(v, number) for k, v in weights_of(folder, "unet").items()}
        path = folder / "unet" / name.replace("S", "diffusion_pytorch_model")
        torch.save(state, path) if path.suffix == ".bin" else save_file(state, path)
    assert (source(folder, dtype).component("unet").conv_in.weight == value).all()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], "2 of 3 shards"),
        (["flax_model.msgpack", "model.onnx"], "it holds flax_model.msgpack, model.onnx"),
        (["model.ema.safetensors", "model.other.safetensors"], "variants ema, other"),
    ],
)
def test_weights_that_cannot_be_chosen_are_named(names, said):
    with pytest.raises(WeightsError, match=said):
        pick_weights(names, "The UNet", torch.float32)


def test_what_a_pipeline_does_not_need_may_be_missing_and_what_it_needs_is_named(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": [None, None], "feature_extractor": ["transformers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    source(folder)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(WeightsError, match="has no second text encoder") as caught:
        source(folder)
    assert "--base-text" in caught.value.hint
    shutil.rmtree(folder / "vae")
    with pytest.raises(WeightsError, match="has no folder vae") as caught:
        source(folder)
    assert "--vae" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "mid_block" not in k},
            "tensors .mid_block.* mis",
        ),
        (lambda s: s | {"conv_out.weight": s["conv_out.weight"][:3]}, r"\[3, 8, 3, 3\] instead of"),
        (lambda s: s | {"adm_proj.weight": torch.ones(3)}, "1 tensor .adm_proj.weight. is of no"),
    ],
)
def test_a_unet_that_does_not_fit_is_told_by_its_keys_and_shapes(folder, change, said):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    with pytest.raises(WeightsError, match=said) as caught:
        source(folder)
    assert caught.value.message.startswith("The UNet of checkpoint, ")
    assert "licence" not in caught.value.hint


@pytest.mark.parametrize(
    ("make", "said", "hint"),
    [
        (lambda f: f.parent, "no SDXL checkpoint", "Name the folder in it: .*checkpoint"),
        (lambda f: f / "unet", "no SDXL checkpoint", "pipeline's folder above it"),
        (lambda f: f / "tokenizer", "no SDXL checkpoint", "has unet, vae"),
        (lambda f: _class_named(f, "StableDiffusionPipeline"), "is a StableDiffusionPipeline", ""),
        (lambda f: f / "missing.safetensors", "There is no ", ""),
        (lambda f: _quantised(f), "weights in bitsandbytes' format", "fp16"),
    ],
)
def test_a_base_that_is_none_is_told(folder, make, said, hint):
    with pytest.raises(WeightsError, match=said) as caught:
        source(make(folder))
    assert re.search(hint, caught.value.hint)


def _class_named(folder, name):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def _quantised(folder):
    file = folder / "unet" / "config.json"
    stated = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    return folder


# Single files


@pytest.fixture
def one_file(tiny, tmp_path):
    """The tiny checkpoint as one file, changed by `change(state)`."""

    def write(change=lambda state: state, name="one.safetensors"):
        write_single_file(tiny / "checkpoint", tmp_path / name)
        state = change(load_file(tmp_path / name))
        state = {k: v.clone().contiguous() for k, v in state.items()}
        if name.endswith(".safetensors"):
            save_file(state, tmp_path / name)
        else:
            torch.save({"state_dict": state, "global_step": 7}, tmp_path / name)
        return tmp_path / name

    return write


def without(*prefixes):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(prefixes)}


def test_a_complete_file_needs_of_the_hub_nothing_but_tokenizers(one_file, tiny):
    folder = HubItem(str(tiny / "checkpoint"))
    ours = source(one_file(), base_text=folder)
    for component in COMPONENTS:
        state = weights_of(tiny / "checkpoint", component)
        assert all(
            torch.equal(v, state[k]) for k, v in ours.component(component).state_dict().items()
        )
    assert ours.tokenizer("tokenizer") == tiny / "checkpoint" / "tokenizer"
    assert ours.config("scheduler")["prediction_type"] == "epsilon"
    assert [s.role for s in ours.sources] == ["checkpoint", "tokenizers"]


def test_offline_a_file_without_tokenizers_says_how_to_give_them(one_file, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    def offline(*_, **__):
        raise OfflineModeIsEnabled("offline")

    def not_cached(*_, **__):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", not_cached)
    with pytest.raises(WeightsError, match="one file, without tokenizers") as caught:
        source(one_file())
    assert "--base-text FOLDER" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "lacks", "options"),
    [
        (without("conditioner."), "no first text encoder and no second", ["--base-text"]),
        (without("conditioner.embedders.1."), "no second text encoder", ["--base-text"]),
        (without("first_stage_model."), "no VAE", ["--vae"]),
        (without("conditioner.", "first_"), "no VAE and no first", ["--vae", "--base-text"]),
        (without("model."), "text encoders in one file and has no UNet", ["--base takes"]),
    ],
)
def test_a_file_that_lacks_models_says_which_option_gives_them(
    one_file, tiny, change, lacks, options
):
    with pytest.raises(WeightsError, match=lacks) as caught:
        source(one_file(change), base=HubItem(str(tiny / "checkpoint")))
    assert all(option in caught.value.hint for option in options)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("spelling", [str, unet_key], ids=["diffusers", "original"])
def test_a_unet_alone_takes_its_other_models_from_the_options(tiny, tmp_path, prefix, spelling):
    state = weights_of(tiny / "checkpoint", "unet")
    save_file({prefix + spelling(k): v for k, v in state.items()}, tmp_path / "unet.safetensors")
    folder = HubItem(str(tiny / "checkpoint"))
    read = source(tmp_path / "unet.safetensors", base_text=folder, without=("vae",))
    assert all(torch.equal(v, state[k]) for k, v in read.component("unet").state_dict().items())
    text = weights_of(tiny / "checkpoint", "text_encoder_2")
    assert all(
        torch.equal(v, text[k]) for k, v in read.component("text_encoder_2").state_dict().items()
    )
    assert [s.role for s in read.sources] == ["checkpoint", "text encoders and tokenizers"]


def test_a_training_checkpoint_is_a_single_file_too(one_file, tiny):
    read = source(one_file(name="last.ckpt"), base=HubItem(str(tiny / "checkpoint")))
    state = weights_of(tiny / "checkpoint", "vae")
    assert all(torch.equal(v, state[k]) for k, v in read.component("vae").state_dict().items())


def test_copies_and_buffers_are_left_out_and_copies_are_said(one_file, tiny):
    needless = {
        "model_ema.diffusion_modelout0weight": torch.ones(3),
        "model_ema.decay": torch.ones(()),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77),
        "conditioner.embedders.1.model.logit_scale": torch.ones(()),
        "denoiser.sigmas": torch.ones(1000),
        "alphas_cumprod": torch.ones(1000),
    }
    base = HubItem(str(tiny / "checkpoint"))
    read = source(one_file(lambda state: state | needless), base=base)
    assert read.notes == ["one.safetensors: 2 tensors are EMA copies and are left out"]
    strange = {"control_model.middle_block_out.0.weight": torch.ones(3)}
    with pytest.raises(WeightsError, match=r"1 tensor .control_model.* of no place"):
        source(one_file(lambda state: state | strange), base=base)


def test_scaled_fp8_in_a_single_file_equals_its_dequantised_weights(one_file, tiny):
    scaled = torch.float8_e4m3fn

    def quantise(state):
        out = {"model.diffusion_model.scaled_fp8": torch.zeros(2).to(scaled)}
        for name, tensor in state.items():
            linear = name.startswith("model.") and tensor.ndim == 2 and name.endswith(".weight")
            if not linear:
                out[name] = tensor
                continue
            scale = tensor.abs().max() / 448
            out[name] = (tensor / scale).to(scaled)
            out[name.replace(".weight", ".scale_weight")] = scale
        return out

    base = HubItem(str(tiny / "checkpoint"))
    file = one_file(quantise)
    stored = load_file(file)
    unet = source(file, base=base).component("unet").state_dict()
    checked = 0
    for name, weight in unet.items():
        spelled = "model.diffusion_model." + unet_key(name)
        scale = stored.get(spelled.replace(".weight", ".scale_weight"))
        if scale is not None and weight.ndim == 2:
            expected = stored[spelled].double() * scale.double()
            torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=0)
            checked += 1
    assert checked > 20


def test_sdxl_itself_is_known_without_its_configuration():
    """The shapes of the published checkpoint: its numbers of parameters are well known."""
    from fastface_trt.export.sources import Part, _class_of

    numbers = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480}
    for component, number in numbers.items():
        config = sdxl_config(component)
        model = Part(component, _class_of(component, config), config, {}).skeleton()
        assert sum(p.numel() for p in model.parameters()) == number


# A VAE and an image encoder of their own

VAE_FORMS = {
    "original": lambda s: {vae_key(k, 2): v for k, v in s.items()},
    "checkpoint": lambda s: {f"first_stage_model.{vae_key(k, 2)}": v for k, v in s.items()},
    "diffusers": dict,
    "old diffusers": lambda s: {_old_attention(k): v for k, v in s.items()},
}


def _old_attention(name):
    for now, before in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value.")):
        name = name.replace(now, before)
    return name.replace(".to_out.0.", ".proj_attn.")


@pytest.mark.parametrize("form", VAE_FORMS)
def test_a_vae_is_read_as_one_file(tiny, tmp_path, form):
    state = weights_of(tiny / "checkpoint", "vae")
    written = VAE_FORMS[form](state)
    if form in ("original", "checkpoint"):  # its attention is made of 1×1 convolutions
        written = {
            k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v
            for k, v in written.items()
        }
    save_file(written | {"loss.logvar": torch.ones(())}, tmp_path / "vae.safetensors")
    config = json.loads((tiny / "checkpoint" / "vae" / "config.json").read_text())
    item = HubItem(str(tmp_path / "vae.safetensors"))
    part, _, _ = model_part("vae", item, torch.float32, config)
    model = part.load(torch.float32).state_dict()
    assert model.keys() == state.keys()
    assert all(torch.equal(model[k], state[k]) for k in state)


def test_a_pipelines_folder_as_vae_gives_the_vae_in_it(tiny):
    item = HubItem(str(tiny / "checkpoint"))
    part, where, _ = model_part("vae", item, torch.float32, {}, inside=("vae",))
    assert where == tiny / "checkpoint" / "vae"
    assert part.load(torch.float32).config.scaling_factor == 0.5


def _vision_as_open_clip(state):
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("vision_model.")
        renamed[name.replace("embeddings.position_embedding.weight", "positional_embedding")] = (
            tensor
        )
    out = {f"visual.{k}": v for k, v in open_clip(renamed).items()}
    ends = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
        "positional_embedding": "positional_embedding",
    }
    out |= {f"visual.{theirs}": renamed[ours] for ours, theirs in ends.items()}
    return out | {
        "visual.proj": renamed["visual_projection.weight"].T,
        "logit_scale": torch.ones(()),
    }


@pytest.mark.parametrize("form", [dict, _vision_as_open_clip], ids=["transformers", "open_clip"])
def test_an_image_encoder_is_read_as_one_file(tiny, tmp_path, form):
    state = load_file(tiny / "image_encoder" / "model.safetensors")
    written = {k: v.clone().contiguous() for k, v in form(state).items()}
    save_file(written | {"text_projection": torch.ones(2, 2)}, tmp_path / "clip.safetensors")
    config = json.loads((tiny / "image_encoder" / "config.json").read_text())
    item = HubItem(str(tmp_path / "clip.safetensors"))
    part, _, _ = model_part("image_encoder", item, torch.float32, config)
    model = part.load(torch.float32).state_dict()
    assert model.keys() == state.keys()
    assert all(torch.equal(model[k], state[k]) for k in state)


@pytest.mark.parametrize("component", ["vae", "image_encoder"])
def test_a_file_of_another_kind_is_told_by_what_it_is(tmp_path, component):
    lora = {
        "lora_unet_x.lora_down.weight": torch.ones(4, 4),
        "lora_unet_x.lora_up.weight": torch.ones(4, 4),
    }
    save_file({k: v.clone() for k, v in lora.items()}, tmp_path / "x.safetensors")
    item = HubItem(str(tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match=r"x.safetensors is a LoRA .*; --.* takes"):
        model_part(component, item, torch.float32, sdxl_config(component))


# A whole set of options


def test_everything_is_checked_before_the_first_model_is_loaded(tiny, folder, monkeypatch):
    """A UNet that does not fit, and an adapter of another model: no model is loaded for it."""
    monkeypatch.setattr("fastface_trt.export.sources.Part.load", lambda *_: pytest.fail("loaded"))
    mini = find_checkpoint("mini")
    with pytest.raises(WeightsError, match=r"does not fit this checkpoint"):
        CheckpointWeights(ExportOptions(mini, adapter=HubItem(str(tiny / "adapter.safetensors"))))
    other = ExportOptions(mini, image_encoder=HubItem(str(tiny / "image_encoder")))
    with pytest.raises(WeightsError, match=r"image encoder is 16 wide, and the adapter .* 96"):
        CheckpointWeights(other)
    shutil.rmtree(folder / "unet")
    shutil.copytree(folders.CHECKPOINT / "unet", folder / "unet")
    with pytest.raises(WeightsError, match=r"text encoders are 16 and 24 wide, and the UNet .* 96"):
        CheckpointWeights(ExportOptions(mini, base=HubItem(str(folder))))


def test_a_local_export_in_fp32_asks_the_hub_for_nothing():
    entry = replace(
        CHECKPOINTS["base"],
        base=HubItem("stabilityai/x", "0" * 40),
    )
    options = ExportOptions(
        entry,
        base=HubItem(str(folders.CHECKPOINT)),
        adapter=HubItem(str(folders.ADAPTER)),
        image_encoder=HubItem(str(folders.IMAGE_ENCODER)),
    )
    assert [s.role for s in CheckpointWeights(options).sources] == [
        "checkpoint",
        "adapter",
        "image_encoder",
    ]


# The hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose repositories are folders; tells which files were downloaded."""

    class Hub:
        def __init__(self):
            self.repositories = {}
            self.downloaded = []

        def files(self, folder):
            return sorted(
                p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
            )

        def list_repo_files(self, _, repository, revision=None):
            return self.files(self.repositories[repository])

        def snapshot_download(self, repository, *, revision=None, allow_patterns=("*",)):
            folder = self.repositories[repository]
            snapshot = tmp_path / "hub" / repository.replace("/", "--") / COMMIT
            for name in self.files(folder):
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name, snapshot / name)
                    self.downloaded.append(name)
            return str(snapshot)

    fake = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.list_repo_files",
        lambda self, repository, revision=None: fake.list_repo_files(self, repository, revision),
    )
    return fake


@pytest.mark.parametrize("dtype", SOME, ids=str)
@pytest.mark.parametrize("variants", [("",), (".fp16",), ("", ".fp16")], ids=str)
def test_of_a_repository_one_variant_is_downloaded(hub, folder, dtype, variants):
    for component, stem in STEMS.items():
        state = weights_of(folder, component)
        (folder / component / f"{stem}.safetensors").unlink()
        for variant in variants:
            save_file(state, folder / component / f"{stem}{variant}.safetensors")
        torch.save(state, folder / component / f"{stem}.bin")
    (folder / "sd_xl_base_1.0.safetensors").write_bytes(b"large")
    hub.repositories["owner/name"] = folder
    read = CheckpointSource(HubItem("owner/name"), dtype, HubItem("owner/name"))
    best = (
        ".fp16" if variants == (".fp16",) or (dtype == torch.float16 and len(variants) == 2) else ""
    )
    weights = [n for n in hub.downloaded if n.endswith((".safetensors", ".bin"))]
    assert sorted(weights) == sorted(f"{c}/{s}{best}.safetensors" for c, s in STEMS.items())
    assert read.located.source.revision == COMMIT
    assert read.component("vae").dtype == dtype


def test_of_a_repository_without_a_pipeline_the_files_are_named(hub, tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "dream.safetensors").write_bytes(b"x")
    hub.repositories["owner/name"] = tmp_path / "repository"
    with pytest.raises(WeightsError, match="no folder unet") as caught:
        CheckpointSource(HubItem("owner/name"), torch.float32, HubItem("owner/name"))
    assert "owner/name/dream.safetensors" in caught.value.hint
    assert hub.downloaded == []


def test_of_a_repository_a_vae_is_downloaded_in_one_variant(hub, folder):
    vae = folder / "vae"
    shutil.copyfile(
        vae / "diffusion_pytorch_model.safetensors",
        vae / "diffusion_pytorch_model.fp16.safetensors",
    )
    hub.repositories["owner/pipeline"] = folder
    hub.repositories["owner/vae"] = vae
    for name, below in (("owner/pipeline", "vae/"), ("owner/vae", "")):
        hub.downloaded.clear()
        part, _, _ = model_part("vae", HubItem(name), torch.float16, {}, inside=("vae",))
        assert part.load(torch.float16).dtype == torch.float16
        wanted = ("config.json", "diffusion_pytorch_model.fp16.safetensors")
        assert hub.downloaded == [below + file for file in wanted]


def test_text_encoders_come_from_a_repository_only_where_the_file_has_none(hub, one_file, folder):
    hub.repositories["owner/base"] = folder
    base = HubItem("owner/base")
    source(one_file(), base=base, base_text=base)
    assert not any(name.endswith(".safetensors") for name in hub.downloaded)
    hub.downloaded.clear()
    source(one_file(without("conditioner.")), base=base, base_text=base)
    assert [n for n in hub.downloaded if n.endswith(".safetensors")] == [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    ]
