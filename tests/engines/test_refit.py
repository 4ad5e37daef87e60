"""A → B → A: engines that take other weights, and every reason not to."""

import errno
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import FileEntry
from fastface_trt.engines.ort import weights as onnxruntime_weights
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.engines.probe import check_probe, read_probe
from fastface_trt.engines.refit import RefittingBuilder, refit
from fastface_trt.engines.tensorrt.builder import TensorRTBuilder
from fastface_trt.engines.weight_map import WEIGHT_MAP
from fastface_trt.errors import EngineMismatch, ExportIncomplete, StorageError
from tests.engines.tiny_models import write_module

BUILDER = OnnxRuntimeBuilder(threads=1)


@pytest.fixture(scope="session")
def unets(tiny_export, half_scale_export):
    """(module, folder) of the tiny UNet with its LoRA at scale 1 and at one half."""
    return tuple((one.modules["unet"], folder) for folder, one in (tiny_export, half_scale_export))


@pytest.fixture(scope="session")
def built(unets, tmp_path_factory):
    """A cache that holds the UNet at scale 1 only."""
    cache = EngineCache(tmp_path_factory.mktemp("built"))
    cache.get(*unets[0], BUILDER)
    return cache.root


@pytest.fixture
def cache(built, tmp_path):
    shutil.copytree(built, tmp_path / "cache")
    return EngineCache(tmp_path / "cache")


def outputs(cache, module, folder):
    inputs, _ = read_probe(module, folder)
    with cache.open(module, folder, BUILDER) as engine:
        return engine(**inputs)["noise_prediction"]


def snapshot(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_a_refitted_engine_is_the_built_one(unets, cache, tmp_path):
    """Bit for bit: the same graph, the same weights in the same layouts."""
    report = refit(cache, *unets[1], BUILDER)
    assert report.key == cache.key(unets[1][0], BUILDER)
    assert report.base == cache.key(unets[0][0], BUILDER)
    assert cache.verify(report.key).report.refitted_from == report.base
    fresh = EngineCache(tmp_path / "fresh")
    fresh.get(*unets[1], BUILDER)
    half = outputs(cache, *unets[1])
    np.testing.assert_array_equal(half, outputs(fresh, *unets[1]))
    assert not np.array_equal(half, outputs(cache, *unets[0]))


def other_checkpoint(module, folder, target):
    """The module with every weight of it replaced by another value of its size."""
    model = onnx.load(folder / module.files[0].path)
    values = np.random.default_rng(5)
    changed = set()
    for tensor in model.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.dtype == np.float32 and weight.size > 4:
            noise = values.standard_normal(weight.shape).astype(np.float32) * 0.1
            changed.add(tensor.name)
            tensor.CopyFrom(numpy_helper.from_array(weight * 0.9 + noise, tensor.name))
    path = target / module.files[0].path
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    files = (describe_file(target, path),)
    return module.model_copy(update={"files": files, "probe": None}), changed


def test_another_checkpoint_of_the_same_shape(unets, cache, tmp_path):
    """Norms that were all ones are told apart, and convolutions get their blocked layout."""
    module, folder = unets[0]
    other, changed = other_checkpoint(module, folder, tmp_path / "other")
    assert len(changed) > 200
    report = refit(cache, other, tmp_path / "other", BUILDER)
    assert set(report.changed) == changed
    fresh = EngineCache(tmp_path / "fresh")
    inputs, _ = read_probe(module, folder)
    with (
        cache.open(other, tmp_path / "other", BUILDER) as refitted,
        fresh.open(other, tmp_path / "other", BUILDER) as built,
    ):
        expected = built(**inputs)["noise_prediction"]
        np.testing.assert_array_equal(refitted(**inputs)["noise_prediction"], expected)


def test_there_and_back_again_changes_nothing(unets, cache):
    """Five rounds, each from the engine that the last one made: not a byte is left behind."""
    keys = [cache.key(module, BUILDER) for module, _ in unets]
    first = {k: v for k, v in snapshot(cache.root / keys[0]).items() if k.name != "engine.json"}
    whole = outputs(cache, *unets[0])
    half = None
    for _ in range(5):
        assert refit(cache, *unets[1], BUILDER).base == keys[0]
        half_now = outputs(cache, *unets[1])
        half = half_now if half is None else half
        np.testing.assert_array_equal(half_now, half)
        cache.remove(keys[0])
        assert refit(cache, *unets[0], BUILDER).base == keys[1]
        cache.remove(keys[1])
        again = {k: v for k, v in snapshot(cache.root / keys[0]).items() if k.name != "engine.json"}
        assert again == first
        np.testing.assert_array_equal(outputs(cache, *unets[0]), whole)


def test_only_what_differs_is_reported_and_the_base_stays(unets, cache):
    before = snapshot(cache.root)
    lines = []
    report = refit(cache, *unets[1], BUILDER, lines.append)
    # 7 blocks of 2 attentions with q, k, v, out in the adapter's LoRA.
    assert len(report.changed) == 56
    assert 0 < report.changed_bytes < 2**20
    assert report.probe_errors["noise_prediction"] < 1e-3
    after = snapshot(cache.root)
    assert before.items() <= after.items()
    assert refit(cache, *unets[1], BUILDER).base is None  # it is there now
    assert any("Comparing unet" in line for line in lines)


def test_a_build_says_that_a_refit_would_do(unets, cache):
    lines = []
    cache.get(*unets[1], BUILDER, lines.append)
    assert any("fastface-trt refit --backend onnxruntime --export" in line for line in lines)


def test_the_probe_knows_a_wrong_weight(unets, cache):
    with cache.open(*unets[0], BUILDER) as engine:
        assert check_probe(engine, *unets[0])["noise_prediction"] < 1e-3
        with pytest.raises(EngineMismatch, match="noise_prediction is off by"):
            check_probe(engine, *unets[1])


def test_a_refit_that_fails_its_probe_never_appears(unets, cache, monkeypatch):
    monkeypatch.setattr(
        "fastface_trt.engines.ort.builder.replace_weights",
        lambda old, new, files, change, onnx: [
            shutil.copy(old / name, new / name) for name in files if (old / name).exists()
        ],
    )
    before = snapshot(cache.root)
    with pytest.raises(EngineMismatch, match="does not compute what the export does"):
        refit(cache, *unets[1], BUILDER)
    assert snapshot(cache.root) == before


def test_a_full_disk_leaves_nothing(unets, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(cache.root))

    monkeypatch.setattr(onnxruntime_weights, "_write_all", full)
    before = snapshot(cache.root)
    with pytest.raises(StorageError, match="is full"):
        refit(cache, *unets[1], BUILDER)
    assert snapshot(cache.root) == before


def test_another_graph_is_refused_by_name(tmp_path):
    cache = EngineCache(tmp_path / "cache")
    cache.get(write_module(tmp_path / "a"), tmp_path / "a", BUILDER)
    other = write_module(tmp_path / "b", factor=3.0)
    path = tmp_path / "b" / other.files[0].path
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"MatSum"))
    with pytest.raises(EngineMismatch, match="function Affine differs"):
        refit(cache, other, tmp_path / "b", BUILDER)


