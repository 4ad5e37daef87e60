"""Refit of plans: names on the real parser, and the calls on a double of the real classes.

The double holds weights by name as a plan would and lets through only methods that the class of the
same name in `tensorrt_rtx` has, with as many arguments.
"""

import errno
import json
import re

import numpy as np
import pytest

from fastface_trt.engines.cache import EngineCache, refit_base
from fastface_trt.engines.manifest import BuildReport, FileEntry, Probe
from fastface_trt.engines.onnx.file import OnnxFile
from fastface_trt.engines.refit import refit
from fastface_trt.engines.tensorrt import builder as builder_module
from fastface_trt.engines.tensorrt.builder import TensorRTBuilder
from fastface_trt.engines.tensorrt.flavour import find_flavour
from fastface_trt.engines.tensorrt.network import MessageLog, name_weights, parse
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.engines.tensorrt.plan import PLAN
from fastface_trt.engines.tensorrt.profiles import make_profiles
from fastface_trt.engines.weight_map import (
    EngineWeight,
    digest_weights,
    find_change,
    is_weight,
    make_map,
)
from fastface_trt.errors import BackendUnavailable, BuildFailed, EngineMismatch, StorageError
from tests.engines.tiny_models import write_module

trt = pytest.importorskip("tensorrt_rtx")
RTX = find_flavour("tensorrt-rtx")
ADA = {"gpu": "NVIDIA RTX 4090", "compute_capability": "8.9"}


def named(module, folder):
    """Initialisers that the real parser's network uses by address, and the file's weights."""
    log = MessageLog(trt)
    with OnnxFile(folder / module.files[0].path) as onnx:
        network, parser = parse(RTX, trt, trt.Builder(log.logger), log, module, onnx)
        found = {one.name for one in name_weights(trt, network, log, onnx)}
        weights = {name for name, one in onnx.initializers.items() if is_weight(one)}
        del network, parser
    assert log.errors == []
    return found, weights


def test_the_parser_uses_every_lora_dependent_weight_as_it_is(tiny_export, half_scale_export):
    folder, manifest = tiny_export
    module = manifest.modules["unet"]
    found, weights = named(module, folder)
    with (
        OnnxFile(folder / "unet/model.onnx") as one,
        OnnxFile(half_scale_export[0] / "unet/model.onnx") as other,
    ):
        engine = [EngineWeight(name=n, sources=(n,), dtype="float32") for n in sorted(found)]
        built = make_map(one, digest_weights(one), engine)
        change = find_change(module, built, other)
    assert len(change.changed) == 56
    # What is left over is no weight of a layer: the factors of an upsampling.
    assert len(weights - found) <= 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("external", [False, True])
def test_weights_have_the_names_of_their_initialisers(tmp_path, dtype, external):
    module = write_module(tmp_path, dtype=dtype, external=external)
    found, weights = named(module, tmp_path)
    assert found == weights == {"w", "b"}


def test_a_refittable_engine_has_a_profile_for_the_probe(tmp_path):
    entry = FileEntry(path="affine/probe.safetensors", bytes=1, sha256="0" * 64)
    module = write_module(tmp_path).model_copy(
        update={"probe": Probe(file=entry, sizes={"batch": 7}, tolerance=1e-3)}
    )

    def rows(**options):
        return [p.best["x"][0] for p in make_profiles(module, TensorRTOptions(**options))]

    assert rows() == [1]
    assert rows(refittable=True) == rows(strip_weights=True) == [1, 7]


class Double:
    """Lets through what the real class has."""

    def __init__(self, module):
        self._module = module

    def __getattribute__(self, name):
        value = object.__getattribute__(self, name)
        if name.startswith("_"):
            return value
        real = getattr(getattr(trt, type(self).__name__), name)
        if not callable(value):
            return value
        overloads = re.findall(rf"^(?:\d+\. )?{name}\((self.*)\) ->", real.__doc__, re.M)

        def call(*arguments):
            assert len(arguments) in {text.count(": ") - 1 for text in overloads}, name
            self._module.calls.append(name)
            return value(*arguments)

        return call


