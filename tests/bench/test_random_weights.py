"""Full-size modules without their weights: the drawn bytes, the graphs that ship, the export."""

import errno

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper, parser
from scipy.stats import norm

from benchmarks.weightless_graph import ALIGNMENT, LARGEST_KEPT, main
from fastface_trt.bench import random_weights
from fastface_trt.bench import random_weights as weightless
from fastface_trt.bench.flops import count_module
from fastface_trt.bench.random_weights import (
    WEIGHT_STD,
    Region,
    draw_weights,
    random_export,
    read_graph,
    read_template,
    write_module,
)
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file, verify_files
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    MODULE_NAMES,
    ExportManifest,
    read_manifest,
)
from fastface_trt.errors import StorageError
from fastface_trt.mini import folders

REGIONS = (
    Region(dtype="float16", mean=0, count=2**22 + 5),
    Region(dtype="float32", mean=1, count=3),
    Region(dtype="float16", mean=1, count=70_001),
)


def test_bytes_are_the_same_for_any_number_of_threads(tmp_path):
    for threads in (1, 2, 5):
        draw_weights(tmp_path / str(threads), REGIONS, threads)
    one, *others = ((tmp_path / str(threads)).read_bytes() for threads in (1, 2, 5))
    assert len(one) == sum(region.bytes for region in REGIONS)
    assert all(other == one for other in others)


def test_values_are_normal_and_never_exactly_their_mean(tmp_path):
    draw_weights(tmp_path / "data", REGIONS)
    data, start = (tmp_path / "data").read_bytes(), 0
    for region in REGIONS:
        values = np.frombuffer(data, region.dtype, region.count, start).astype(np.float64)
        start += region.bytes
        if region.mean == 0:  # near 1 there are steps of 2⁻¹¹
            assert np.all(values != 0)
        if len(values) < 1000:
            continue
        found = np.quantile(values, (0.001, 0.1, 0.5, 0.9, 0.999))
        expected = norm.ppf((0.001, 0.1, 0.5, 0.9, 0.999), region.mean, WEIGHT_STD)
        np.testing.assert_allclose(found, expected, atol=1 / len(values) ** 0.5)
        assert np.corrcoef(values[:-1], values[1:])[0, 1] < 5 / len(values) ** 0.5


def test_the_smallest_module_is_drawn_as_its_hashes_say_and_computes(tmp_path):
    """The bytes are a promise to every machine: an engine's identity holds their hashes."""
    import onnxruntime

    spec = read_template().manifest.modules["vae_decoder"]
    write_module(spec, tmp_path)
    verify_files(tmp_path, spec.files)
    session = onnxruntime.InferenceSession(tmp_path / spec.files[0].path)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    picture = session.run(["picture"], {"latents": latents})[0]
    assert picture.shape == (1, 3, 64, 64)
    assert np.isfinite(picture).all()
    assert picture.std() > 0.01


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_every_weight_of_the_graphs_lies_in_its_file(name):
    template, graph = read_template(), onnx.load_from_string(read_graph(name))
    regions = template.regions[name]
    size = sum(region.bytes for region in regions)
    _, *data = template.manifest.modules[name].files
    assert [file.bytes for file in data] == [size] * bool(regions)
    pieces = []
    for tensor in graph.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            held = numpy_helper.to_array(tensor)
            # Frequencies of the embedding of timesteps and sizes are no weights.
            assert held.dtype.kind != "f" or held.size <= max(LARGEST_KEPT, 160)
            continue
        assert where["location"] == "model.onnx.data"
        item = {onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.FLOAT: 4}[tensor.data_type]
        assert int(where["length"]) == item * np.prod(tensor.dims)
        assert int(where["offset"]) % ALIGNMENT == 0
        pieces.append((int(where["offset"]), int(where["length"])))
    pieces.sort()
    ends = [start + length for start, length in pieces]
    assert all(start >= end for (start, _), end in zip(pieces[1:], ends, strict=False))
    assert not ends or ends[-1] <= size


def test_the_graphs_have_the_biases_of_real_checkpoints():
    """Zero biases are dropped by an exporter: 400 additions fewer than what users run."""
    graph = onnx.load_from_string(read_graph("unet")).graph
    biases = [one.name for one in graph.initializer if one.name.endswith(".bias")]
    assert len(biases) > 400


