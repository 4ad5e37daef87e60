"""Every name of TensorRT that the code uses exists in both bindings, or a capability excludes it.

TensorRT-RTX is asked by importing it. TensorRT's own binding cannot be loaded without its libraries
(gigabytes), but a pybind11 module holds the names that it defines as strings of its library file.
"""

import ast
from functools import lru_cache
from pathlib import Path

import pytest
import tensorrt_rtx

from fastface_trt.engines.tensorrt.flavour import FLAVOURS
from tests.engines.tensorrt.plugin_framework import sources

FOLDER = Path(__file__).parents[3] / "engines" / "tensorrt"

RECEIVERS = {
    "binding": (),
    "runtime": ("Runtime",),
    "self._runtime": ("Runtime",),
    "plan": ("ICudaEngine",),
    "self._plan": ("ICudaEngine",),
    "self._config": ("IRuntimeConfig",),
    "config": ("IBuilderConfig", "IRuntimeConfig"),
    "self._context": ("IExecutionContext",),
    "self._cache": ("IRuntimeCache",),
    "cache": ("IRuntimeCache", "ITimingCache"),
    "builder": ("Builder",),
    "network": ("INetworkDefinition",),
    "parser": ("OnnxParser",),
    "added": ("IOptimizationProfile",),
    "error": ("ParserError",),
    "refitter": ("Refitter",),
    "flags": ("BuilderFlag",),
    "timing": ("TimingCacheValue",),
    "layer": ("IAttentionInputLayer",),
    "maker": ("Builder", "Runtime", "Refitter"),
}
"""What the code calls TensorRT's objects, and the classes that they may be."""

NOT_TENSORRT = {"error": {"errno", "errors", "filename", "hint", "message", "strerror"}}
"""Attributes of other things that go by the same name: exceptions."""

RTX_ONLY = {
    "runtime_cache": {"create_runtime_cache", "deserialize", "set_runtime_cache"},
    "cuda_graph_strategy": {"cuda_graph_strategy", "CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"},
    "kernel_specialization": {
        "dynamic_shapes_kernel_specialization_strategy",
        "DynamicShapesKernelSpecializationStrategy",
    },
    "compute_capabilities": {
        "ComputeCapability",
        "num_compute_capabilities",
        "set_compute_capability",
    },
}
"""Names by the capability that the code asks for before it uses them."""


@lru_cache
def used():
    """(file, receiver, attribute chain) of every use."""
    found = set()
    for file in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            chain = ast.unparse(node)
            for receiver in RECEIVERS:
                rest = chain.removeprefix(f"{receiver}.")
                names = rest.split(".")
                if rest == chain or not all(name.isidentifier() for name in names):
                    continue
                if names[0] not in NOT_TENSORRT.get(receiver, ()):
                    found.add((file.name, receiver, rest))
    return sorted(found)


def resolve(module, receiver, chain):
    """Whether `chain` exists on the module, or on one of the receiver's classes."""
    for start in [getattr(module, name) for name in RECEIVERS[receiver]] or [module]:
        here = start
        for name in chain.split("."):
            if not hasattr(here, name):
                break
            here = getattr(here, name)
            if isinstance(here, property):
                return True  # what a property gives is looked at under its own name
        else:
            return True
    return False


def test_the_search_finds_what_the_code_does():
    chains = {(receiver, chain) for _, receiver, chain in used()}
    assert ("binding", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE") in chains
    assert ("self._context", "execute_async_v3") in chains
    assert ("plan", "create_runtime_config") in chains
    assert ("builder", "create_network") in chains
    assert ("self._cache", "deserialize") in chains
    assert len(chains) > 60


def test_every_name_exists_in_tensorrt_rtx():
    wrong = [use for use in used() if not resolve(tensorrt_rtx, *use[1:])]
    assert wrong == []


def test_a_misspelt_name_would_be_found():
    assert not resolve(tensorrt_rtx, "self._context", "execute_async_v4")
    assert not resolve(tensorrt_rtx, "binding", "CudaGraphStrategy.WHOLE_GRAPH")


def test_a_name_that_tensorrt_lacks_would_be_found():
    assert in_tensorrt("execute_async_v3")
    assert not in_tensorrt("execute_async_v4")


@lru_cache
def library():
    """TensorRT's binding library as bytes."""
    folder = sources()
    if folder is None:
        pytest.skip("pip install --no-deps tensorrt-cu13-bindings==11.4.*")
    (file,) = folder.glob("tensorrt*.so")
    return file.read_bytes()


def in_tensorrt(name):
    """Whether the library holds a string that ends in `name`: linkers let strings share tails."""
    return name.encode() + b"\0" in library()


def test_every_name_exists_in_tensorrt_or_belongs_to_a_capability():
    excluded = set().union(*RTX_ONLY.values())
    wrong = [
        (file, receiver, name)
        for file, receiver, chain in used()
        for name in chain.split(".")
        if name not in excluded and not name.startswith("__") and not in_tensorrt(name)
    ]
    assert wrong == []


def test_excluded_names_are_those_of_capabilities_that_only_rtx_has():
    for capability, names in RTX_ONLY.items():
        assert capability in FLAVOURS["tensorrt-rtx"].supports
        assert capability not in FLAVOURS["tensorrt"].supports
        # A name that came to TensorRT too needs no capability any more.
        assert not [name for name in names if in_tensorrt(name)], capability


def test_the_code_asks_for_the_capability_of_such_a_name():
    files = [file for file in FOLDER.glob("*.py") if file.name != "flavour.py"]
    asked = "".join(file.read_text() for file in files)
    for capability in RTX_ONLY:
        assert f'"{capability}"' in asked, capability