class Runtime(Double):
    engine_host_code_allowed = True

    def deserialize_cuda_engine(self, plan):
        assert self.engine_host_code_allowed is False
        content = bytes(plan)
        return ICudaEngine(self._module, json.loads(content)) if content[:1] == b"{" else None


class ICudaEngine(Double):
    def __init__(self, module, plan):
        super().__init__(module)
        self._plan = plan
        self.refittable = plan["refittable"]

    def create_serialization_config(self):
        return ISerializationConfig(self._module)

    def serialize_with_config(self, config):
        assert config._flags == {trt.SerializationFlag.INCLUDE_REFIT}
        return json.dumps(self._plan).encode()


class ISerializationConfig(Double):
    def __init__(self, module):
        super().__init__(module)
        self._flags = {trt.SerializationFlag.EXCLUDE_WEIGHTS}

    def clear_flag(self, flag):
        self._flags.discard(flag)
        return True

    def set_flag(self, flag):
        self._flags.add(flag)
        return True


class Refitter(Double):
    def __init__(self, module, engine, logger):
        super().__init__(module)
        self._engine, self._logger, self._given = engine, logger, {}

    def get_all_weights(self):
        return list(self._engine._plan["weights"])

    def get_weights_prototype(self, name):
        return trt.Weights(trt.DataType.FLOAT, 0, self._engine._plan["counts"][name])

    def set_named_weights(self, name, weights):
        if self._module.refuse == "weights":
            self._logger.log(trt.ILogger.ERROR, "the weights do not fit")
            return False
        self._given[name] = weights.numpy().tobytes().hex()
        return True

    def get_missing_weights(self):
        merged = self._engine._plan["merged"]
        return [n for n in merged if n not in self._given] if {*merged} & {*self._given} else []

    def refit_cuda_engine(self):
        if self._module.refuse == "refit":
            self._logger.log(trt.ILogger.ERROR, "CUDA error 700")
            return False
        self._engine._plan["weights"] |= self._given
        return True


class FakeTensorRT:
    def __init__(self):
        self.calls, self.refuse = [], ""
        self.Runtime = lambda logger: Runtime(self)
        self.Refitter = lambda engine, logger: Refitter(self, engine, logger)

    def __getattr__(self, name):
        return getattr(trt, name)


@pytest.fixture
def fake(monkeypatch):
    module = FakeTensorRT()
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", module)
    monkeypatch.setattr(builder_module, "cuda_hardware", lambda: ADA)
    return module


@pytest.fixture
def modules(tmp_path):
    """Modules A and B, which differ in w, and the folders that they lie in."""
    return tuple(
        (write_module(tmp_path / name, factor=factor, external=True), tmp_path / name)
        for name, factor in (("a", 2.0), ("b", 3.0))
    )


def builder(**options):
    return TensorRTBuilder("tensorrt-rtx", TensorRTOptions(**options))


LIKE_A_USER = TensorRTBuilder("tensorrt-rtx", TensorRTOptions(), exact=False)