def test_without_an_engine_there_is_nothing_to_refit(unets, tmp_path):
    cache = EngineCache(tmp_path)
    with pytest.raises(EngineMismatch, match="no engine with the same inputs"):
        refit(cache, *unets[1], BUILDER)
    with pytest.raises(EngineMismatch, match="has no engine for onnxruntime"):
        refit(cache, *unets[1], BUILDER, base=unets[0][0])
    other = OnnxRuntimeBuilder(threads=1, optimization="basic")
    with pytest.raises(EngineMismatch, match="no engine with the same inputs"):
        refit(cache, *unets[1], other)


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
@pytest.mark.parametrize("name", [WEIGHT_MAP, "engine.data", "engine.onnx"])
def test_a_damaged_base_is_not_used(unets, cache, damage, name):
    file = cache.root / cache.key(unets[0][0], BUILDER) / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    before = snapshot(cache.root)
    with pytest.raises((EngineMismatch, ExportIncomplete)):
        refit(cache, *unets[1], BUILDER, base=unets[0][0])
    assert snapshot(cache.root) == before


@pytest.mark.parametrize("name", ["model.onnx", "probe.safetensors"])
def test_a_changed_export_is_not_used(unets, cache, tmp_path, name):
    module, folder = unets[1]
    shutil.copytree(folder / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / name
    file.write_bytes(file.read_bytes()[:-1])
    before = snapshot(cache.root)
    with pytest.raises(ExportIncomplete, match=f"{name} is truncated"):
        refit(cache, module, tmp_path, BUILDER)
    assert snapshot(cache.root) == before


def test_a_module_without_a_probe_is_refitted_and_says_so(unets, cache):
    module, folder = unets[1]
    lines = []
    plain = module.model_copy(update={"probe": None})
    assert refit(cache, plain, folder, BUILDER, lines.append).probe_errors is None
    assert any("has no probe" in line for line in lines)


def test_the_probe_is_no_part_of_an_engines_identity(unets, cache):
    module, _ = unets[0]
    entry = FileEntry(path="unet/probe.safetensors", bytes=1, sha256="0" * 64)
    probe = module.probe.model_copy(update={"file": entry})
    other = module.model_copy(update={"probe": probe})
    assert cache.key(module, BUILDER) == cache.key(other, BUILDER)


def test_which_builders_can_refit():
    assert isinstance(BUILDER, RefittingBuilder)
    assert isinstance(TensorRTBuilder("tensorrt-rtx"), RefittingBuilder)