@pytest.fixture
def small_export(tmp_path):
    """An export of one module that has weights, norms, masks and short tensors."""
    rng = np.random.default_rng(0)
    weight = WEIGHT_STD * rng.standard_normal((128, 128))
    tensors = {
        "weight": weight.astype(np.float16),
        "scale": (1 + WEIGHT_STD * rng.standard_normal(128)).astype(np.float16),
        "bias": (WEIGHT_STD * rng.standard_normal(128)).astype(np.float16),
        "table": np.linspace(0, 1, 128, dtype=np.float16),
        "ids": np.arange(128),
        "short": np.float16([0.02]),
    }
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 20]>
        g (float16[n,128] x) => (float16[n,128] y) {
            product = MatMul(x, weight)
            normed = LayerNormalization(product, scale, bias)
            placed = Add(normed, table)
            picked = Gather <axis=1> (placed, ids)
            y = Mul(picked, short)
        }"""
    )
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in tensors.items())
    folder = tmp_path / "export"
    (folder / "vae_decoder").mkdir(parents=True)
    onnx.save(model, folder / "vae_decoder" / "model.onnx")
    manifest = read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)
    spec = manifest.modules["vae_decoder"].model_copy(
        update={"files": (describe_file(folder, "vae_decoder/model.onnx"),)}
    )
    manifest = manifest.model_copy(update={"modules": {"vae_decoder": spec}, "face_model": "face"})
    (folder / EXPORT_MANIFEST).write_text(manifest.model_dump_json())
    return folder, tensors


@pytest.fixture
def packed(small_export, tmp_path, monkeypatch):
    """The small export without its weights, in place of what ships."""
    folder = tmp_path / "graphs"
    result = CliRunner().invoke(main, [str(small_export[0]), "--out", str(folder)])
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(weightless, "GRAPHS", folder)
    monkeypatch.setattr(random_weights, "GRAPHS", folder)
    read_template.cache_clear()
    yield folder
    read_template.cache_clear()


def test_only_what_is_drawn_leaves_the_graph(small_export, packed, tmp_path):
    folder, tensors = small_export
    write_module(read_template().manifest.modules["vae_decoder"], tmp_path / "made")
    path = tmp_path / "made" / "vae_decoder" / "model.onnx"
    drawn = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    assert {name: (one.dtype, one.shape) for name, one in drawn.items()} == {
        name: (one.dtype, one.shape) for name, one in tensors.items()
    }
    kept = {name for name in tensors if np.array_equal(drawn[name], tensors[name])}
    assert kept == {"table", "ids", "short"}
    for name, mean in (("weight", 0), ("bias", 0), ("scale", 1)):
        assert abs(drawn[name].mean() - mean) < 0.01
        assert WEIGHT_STD / 2 < drawn[name].std() < 2 * WEIGHT_STD
    assert count_module(path, {"n": 3}) == count_module(
        folder / "vae_decoder" / "model.onnx", {"n": 3}
    )


def test_one_module_can_be_renewed(small_export, packed):
    before = (packed / weightless.TEMPLATE).read_text()
    arguments = [str(small_export[0]), "--out", str(packed), "--module", "vae_decoder"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (packed / weightless.TEMPLATE).read_text() == before


def test_the_export_is_drawn_once_and_checkpoints_share_its_files(packed, tmp_path):
    cache = EngineCache(tmp_path / "cache")
    folder = random_export("hyper", "fp16", None, cache, print)
    assert random_export("hyper", "fp16", 1, cache, pytest.fail) == folder
    other = random_export("turbo", "fp16", None, cache, print)
    hyper, turbo = (read_manifest(one / EXPORT_MANIFEST, ExportManifest) for one in (folder, other))
    for manifest, place in ((hyper, folder), (turbo, other)):
        verify_files(place, manifest.files())
    assert (hyper.checkpoint, hyper.width) == ("hyper", 1024)
    assert (turbo.checkpoint, turbo.width) == ("turbo", 512)
    assert hyper.scheduler["class"] != turbo.scheduler["class"]
    assert hyper.modules == turbo.modules
    for file in hyper.modules["vae_decoder"].files:
        assert (folder / file.path).samefile(other / file.path)
    assert cache.entries() == []


def test_where_files_have_one_name_only_they_are_drawn_again(packed, tmp_path, monkeypatch):
    cache = EngineCache(tmp_path / "cache")
    random_export("hyper", "fp16", None, cache, print)

    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(random_weights.os, "link", refuse)
    folder = random_export("turbo", "fp16", None, cache, print)
    verify_files(folder, read_manifest(folder / EXPORT_MANIFEST, ExportManifest).files())


def test_a_stopped_export_leaves_nothing(packed, tmp_path, monkeypatch):
    def stop(spec, folder):
        write_module(spec, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(random_weights, "write_module", stop)
    cache = EngineCache(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        random_export("hyper", "fp16", None, cache, print)
    assert list((cache.root / "exports").iterdir()) == []
    monkeypatch.undo()


def test_a_full_disk_is_said_in_a_sentence(packed, tmp_path, monkeypatch):
    def full(spec, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(random_weights, "write_module", full)
    with pytest.raises(StorageError, match="is full"):
        random_export("hyper", "fp16", None, EngineCache(tmp_path / "cache"), print)