def stand_in(cache, module, folder, merged=(), refittable=True, **options):
    """Put a stand-in plan for `module` into the cache, as a build on a GPU would."""

    def write(target):
        with OnnxFile(folder / module.files[0].path) as onnx:
            weights = {n: bytes(one.data).hex() for n, one in onnx.initializers.items()}
            engine = [EngineWeight(name=n, sources=(n,), dtype="float32") for n in weights]
            make_map(onnx, digest_weights(onnx), engine).write(target)
        counts = {name: len(value) // 8 for name, value in weights.items()}
        if options.get("strip_weights"):
            weights = dict.fromkeys(weights, "")
        plan = {"weights": weights, "counts": counts, "merged": merged, "refittable": refittable}
        (target / PLAN).write_text(json.dumps(plan))
        return BuildReport(layers=3)

    return cache.make(module, folder, builder(refittable=refittable, **options), write)[0].key


def plan(cache, key):
    return json.loads((cache.root / key / PLAN).read_text())


def test_there_and_back_again(tmp_path, fake, modules):
    cache = EngineCache(tmp_path / "cache")
    first = stand_in(cache, *modules[0])
    before = (cache.root / first / PLAN).read_bytes()
    report = refit(cache, *modules[1], LIKE_A_USER)
    assert report.changed == ("w",)
    assert fake.calls.count("set_named_weights") == 1
    w = np.frombuffer(bytes.fromhex(plan(cache, report.key)["weights"]["w"]), np.float32)
    np.testing.assert_array_equal(w, np.full(len(w), 3, np.float32))
    assert (cache.root / first / PLAN).read_bytes() == before
    cache.remove(first)
    assert refit(cache, *modules[0], LIKE_A_USER).key == first
    assert plan(cache, first) == json.loads(before)
    # A service that asks for no options in particular finds the refitted engine.
    assert cache.get(*modules[1], LIKE_A_USER, build=False)[0].key == report.key


def test_weights_that_were_merged_come_along(tmp_path, fake, modules):
    cache = EngineCache(tmp_path / "cache")
    stand_in(cache, *modules[0], merged=["w", "b"])
    refit(cache, *modules[1], LIKE_A_USER)
    assert fake.calls.count("set_named_weights") == 2


def test_a_weight_of_unknown_origin_stops_it(tmp_path, fake, modules):
    cache = EngineCache(tmp_path / "cache")
    stand_in(cache, *modules[0], merged=["w", "folded"])
    with pytest.raises(BuildFailed, match="also asks for folded"):
        refit(cache, *modules[1], LIKE_A_USER)


def test_a_stripped_engine_gets_all_its_weights(tmp_path, fake, modules):
    cache = EngineCache(tmp_path / "cache")
    stripped = stand_in(cache, *modules[0], strip_weights=True)
    with pytest.raises(EngineMismatch, match="built without its weights"):
        builder(refittable=True, strip_weights=True).open(cache.verify(stripped), cache.root)
    for module, folder in modules:
        report = refit(cache, module, folder, LIKE_A_USER)
        assert "strip_weights" not in cache.verify(report.key).options
        weights = plan(cache, report.key)["weights"]
        with OnnxFile(folder / module.files[0].path) as onnx:
            assert weights == {n: bytes(o.data).hex() for n, o in onnx.initializers.items()}
        cache.remove(report.key)


def test_a_stripped_engine_that_is_not_refittable_takes_only_its_own(tmp_path, fake, modules):
    cache = EngineCache(tmp_path / "cache")
    stand_in(cache, *modules[0], refittable=False, strip_weights=True)
    with pytest.raises(EngineMismatch, match="takes only the weights that it was built with"):
        refit(cache, *modules[1], LIKE_A_USER)


@pytest.mark.parametrize(
    ("refuse", "words"),
    [("weights", "refuses the weight w .the weights do not fit"), ("refit", "CUDA error 700")],
)
def test_a_refit_that_fails_leaves_everything(tmp_path, fake, modules, refuse, words):
    cache = EngineCache(tmp_path / "cache")
    stand_in(cache, *modules[0])
    before = sorted(p for p in cache.root.rglob("*") if p.suffix != ".lock")
    fake.refuse = refuse
    with pytest.raises(BuildFailed, match=words):
        refit(cache, *modules[1], LIKE_A_USER)
    assert sorted(p for p in cache.root.rglob("*") if p.suffix != ".lock") == before


def test_a_full_disk_leaves_everything(tmp_path, fake, modules, monkeypatch):
    cache = EngineCache(tmp_path / "cache")
    stand_in(cache, *modules[0])
    before = sorted(p for p in cache.root.rglob("*") if p.suffix != ".lock")

    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastface_trt.engines.tensorrt.builder.write_all", full)
    with pytest.raises(StorageError, match="is full"):
        refit(cache, *modules[1], LIKE_A_USER)
    assert sorted(p for p in cache.root.rglob("*") if p.suffix != ".lock") == before


def test_without_a_gpu_it_says_so(tmp_path, modules):
    cache = EngineCache(tmp_path / "cache")
    stand_in(cache, *modules[0])
    if builder_module.cuda_hardware()["gpu"] != "unknown":
        pytest.skip("this machine has a GPU")
    exact = builder(refittable=True)
    assert refit_base(cache.near_matches(modules[1][0], exact), *modules[1])
    with pytest.raises(BackendUnavailable, match="finds no NVIDIA GPU"):
        refit(cache, *modules[1], exact)
