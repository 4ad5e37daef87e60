"""LoRA files: every layout finds its modules, every formula is the published one, all is counted.

Formulas are written out here in float64 with numpy; PEFT's own merge is a second witness.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from fastface_trt.checkpoints import HubItem
from fastface_trt.cli.main import USER_ERROR, cli
from fastface_trt.engines.manifest import LoraFused
from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.export.lora import LoraRequest, fuse, plan_lora
from fastface_trt.export.options import ExportOptions, LoraFile
from fastface_trt.export.sources import CheckpointSource, parse_scaled_item
from fastface_trt.export.weights import CheckpointWeights
from fastface_trt.mini import folders
from tests.helpers.ldm_layout import unet_key
from tests.helpers.tiny_sdxl import UNET, tiny_unet

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LINEAR = f"{BLOCK}.attn1.to_q"
MODULES = (
    LINEAR,
    f"{BLOCK}.attn2.to_out.0",
    f"{BLOCK}.ff.net.0.proj",
    "mid_block.attentions.0.proj_in",
    "time_embedding.linear_2",
    "add_embedding.linear_1",
    "down_blocks.1.resnets.0.time_emb_proj",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.2.resnets.1.conv2",
    "up_blocks.1.attentions.1.proj_out",
    "conv_in",
    "conv_out",
)
TEXT = "encoder.layers.1.mlp.fc1"
RANK = 3


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def request(path, scale=1.0):
    return LoraRequest(HubItem(str(path)), scale, "style")


def write(path, state, metadata=None):
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def models(tiny):
    """Components without values, for checks; `tiny_unet` is the UNet with them."""
    folder = HubItem(str(tiny / "checkpoint"))
    source = CheckpointSource(folder, torch.float32, folder)
    return {name: source.skeleton(name) for name in ("unet", "text_encoder", "text_encoder_2")}


def fused(plan_or_plans, component="unet", model=None):
    """The model's weights in float64 before and after."""
    model = tiny_unet() if model is None else model
    before = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    fuse(component, model, plan_or_plans if isinstance(plan_or_plans, list) else [plan_or_plans])
    return before, {name: p.detach().double().numpy() for name, p in model.state_dict().items()}


def factors(weight, seed):
    down = numbers(RANK, *weight.shape[1:], seed=seed)
    return down, numbers(weight.shape[0], RANK, *[1] * (weight.ndim - 2), seed=seed + 1)


def sgm(name):
    return unet_key(f"{name}.weight").removesuffix(".weight")


