"""TensorRT's own plugin framework, its Python sources, on a stand-in for the compiled half.

The sources come with the wheel `tensorrt-cu13-bindings` (1.3 MB, from PyPI), whose library cannot
be loaded without TensorRT itself. What they need of it is small: base classes, enumerations (those
of TensorRT-RTX are the same), a registry, and expressions over dimensions, which are integers here.
"""

import importlib
import importlib.util
import os
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace


def sources():
    """Folder of `tensorrt_bindings`, installed or named by TENSORRT_BINDINGS, or None."""
    if folder := os.environ.get("TENSORRT_BINDINGS"):
        return Path(folder)
    found = importlib.util.find_spec("tensorrt_bindings")
    return Path(found.submodule_search_locations[0]) if found else None


class Expression:
    """A dimension: TensorRT knows it when it builds (`constant`) or not."""

    def __init__(self, value, constant=True):
        self.value, self.constant = value, constant

    def is_constant(self):
        return self.constant

    def get_constant_value(self):
        return self.value


class Expressions:
    """What TensorRT calls an expression builder."""

    def __init__(self, operations):
        self.operations = operations

    def constant(self, value):
        return Expression(value)

    def operation(self, which, a, b):
        calculate = {
            self.operations.PROD: lambda x, y: x * y,
            self.operations.SUM: lambda x, y: x + y,
            self.operations.CEIL_DIV: lambda x, y: -(-x // y),
        }[which]
        return Expression(calculate(a.value, b.value), a.constant and b.constant)


class Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        assert (namespace, creator.name) not in self.creators
        self.creators[namespace, creator.name] = creator

    def get_creator(self, name, version, namespace):
        assert version == "1"
        return self.creators.get((namespace, name))


class Base:
    def __init__(self):
        pass


def tensorrt(monkeypatch, real):
    """A module `tensorrt` with the real `tensorrt.plugin`; enumerations are those of `real`."""
    module = ModuleType("tensorrt")
    vars(module).update({k: v for k, v in vars(real).items() if not k.startswith("_")})
    bases = (
        "IPluginV3 IPluginV3QuickCore IPluginV3QuickBuild IPluginV3QuickRuntime "
        "IPluginV3QuickAOTBuild IPluginCreatorV3Quick ISymExpr ITensor PluginTensorDesc"
    )
    for name in bases.split():
        setattr(module, name, type(name, (Base,), {}))
    module.DynamicPluginTensorDesc = SimpleDesc
    module.IDimensionExpr = Expression
    module.DimsExprs = lambda length: [None] * length
    module.PluginFieldCollection = list
    requests = "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
    module.QuickPluginCreationRequest = Enum("QuickPluginCreationRequest", requests)
    registry = Registry()
    module.get_plugin_registry = lambda: registry
    module.__version__ = "11.4.0"
    module.__path__ = [str(sources())]
    for name in [one for one in sys.modules if one.split(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    # The package adds names to its __all__ while its own submodules load.
    package = ModuleType("tensorrt.plugin")
    package.__path__, package.__package__ = [str(sources() / "plugin")], "tensorrt.plugin"
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", package)
    module.plugin = package
    for name in ("_lib", "_autotune", "_tensor", "_top_level"):
        loaded = importlib.import_module(f"tensorrt.plugin.{name}")
        monkeypatch.setitem(sys.modules, f"tensorrt.plugin.{name}", loaded)
    return module


class SimpleDesc:
    """Stands for DynamicPluginTensorDesc: sizes, type and format of one tensor."""

    def __init__(self, binding, dims, dtype):
        layout = binding.TensorFormat.LINEAR
        self.desc = SimpleNamespace(dims=tuple(dims), type=dtype, format=layout, scale=1.0)


class LaunchParameters:
    """Collects what a plugin sets: each value is a symbolic number."""

    def __setattr__(self, name, value):
        self.__dict__[name] = value.expr.value


class Scalars(dict):
    """Collects the scalars between a kernel's inputs and outputs."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name

    def values_in_order(self):
        assert sorted(self) == list(range(self.nbSymExprs))
        return [self[index].expr.value for index in range(self.nbSymExprs)]
