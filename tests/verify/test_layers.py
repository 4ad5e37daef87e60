"""A backend that is wrong at a known place: the search must name exactly that place."""

import pytest

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.errors import EngineFailed, InvalidRequest
from fastface_trt.verify.inputs import module_inputs
from fastface_trt.verify.layers import Float64Verdict, find_layer
from fastface_trt.verify.marked_outputs import MarkableModule
from fastface_trt.verify.modules import run_reference, verify_modules
from tests.engines.tiny_models import write_module
from tests.verify.wrong_backend import WrongBuilder, replaced, scaled, vanishing


@pytest.fixture
def search(tiny_export, tmp_path):
    """Verify a module of the tiny export on a spoiled backend and look inside."""
    folder, manifest = tiny_export

    def run(name, spoil, **options):
        builder = WrongBuilder(spoil)
        cache = EngineCache(tmp_path / "cache")
        (verdict,) = verify_modules(
            folder, manifest, builder, cache, modules=[name], threads=1, progress=lambda line: None
        )
        return verdict, find_layer(folder, manifest, verdict, builder, threads=1, **options)

    return run


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("module", ["vae_decoder", "text_encoder_2"])
def test_names_exactly_the_tensor_that_was_spoiled(tiny_export, search, module, part):
    folder, manifest = tiny_export
    marked = MarkableModule(manifest.modules[module], folder)
    # What the first output depends on, so that the fault can be seen there.
    first = manifest.modules[module].outputs[0].name
    order = [n for n in marked.names if n == first or n in marked.ancestors(first)]
    wrong = order[round(part * (len(order) - 1))]
    verdict, report = search(module, scaled(wrong))
    assert not verdict.agrees
    assert report.tensor == wrong
    assert report.builds <= 4
    assert report.float64.nearer == "reference"
    assert report.float64.backend == pytest.approx(0.05, rel=1e-3)
    assert report.float64.reference < 1e-5
    assert "wrong in" in report.suggestion
    for one in report.producers.values():
        assert not one.exceeds(report.tolerance)


def test_inside_a_call_of_decoupled_attention(search):
    """Every norm is wrong, and only the deviations of attention manipulation take one."""
    _, report = search("unet", replaced("ReduceL2", "ReduceL1"), marks=64)
    assert report.inside == "DecoupledAttention"
    assert report.op == "ReduceL2"
    assert report.scope.startswith("unet.down_blocks.1.attentions.0")
    assert report.scope.endswith("attn2")
    assert report.float64.nearer == "reference"


def test_a_difference_that_disappears_is_blamed_on_fusion(tiny_export, search):
    folder, manifest = tiny_export
    marked = MarkableModule(manifest.modules["vae_decoder"], folder)
    above = [name for name in marked.names if name in marked.ancestors("picture")]
    middle = above[len(above) // 2]  # what one mark per build asks for first
    _, report = search("vae_decoder", vanishing(middle, 1), marks=1)
    assert report.vanished == (middle,)
    assert report.tensor == "picture"
    assert "fuses across" in report.suggestion
    assert report.float64 is None


def test_no_difference_no_search(search):
    verdict, report = search("vae_decoder", lambda model: None)
    assert verdict.agrees
    assert report is None


def test_a_reference_that_cannot_run_says_so(tmp_path):
    module = write_module(tmp_path)
    path = tmp_path / module.files[0].path
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"MatSum"))
    module = module.model_copy(update={"files": (describe_file(tmp_path, path),)})
    with pytest.raises(EngineFailed, match="the reference, cannot run affine"):
        run_reference(module, tmp_path, {})


def test_inputs_fit_and_repeat(tiny_export):
    folder, manifest = tiny_export
    for module in manifest.modules.values():
        first, again, other = (
            module_inputs(module, manifest, folder, seed=seed) for seed in (3, 3, 4)
        )
        for tensor in module.inputs:
            assert first[tensor.name].dtype == tensor.dtype
            assert len(first[tensor.name].shape) == len(tensor.shape)
            assert (first[tensor.name] == again[tensor.name]).all()
        assert module.name.startswith("text") or any(
            (first[name] != other[name]).any() for name in first
        )
    kinds = module_inputs(manifest.modules["unet"], manifest, folder)["attention_manipulation"]
    assert sorted(kinds[0, :, 0]) == [0, 1, 2]
    strange = manifest.modules["unet"].inputs[0].model_copy(update={"shape": ("batch", "depth")})
    module = manifest.modules["unet"].model_copy(update={"inputs": (strange,)})
    with pytest.raises(InvalidRequest, match="a size called depth"):
        module_inputs(module, manifest, folder)


def test_nearer():
    assert Float64Verdict(1e-3, 1e-6).nearer == "reference"
    assert Float64Verdict(1e-6, 1e-3).nearer == "backend"
    assert Float64Verdict(1e-3, 1.5e-3).nearer == "neither"