LAYOUTS = {
    # what a module is called, what its down, up and alpha are called; None: no alpha
    "diffusers": (lambda n: f"unet.{n}", ".lora_A.weight", ".lora_B.weight", None),
    "diffusers with alpha": (lambda n: f"unet.{n}", ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "diffusers lora.down": (lambda n: f"unet.{n}", ".lora.down.weight", ".lora.up.weight", None),
    "lora_linear_layer": (
        lambda n: f"unet.{n}",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        ".alpha",
    ),
    "no prefix": (lambda n: n, ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "peft": (lambda n: f"base_model.model.{n}", ".lora_A.weight", ".lora_B.weight", None),
    "peft with the adapter's name": (
        lambda n: f"base_model.model.unet.{n}",
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        None,
    ),
    "kohya, diffusers' numbers": (
        lambda n: f"lora_unet_{n.replace('.', '_')}",
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    ),
    "kohya, sgm's numbers": (
        lambda n: f"lora_unet_{sgm(n).replace('.', '_')}",
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    ),
    "kohya with dots": (
        lambda n: f"lora_unet.{sgm(n)}",
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    ),
    "lycoris": (
        lambda n: f"lycoris_{n.replace('.', '_')}",
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    ),
    "ComfyUI": (lambda n: f"diffusion_model.{sgm(n)}", ".lora_A.weight", ".lora_B.weight", None),
    "checkpoint's names": (
        lambda n: f"model.diffusion_model.{sgm(n)}",
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    ),
    "old processors": (
        lambda n: (
            "unet."
            + n.replace("attn1.", "attn1.processor.")
            .replace("attn2.", "attn2.processor.")
            .replace("to_out.0", "to_out")
        ),
        "_lora.down.weight",
        "_lora.up.weight",
        None,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reaches_every_type_of_module(tmp_path, models, layout, dtype):
    name_of, down_name, up_name, alpha_name = LAYOUTS[layout]
    modules = MODULES[:2] if layout == "old processors" else MODULES
    state, products = {}, {}
    for seed, module in enumerate(modules):
        weight = models["unet"].get_submodule(module).weight
        down, up = (factor.to(dtype) for factor in factors(weight, seed))
        state |= {name_of(module) + down_name: down, name_of(module) + up_name: up}
        if alpha_name:
            state[name_of(module) + alpha_name] = torch.tensor(1.5)
        product = np.einsum("or...,rp->op", *(f.flatten(1).double().numpy() for f in (up, down)))
        products[module] = product.reshape(weight.shape) * (1.5 / RANK if alpha_name else 1)
    plan = plan_lora(request(write(tmp_path / "x.safetensors", state), 0.7), models)
    before, after = fused(plan)
    for module, product in products.items():
        expected = before[f"{module}.weight"] + 0.7 * product
        np.testing.assert_allclose(after[f"{module}.weight"], expected, atol=1e-6)
    others = {name for name in before if name.removesuffix(".weight") not in products}
    assert all(np.array_equal(before[name], after[name]) for name in others)
    part = plan.record().components["unet"]
    assert (part.modules, part.alphas) == (len(modules), len(modules) * bool(alpha_name))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("input_blocks_5_0_emb_layers_1", "down_blocks.1.resnets.1.time_emb_proj"),
        ("input_blocks_8_1_proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        ("output_blocks_2_1_proj_in", "up_blocks.0.attentions.2.proj_in"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_8_0_out_layers_3", "up_blocks.2.resnets.2.conv2"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("out_2", "conv_out"),
    ],
)
def test_sgms_numbers_are_those_of_sdxls_published_files(tmp_path, theirs, ours):
    """SDXL has two layers a block, the tiny model one."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET | {"layers_per_block": 2})
    down, up = factors(unet.get_submodule(ours).weight, 0)
    stem = f"lora_unet_{theirs}"
    path = tmp_path / "x.safetensors"
    write(path, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    assert plan_lora(request(path), {"unet": unet}).updates["unet"].keys() == {ours}


@pytest.mark.parametrize(
    ("component", "prefix"),
    [
        ("text_encoder", "lora_te1_text_model_"),
        ("text_encoder", "lora_te_text_model_"),
        ("text_encoder_2", "lora_te2_text_model_"),
        ("text_encoder", "text_encoder.text_model."),
        ("text_encoder_2", "text_encoder_2.text_model."),
        ("text_encoder_2", "text_encoders.clip_g.transformer.text_model."),
        ("text_encoder", "conditioner.embedders.0.transformer.text_model."),
        ("text_encoder_2", "base_model.model.text_model."),  # its width tells which
        ("text_encoder", "base_model.model.text_model."),
        ("text_encoder", "text_encoder."),
    ],
)
def test_text_encoders_are_reached_by_every_prefix(tmp_path, models, component, prefix):
    module = next(n for n, _ in models[component].named_modules() if n.endswith(TEXT))
    weight = models[component].get_submodule(module).weight
    inner = TEXT.replace(".", "_") if prefix.startswith("lora_te") else TEXT
    down, up = factors(weight, 0)
    state = {f"{prefix}{inner}.lora_down.weight": down, f"{prefix}{inner}.lora_up.weight": up}
    plan = plan_lora(request(write(tmp_path / "x.safetensors", state)), models)
    assert {c: list(u) for c, u in plan.updates.items()} == {component: [module]}


def kron(left, right):
    """The Kronecker product of a matrix with each kernel of a convolution, by its definition."""
    (a, b), (c, d, *kernel) = left.shape, right.shape
    out = np.empty((a * c, b * d, *kernel))
    for row, column in np.ndindex(a, b):
        block = left[row, column] * right
        out[row * c : (row + 1) * c, column * d : (column + 1) * d] = block
    return out


def tucker(core, left, right):
    """Σ core[m, n, x, y] left[m, i] right[n, j]."""
    return np.tensordot(left, np.tensordot(right, core, (0, 1)), (0, 1)).swapaxes(0, 0)


CONV = "up_blocks.2.resnets.1.conv2"  # 8x8x3x3
SQUARE = LINEAR  # 16x16
FORMULAS = {
    "convolution with a core": (
        CONV,
        {
            "lora_up.weight": (8, 2, 1, 1),
            "lora_mid.weight": (2, 2, 3, 3),
            "lora_down.weight": (2, 8, 1, 1),
        },
        lambda p: np.einsum(
            "om,mnxy,ni->oixy",
            p["lora_up.weight"][..., 0, 0],
            p["lora_mid.weight"],
            p["lora_down.weight"][..., 0, 0],
        ),
        2,
    ),
    "LoHa": (
        SQUARE,
        {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)},
        lambda p: (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]),
        2,
    ),
    "LoHa of a convolution": (
        CONV,
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 72), "hada_w2_a": (8, 2), "hada_w2_b": (2, 72)},
        lambda p: ((p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])).reshape(
            8, 8, 3, 3
        ),
        2,
    ),
    "LoHa with cores": (
        CONV,
        {
            "hada_t1": (2, 2, 3, 3),
            "hada_w1_a": (2, 8),
            "hada_w1_b": (2, 8),
            "hada_t2": (2, 2, 3, 3),
            "hada_w2_a": (2, 8),
            "hada_w2_b": (2, 8),
        },
        lambda p: (
            np.einsum("mnxy,mi,nj->ijxy", p["hada_t1"], p["hada_w1_a"], p["hada_w1_b"])
            * np.einsum("mnxy,mi,nj->ijxy", p["hada_t2"], p["hada_w2_a"], p["hada_w2_b"])
        ),
        2,
    ),
    "LoKr of whole factors": (  # alpha means nothing without a rank
        SQUARE,
        {"lokr_w1": (2, 4), "lokr_w2": (8, 4)},
        lambda p: kron(p["lokr_w1"], p["lokr_w2"]),
        None,
    ),
    "LoKr of products": (
        SQUARE,
        {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 8)},
        lambda p: kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"]),
        2,
    ),
    "LoKr of a convolution": (
        CONV,
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 36)},
        lambda p: kron(p["lokr_w1"], (p["lokr_w2_a"] @ p["lokr_w2_b"]).reshape(4, 4, 3, 3)),
        2,
    ),
    "LoKr of a convolution, whole": (
        CONV,
        {"lokr_w1": (4, 2), "lokr_w2": (2, 4, 3, 3)},
        lambda p: kron(p["lokr_w1"], p["lokr_w2"]),
        None,
    ),
    "LoKr with a core": (
        CONV,
        {"lokr_w1": (2, 2), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 4)},
        lambda p: kron(
            p["lokr_w1"],
            np.einsum("mnxy,mi,nj->ijxy", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"]),
        ),
        2,
    ),
}


def parts_of(shapes):
    return {part: numbers(*shape, seed=seed) for seed, (part, shape) in enumerate(shapes.items())}


def in_float64(parts):
    return {part: tensor.double().numpy() for part, tensor in parts.items()}


@pytest.mark.parametrize("formula", FORMULAS)
def test_products_are_those_of_their_papers(tmp_path, models, formula):
    module, shapes, product, rank = FORMULAS[formula]
    parts = parts_of(shapes)
    stem = f"lora_unet_{sgm(module).replace('.', '_')}"
    state = {f"{stem}.{part}": tensor for part, tensor in parts.items()}
    state[f"{stem}.alpha"] = torch.tensor(3.0)
    plan = plan_lora(request(write(tmp_path / "x.safetensors", state), 0.6), models)
    before, after = fused(plan)
    delta = product(in_float64(parts)) * (1 if rank is None else 3 / rank)
    expected = before[f"{module}.weight"] + 0.6 * delta
    np.testing.assert_allclose(after[f"{module}.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize(
    ("name", "axis", "shape"),
    [
        ("dora_scale", 0, lambda w: (w.shape[0], *[1] * (w.ndim - 1))),
        ("dora_scale", 1, lambda w: (1, w.shape[1], *[1] * (w.ndim - 2))),
        ("lora_magnitude_vector.weight", 0, lambda w: (w.shape[0],)),
    ],
    ids=["rows", "columns", "PEFT's"],
)
@pytest.mark.parametrize("module", [f"{BLOCK}.attn2.to_k", "up_blocks.2.resnets.0.conv1"])
def test_dora_gives_rows_or_columns_their_lengths(
    tmp_path, models, kind, name, axis, shape, module
):
    """W + scale (m V / ‖V‖ - W), V = W + alpha / rank P."""
    weight = models["unet"].get_submodule(module).weight
    rows, columns = weight.shape[0], weight[0].numel()
    if kind == "lora":
        down, up = factors(weight, 4)
        parts = {"lora_down.weight": down, "lora_up.weight": up}
        product = up.flatten(1).double().numpy() @ down.flatten(1).double().numpy()
    else:
        shapes = [
            (f"hada_w{n}_{p}", s)
            for n in "12"
            for p, s in zip("ab", ((rows, RANK), (RANK, columns)), strict=True)
        ]
        parts = parts_of(dict(shapes))
        p = in_float64(parts)
        product = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    magnitude = numbers(*shape(weight), seed=9).abs() + 0.5
    state = {f"unet.{module}.{part}": tensor for part, tensor in parts.items()}
    state |= {f"unet.{module}.{name}": magnitude, f"unet.{module}.alpha": torch.tensor(2.0)}
    plan = plan_lora(request(write(tmp_path / "x.safetensors", state), 0.6), models)
    before, after = fused(plan)
    old = before[f"{module}.weight"]
    whole = old + 2 / RANK * product.reshape(old.shape)
    others = tuple(d for d in range(old.ndim) if d != axis)
    norm = np.sqrt((whole**2).sum(axis=others, keepdims=True))
    new = magnitude.double().numpy().reshape(norm.shape) * whole / norm
    np.testing.assert_allclose(after[f"{module}.weight"], old + 0.6 * (new - old), atol=1e-6)
    assert plan.record().components["unet"].kinds == {"dora" if kind == "lora" else "dora-loha": 1}


def test_differences_of_weights_biases_and_norms_are_added(tmp_path, models):
    state = {
        "diffusion_model.input_blocks.0.0.diff": numbers(8, 4, 3, 3),
        "diffusion_model.input_blocks.0.0.diff_b": numbers(8, seed=1),
        "lora_unet_mid_block_attentions_0_norm.w_norm": numbers(16, seed=2),
        "lora_unet_mid_block_attentions_0_norm.b_norm": numbers(16, seed=3),
    }
    plan = plan_lora(request(write(tmp_path / "x.safetensors", state), 0.5), models)
    before, after = fused(plan)
    for name, difference in zip(
        (
            "conv_in.weight",
            "conv_in.bias",
            "mid_block.attentions.0.norm.weight",
            "mid_block.attentions.0.norm.bias",
        ),
        state.values(),
        strict=True,
    ):
        expected = before[name] + 0.5 * difference.double().numpy()
        np.testing.assert_allclose(after[name], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "DoRA", "LoHa", "LoKr", "LoKr whole"])
def test_peft_merges_its_own_folders_to_the_same_weights(tmp_path, models, kind):
    """PEFT writes the file and adapter_config.json, with patterns of rank and alpha, and merges."""
    peft = pytest.importorskip("peft")
    targets = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", "up_blocks.2.resnets.0.conv1"]
    patterns = {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 7}}
    if kind in ("LoHa", "LoKr", "LoKr whole"):
        config = peft.LoHaConfig if kind == "LoHa" else peft.LoKrConfig
        r = 40 if kind == "LoKr whole" else RANK
        patterns = {} if kind == "LoKr whole" else patterns
        settings = config(r=r, alpha=5, target_modules=targets, **patterns)
    else:
        settings = peft.LoraConfig(
            r=RANK,
            lora_alpha=5,
            target_modules=targets,
            use_rslora=kind == "rsLoRA",
            use_dora=kind == "DoRA",
            **patterns,
        )
    wrapped = peft.get_peft_model(tiny_unet(), settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    before, after = fused(plan_lora(request(tmp_path), models))
    theirs = wrapped.merge_and_unload().state_dict()
    for name, weight in theirs.items():
        np.testing.assert_allclose(after[name], weight.double().numpy(), atol=2e-6, err_msg=name)
    assert all(np.abs(after[f"{m}.weight"] - before[f"{m}.weight"]).max() > 1e-3 for m in targets)


def test_diffusers_fuses_a_file_of_kohyas_layout_to_the_same_weights(tmp_path, models):
    diffusers = pytest.importorskip("diffusers")
    state = {}
    for seed, module in enumerate(MODULES[:8]):
        stem = f"lora_unet_{sgm(module).replace('.', '_')}"
        down, up = factors(models["unet"].get_submodule(module).weight, seed)
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        state[f"{stem}.alpha"] = torch.tensor(2.0)
    write(tmp_path / "x.safetensors", state)
    theirs = tiny_unet()
    pipeline = diffusers.StableDiffusionXLPipeline
    loaded = pipeline.lora_state_dict(
        str(tmp_path), weight_name="x.safetensors", unet_config=theirs.config
    )
    pipeline.load_lora_into_unet(loaded[0], loaded[1], theirs)
    theirs.fuse_lora(lora_scale=0.8)
    theirs.unload_lora()
    _, after = fused(plan_lora(request(tmp_path / "x.safetensors", 0.8), models))
    for name, weight in theirs.state_dict().items():
        np.testing.assert_allclose(after[name], weight.double().numpy(), atol=1e-6, err_msg=name)


def lora_of(module, **more):
    shape = {"rows": 16, "columns": 16, **more}
    return {
        f"unet.{module}.lora_A.weight": numbers(2, shape["columns"]),
        f"unet.{module}.lora_B.weight": numbers(shape["rows"], 2, seed=1),
    }


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"ss_network_alpha": "1.0", "ss_network_dim": "2"}, 0.5),
        ({"ss_network_alpha": "None"}, 1.0),
        ({"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}, 3.0),
        ({}, 1.0),
    ],
)
def test_alpha_is_the_metadatas_where_the_file_has_none(tmp_path, models, metadata, factor):
    path = write(tmp_path / "x.safetensors", lora_of(LINEAR), metadata)
    plan = plan_lora(request(path), models)
    assert plan.updates["unet"][LINEAR].factor == factor


def test_changes_add_up_in_any_order(tmp_path, models):
    plain = plan_lora(request(write(tmp_path / "a.safetensors", lora_of(LINEAR)), 0.5), models)
    state = lora_of(LINEAR) | {f"unet.{LINEAR}.dora_scale": numbers(16, 1).abs() + 1}
    dora = plan_lora(request(write(tmp_path / "b.safetensors", state), 0.7), models)
    before, one = fused([plain, dora])
    _, other = fused([dora, plain])
    name = f"{LINEAR}.weight"
    np.testing.assert_allclose(one[name], other[name], atol=1e-6)
    changes = [fused(plan)[1][name] - before[name] for plan in (plain, dora)]
    np.testing.assert_allclose(one[name], before[name] + sum(changes), atol=1e-6)


def test_half_precision_weights_are_fused_in_float32_and_rounded_once(tmp_path, models):
    state = lora_of(LINEAR)
    plan = plan_lora(request(write(tmp_path / "x.safetensors", state)), models)
    before, after = fused([plan, plan], model=tiny_unet().half())
    down, up = (tensor.double().numpy() for tensor in state.values())
    expected = (before[f"{LINEAR}.weight"] + 2 * up @ down).astype(np.float32).astype(np.float16)
    np.testing.assert_allclose(after[f"{LINEAR}.weight"], expected, rtol=1e-3, atol=1e-7)
    huge = {name: tensor * 1e4 for name, tensor in state.items()}
    plan = plan_lora(request(write(tmp_path / "x.safetensors", huge)), models)
    with pytest.raises(
        WeightsError, match=r"x.safetensors fused, .*to_q of the unet leaves the range"
    ):
        fused(plan, model=tiny_unet().half())


def flux():
    stem = "transformer.single_transformer_blocks.0.attn.to_q"
    return {f"{stem}.lora_A.weight": numbers(2, 96), f"{stem}.lora_B.weight": numbers(96, 2)}


def sd15():
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{stem}.lora_down.weight": numbers(4, 768), f"{stem}.lora_up.weight": numbers(1280, 4)}


REFUSED = {
    "a LoRA of Flux": (flux, "is a LoRA of Flux: 2 of its 2 tensors"),
    "a LoRA of SD 1.5": (
        sd15,
        r"is a LoRA of SD 1.5: its shapes do not fit this checkpoint: 4x768 and 1280x4 for "
        r"mid_block.*to_k of the unet, which is 16x40",
    ),
    "an embedding": (
        lambda: {"emb_params": numbers(4, 96)},
        "is a textual inversion embedding, not a LoRA",
    ),
    "an embedding of SDXL": (
        lambda: {"clip_l": numbers(2, 16), "clip_g": numbers(2, 24)},
        "is a textual inversion embedding, not a LoRA",
    ),
    "an adapter with a LoRA in it": (
        lambda: {
            "image_proj.proj.weight": numbers(4, 4),
            "ip_adapter.0.to_q_lora.down.weight": numbers(4, 4),
        },
        "is an IP-Adapter, not a LoRA",
    ),
    "a UNet": (lambda: tiny_unet().state_dict(), "is a UNet for text of width 40, not a LoRA"),
    "a module that is not there": (
        lambda: lora_of(LINEAR) | lora_of("down_blocks.9.attentions.0.proj_in"),
        r"2 of its 4 tensors cannot be applied to this checkpoint \(unet.down_blocks.9",
    ),
    "a tensor of no kind": (
        lambda: lora_of(LINEAR) | {"bundle_emb.trigger.clip_l": numbers(2, 16)},
        r"1 of its 3 tensors cannot be applied to this checkpoint \(bundle_emb.trigger.clip_l\)",
    ),
    "half of a product": (
        lambda: dict(list(lora_of(LINEAR).items())[:1]),
        "1 of its 1 tensors cannot be applied",
    ),
    "an alpha alone": (
        lambda: lora_of(LINEAR) | {"unet.conv_in.alpha": torch.tensor(2.0)},
        r"1 of its 3 tensors .*\(unet.conv_in.alpha\)",
    ),
    "a core without its factors": (
        lambda: {f"unet.{LINEAR}.lokr_{part}": numbers(4, 4) for part in ("w1", "w2", "t2")},
        "3 of its 3 tensors cannot be applied",
    ),
    "one module twice": (
        lambda: (
            lora_of(LINEAR)
            | {f"lora_unet_{sgm(LINEAR).replace('.', '_')}.lora_down.weight": numbers(2, 16)}
        ),
        "1 of its 3 tensors cannot be applied",
    ),
    "two adapters in one file": (
        lambda: {
            f"base_model.model.{LINEAR}.lora_{side}.{name}.weight": numbers(16, 16)
            for side in "AB"
            for name in ("one", "two")
        },
        "2 of its 4 tensors cannot be applied",
    ),
    "an OFT": (
        lambda: {f"unet.{LINEAR}.oft_blocks": numbers(4, 4, 4)},
        "is an OFT file of .*: 1 of its 1 tensors",
    ),
    "a GLoRA": (
        lambda: {
            f"unet.{LINEAR}.{part}.weight": numbers(4, 4) for part in ("a1", "a2", "b1", "b2")
        },
        "is a GLoRA of .*: 4 of its 4 tensors",
    ),
    "another width": (
        lambda: lora_of(LINEAR, columns=24),
        r"2x24 and 16x2 for mid_block.*to_q of the unet, which is 16x16",
    ),
    "ranks that differ": (
        lambda: lora_of(LINEAR) | {f"unet.{LINEAR}.lora_B.weight": numbers(16, 3)},
        "its shapes do not fit this checkpoint: 2x16 and 16x3",
    ),
    "a rank of nothing": (
        lambda: (
            {f"unet.{LINEAR}.lora_A.weight": numbers(0, 16)}
            | {f"unet.{LINEAR}.lora_B.weight": numbers(16, 0)}
        ),
        "its shapes do not fit",
    ),
    "two magnitudes of one layer": (
        lambda: (
            lora_of(LINEAR)
            | {f"unet.{LINEAR}.dora_scale": numbers(16, 1)}
            | {f"unet.{LINEAR}.lora_magnitude_vector.weight": numbers(16)}
        ),
        "4 of its 4 tensors cannot be applied",
    ),
    "a LoHa that would broadcast": (
        lambda: {
            f"unet.{LINEAR}.hada_{part}": numbers(*shape)
            for part, shape in (
                ("w1_a", (16, 2)),
                ("w1_b", (2, 16)),
                ("w2_a", (1, 2)),
                ("w2_b", (2, 16)),
            )
        },
        "its shapes do not fit",
    ),
    "a magnitude for another layer": (
        lambda: lora_of(LINEAR) | {f"unet.{LINEAR}.dora_scale": numbers(5, 1)},
        "its shapes do not fit",
    ),
    "numbers that are none": (
        lambda: {n: t / 0 for n, t in lora_of(LINEAR).items()},
        "holds numbers that are not finite: unet.mid_block",
    ),
    "a LoRA of SSD-1B": (
        lambda: (
            lora_of("down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q")
            | lora_of("up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
            | lora_of("up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", columns=2048)
        ),
        r"is a LoRA of a reduced SDXL \(SSD-1B, Vega or KOALA\): its layers are not those",
    ),
    "an alpha that is no number": (
        lambda: lora_of(LINEAR) | {f"unet.{LINEAR}.alpha": torch.tensor(float("nan"))},
        r"its alpha \(unet.mid_block.*to_q.alpha\) is not finite",
    ),
    "integers": (
        lambda: {n: t.to(torch.int8) for n, t in lora_of(LINEAR).items()},
        "numbers of type I8",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_what_it_is(tmp_path, models, what):
    make, words = REFUSED[what]
    path = write(tmp_path / "mine.safetensors", make())
    with pytest.raises(WeightsError, match=f"mine.safetensors.*{words}") as error:
        plan_lora(request(path), models)
    assert "\n" not in str(error.value)
    assert error.value.hint


def test_text_encoders_of_another_model_are_refused_by_their_metadata(tmp_path, models):
    stem, width = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", 16
    state = {
        f"{stem}.lora_down.weight": numbers(2, width),
        f"{stem}.lora_up.weight": numbers(16, 2),
    }
    path = tmp_path / "x.safetensors"
    assert plan_lora(request(write(path, state)), models).updates.keys() == {"text_encoder"}
    write(path, state, {"ss_base_model_version": "sd_v1"})
    with pytest.raises(WeightsError, match=r"a LoRA of SD 1.5: it was trained for that model"):
        plan_lora(request(path), models)


def test_a_name_of_both_text_encoders_is_refused(tmp_path, models):
    stem = "text_model.encoder.layers.0.self_attn.q_proj"
    width = models["text_encoder"].get_submodule("encoder.layers.0.self_attn.q_proj").in_features
    same = models | {"text_encoder_2": models["text_encoder"]}
    state = {f"{stem}.lora_A.weight": numbers(2, width), f"{stem}.lora_B.weight": numbers(width, 2)}
    with pytest.raises(WeightsError, match="does not say which text encoder"):
        plan_lora(request(write(tmp_path / "x.safetensors", state)), same)


def test_a_folder_with_several_files_is_asked_for_one(tmp_path, models):
    write(tmp_path / "a.safetensors", lora_of(LINEAR))
    assert plan_lora(request(tmp_path), models).file.path.name == "a.safetensors"
    write(tmp_path / "b.safetensors", lora_of(LINEAR))
    with pytest.raises(WeightsError, match="has 2 files of weights"):
        plan_lora(request(tmp_path), models)
    write(tmp_path / "pytorch_lora_weights.safetensors", lora_of(LINEAR))
    assert plan_lora(request(tmp_path), models).file.path.stem == "pytorch_lora_weights"


@pytest.fixture
def style(tmp_path, tiny):
    """A kohya file for the UNet and both text encoders of the tiny checkpoint."""
    folder = HubItem(str(tiny / "checkpoint"))
    source = CheckpointSource(folder, torch.float32, folder)
    state = {}
    for prefix, component in (("te1", "text_encoder"), ("te2", "text_encoder_2")):
        model = source.skeleton(component)
        module = next(n for n, _ in model.named_modules() if n.endswith("layers.0.mlp.fc1"))
        down, up = factors(model.get_submodule(module).weight, 5)
        stem = f"lora_{prefix}_text_model_encoder_layers_0_mlp_fc1"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        state[f"{stem}.alpha"] = torch.tensor(float(RANK))
    down, up = factors(tiny_unet().get_submodule(LINEAR).weight, 7)
    stem = f"lora_unet_{sgm(LINEAR).replace('.', '_')}"
    state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    return write(tmp_path / "style.safetensors", state), state


def test_an_export_gets_several_files_in_all_components(tiny_entry, style, tmp_path):
    """And its manifest says what of each went where, with its scale and hash."""
    path, state = style
    other = write(tmp_path / "fast.safetensors", lora_of(LINEAR))
    options = ExportOptions(
        tiny_entry,
        loras=(LoraFile(HubItem(str(path)), 0.5),),
        distillation_lora=HubItem(str(other)),
        distillation_lora_scale=0.25,
    )
    plain, weights = CheckpointWeights(ExportOptions(tiny_entry)), CheckpointWeights(options)
    for prefix, component in (("te1", "text_encoder"), ("te2", "text_encoder_2")):
        before, after = plain.text_encoder(component), weights.text_encoder(component)
        stem = f"lora_{prefix}_text_model_encoder_layers_0_mlp_fc1"
        product = state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]
        changed = {
            name: new - old
            for (name, old), new in zip(
                before.state_dict().items(), after.state_dict().values(), strict=True
            )
            if not torch.equal(old, new)
        }
        (change,) = changed.values()
        torch.testing.assert_close(change, 0.5 * product, atol=1e-6, rtol=0)
    stem = f"lora_unet_{sgm(LINEAR).replace('.', '_')}"
    product = 0.5 * state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]
    down, up = lora_of(LINEAR).values()
    change = weights.unet().get_submodule(LINEAR).weight - plain.unet().get_submodule(LINEAR).weight
    torch.testing.assert_close(change, product + 0.25 * up @ down, atol=1e-6, rtol=0)
    distillation, own, faceid = weights.loras
    assert (distillation.role, distillation.scale, distillation.tensors) == (
        "distillation",
        0.25,
        2,
    )
    assert (own.role, own.file, own.scale, own.tensors) == ("style", "style.safetensors", 0.5, 8)
    assert {c: (p.modules, p.alphas, p.kinds) for c, p in own.components.items()} == {
        "unet": (1, 0, {"lora": 1}),
        "text_encoder": (1, 1, {"lora": 1}),
        "text_encoder_2": (1, 1, {"lora": 1}),
    }
    assert own.sha256 == next(s.sha256 for s in weights.sources if s.role == "lora")
    assert (faceid.role, faceid.components["unet"].modules) == ("faceid", 56)  # 7 blocks x 2 x 4


def test_a_wrong_file_stops_before_anything_is_loaded(tiny_entry, tmp_path):
    path = write(tmp_path / "flux.safetensors", flux())
    with pytest.raises(WeightsError, match="a LoRA of Flux"):
        CheckpointWeights(ExportOptions(tiny_entry, loras=(LoraFile(HubItem(str(path))),)))


def test_engines_of_a_text_encoder_take_another_lora(tiny_entry, style, tmp_path):
    from fastface_trt.engines.cache import EngineCache
    from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
    from fastface_trt.engines.refit import refit
    from fastface_trt.export.modules import text_encoder_export
    from fastface_trt.export.onnx_writer import write_module
    from fastface_trt.export.probe import write_probe

    def export(folder, loras=()):
        weights = CheckpointWeights(ExportOptions(tiny_entry, loras=loras))
        made = text_encoder_export("text_encoder", weights.text_encoder("text_encoder"))
        spec = write_module(made, folder)
        return spec.model_copy(update={"probe": write_probe(made, folder, "fp32")}), folder

    builder, cache = OnnxRuntimeBuilder(threads=1), EngineCache(tmp_path / "cache")
    cache.get(*export(tmp_path / "plain"), builder)
    report = refit(cache, *export(tmp_path / "style", (LoraFile(HubItem(str(style[0]))),)), builder)
    assert len(report.changed) == 1
    assert max(report.probe_errors.values()) < 1e-4


def test_a_file_may_have_its_scale_behind_it(tmp_path):
    assert parse_scaled_item("a.safetensors=0.5") == (HubItem("a.safetensors"), 0.5)
    assert parse_scaled_item("me/repo/x.safetensors=-1") == (
        HubItem("me/repo", None, "x.safetensors"),
        -1.0,
    )
    assert parse_scaled_item("me/repo") == (HubItem("me/repo"), 1.0)
    odd = write(tmp_path / "a=1", lora_of(LINEAR))
    assert parse_scaled_item(str(odd)) == (HubItem(str(odd)), 1.0)
    assert parse_scaled_item(f"{odd}=2") == (HubItem(str(odd)), 2.0)
    with pytest.raises(InvalidRequest, match="is nan"):
        LoraFile(HubItem("a"), float("nan"))


def test_the_command_says_one_sentence_and_leaves_nothing(tmp_path):
    write(tmp_path / "flux.safetensors", flux())
    out = tmp_path / "out"
    for option in ("--lora", "--distillation-lora"):
        command = ["export", "--checkpoint", "mini", option, str(tmp_path / "flux.safetensors")]
        result = CliRunner().invoke(cli, [*command, str(out)])
        assert result.exit_code == USER_ERROR
        words = " ".join(result.stderr.split())
        assert "flux.safetensors is a LoRA of Flux: 2 of its 2 tensors" in words
        assert f"{option} takes LoRA, DoRA, LoHa and LoKr files that were made for" in words
        assert [path.name for path in tmp_path.iterdir()] == ["flux.safetensors"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distillation_lora_scale": 0.5}, "no distillation LoRA to scale"),
        ({"faceid_lora_scale": float("inf")}, "not finite"),
        ({"random_weights": True, "loras": (LoraFile(HubItem("a")),)}, "takes no weights"),
    ],
)
def test_options_that_no_lora_answers_to_are_refused(tiny_entry, options, words):
    with pytest.raises(InvalidRequest, match=words):
        ExportOptions(tiny_entry, **options)


def test_inspect_shows_what_of_a_file_went_where(tmp_path):
    manifest = json.loads((folders.EXPORT / "manifest.json").read_text())
    part = {"modules": 3, "alphas": 2, "kinds": {"lora": 1, "dora-loha": 2}}
    manifest["loras"] = [
        {"role": "style", "scale": 0.5, "file": "mine.safetensors", "components": {"unet": part}}
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shown = " ".join(CliRunner().invoke(cli, ["inspect", str(tmp_path)]).output.split())
    for words in ("style", "0.5", "mine.safetensors", "unet: 3", "1 lora", "2 dora-loha", "alphas"):
        assert words in shown


def test_manifests_of_before_are_read():
    assert LoraFused.model_validate({"role": "faceid", "scale": 0.5}).components == {}
