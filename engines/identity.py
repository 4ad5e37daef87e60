"""What an engine is: all that would change it, and the hash of that, which is its name."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fastface_trt.engines.manifest import SCHEMA_VERSION, EngineManifest, ModuleSpec


def module_content(module: ModuleSpec) -> dict[str, Any]:
    """What a module is, wherever its files lie."""
    graph, *data = (file.sha256 for file in module.files)
    return {
        "module": module.name,
        "inputs": [tensor.model_dump() for tensor in module.inputs],
        "outputs": [tensor.model_dump() for tensor in module.outputs],
        "graph": graph,
        "data": sorted(data),
    }


def identity_of(manifest: EngineManifest) -> dict[str, Any]:
    """What `EngineBuilder.identity` said when the engine was built."""
    return manifest.model_dump(include={"backend", "backend_version", "options", "hardware"})


def engine_key(module: ModuleSpec, identity: Mapping[str, Any]) -> str:
    """The name of a module's engine by a builder's identity: SHA-256, 64 hexadecimal digits."""
    content = {
        "schema": SCHEMA_VERSION,
        **module_content(module),
        "builder": {"options": {}, "hardware": {}} | dict(identity),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
