"""Forms of the full-size graphs, which hold no weights: counts, and what must not be left."""

from collections import Counter

import onnx
import pytest

from fastface_trt.bench.random_weights import read_graph
from fastface_trt.engines.contract import FUNCTION_DOMAIN, KERNEL_DOMAIN
from fastface_trt.engines.onnx.forms import cpu_form, cuda_form
from tests.engines.onnx.test_forms_cuda import nodes_of, transposes

TOKENS = 4


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A function that gives the path of a graph by its module's name."""
    folder = tmp_path_factory.mktemp("full-size")

    def unpack(name):
        path = folder / f"{name}.onnx"
        path.write_bytes(read_graph(name))
        return path

    return unpack


def test_the_unet_with_the_operator(unpacked):
    form = cuda_form(unpacked("unet"), TOKENS, "operator")
    assert form.counts == {
        "attention": 140,
        "decoupled_attention": 70,
        "group_norm": 46,
        "convolution": 51,
        "split_gelu": 70,
        "skip_layer_norm": 199,  # of 210: the first norm of each of 11 transformers has no residual
        "bias_add": 22,  # the last two linear layers of each
    }
    has = nodes_of(form)
    for gone in ("Softmax", "InstanceNormalization", "Conv", "Gelu", "Split", "If"):
        assert has[gone] == 0, gone
    assert has["LayerNormalization"] == 11
    assert transposes(form) == (1, 1)
    model = onnx.load_from_string(form.model)
    domains = Counter(node.domain for node in model.graph.node)
    assert domains[KERNEL_DOMAIN] == 70
    assert domains[FUNCTION_DOMAIN] == len(model.functions) == 0
    assert {one.domain for one in model.opset_import} == {"", "com.microsoft", KERNEL_DOMAIN}


def test_the_unet_with_branches(unpacked):
    """One If a block, which asks once per part of the UNet, and no call of the subroutine."""
    form = cuda_form(unpacked("unet"), TOKENS, "branches")
    has = nodes_of(form)
    assert has["If"] == form.counts["decoupled_attention"] == 70
    assert has["Greater"] == 3
    assert transposes(form) == (1, 1)
    assert FUNCTION_DOMAIN.encode() not in {
        one.domain.encode() for one in onnx.load_from_string(form.model).opset_import
    }


def test_the_unet_on_a_cpu(unpacked):
    form = cpu_form(unpacked("unet"), TOKENS)
    assert form.counts == {"attention": 140, "decoupled_attention": 70}
    assert nodes_of(form)["Conv"] == 51


def test_the_vae_decoder(unpacked):
    form = cuda_form(unpacked("vae_decoder"), None, "operator")
    assert (form.counts["group_norm"], form.counts["convolution"]) == (30, 36)
    assert form.counts["attention"] == nodes_of(form)["FusedMatMul"] == 1
    assert nodes_of(form)["InstanceNormalization"] == nodes_of(form)["Conv"] == 0
    assert transposes(form) == (1, 1)


def test_external_data_stays_where_it_is(unpacked):
    """A form names the same places in the same file, and reads none of it."""
    path = unpacked("unet")
    before = {one.name: one for one in onnx.load(path, load_external_data=False).graph.initializer}
    model = onnx.load_from_string(cuda_form(path, TOKENS, "operator").model)
    external = [one for one in model.graph.initializer if one.external_data]
    assert len(external) > 1500
    assert all(one == before[one.name] for one in external)
