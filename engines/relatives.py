"""Engines that are nearly the one that is wanted: what differs, and how long they took to build."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastface_trt.engines.manifest import EngineManifest, ModuleSpec

if TYPE_CHECKING:
    from fastface_trt.engines.cache import CacheEntry

_FIELDS = ("backend_version", "hardware", "options")


@dataclass(frozen=True)
class Relative:
    """An engine of the same module name and backend, and the fields in which it differs.

    `differences` maps a field (`onnx` for the module itself) to its value there and here.
    """

    manifest: EngineManifest
    differences: Mapping[str, tuple[str, str]]

    def words(self) -> str:
        """One sentence that names the fields."""
        parts = [
            f"{field} {there}, here {here}" if there else f"another {field}"
            for field, (there, here) in self.differences.items()
        ]
        name, key = self.manifest.module.name, self.manifest.key[:12]
        return f"An engine of {name} ({key}) was built with {'; '.join(parts)}."


def find_relatives(
    entries: Iterable["CacheEntry"], module: ModuleSpec, identity: Mapping[str, Any]
) -> list[Relative]:
    """Engines of the module called `module.name` for the same backend, the nearest first."""
    found = [
        Relative(entry.manifest, _differences(entry.manifest, module, identity))
        for entry in entries
        if entry.manifest is not None
        and entry.manifest.module.name == module.name
        and entry.manifest.backend == identity["backend"]
    ]
    return sorted(found, key=lambda relative: len(relative.differences))


def expected_seconds(
    entries: Iterable["CacheEntry"], module: ModuleSpec, identity: Mapping[str, Any]
) -> float | None:
    """How long building `module` will take, judged by an earlier build; None without one.

    The most alike engine's time, scaled by the module's size and the number of profiles, which
    each are compiled by themselves.
    """
    relatives = [
        one for one in find_relatives(entries, module, identity) if _bytes(one.manifest.module)
    ]
    if not relatives:
        return None
    like = relatives[0].manifest
    profiles = [
        max(1, len(options.get("profiles", ())))
        for options in (identity.get("options", {}), like.options)
    ]
    return like.build_seconds * _bytes(module) / _bytes(like.module) * profiles[0] / profiles[1]


def _differences(
    manifest: EngineManifest, module: ModuleSpec, identity: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    differences: dict[str, tuple[str, str]] = {}
    for field in _FIELDS:
        there, here = getattr(manifest, field), identity.get(field, {})
        if there == here:
            continue
        if not isinstance(there, Mapping):
            differences[field] = (there, here)
            continue
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                # Profiles are tables, too long for a sentence.
                simple = not isinstance(there.get(name, here.get(name)), list | dict)
                values = (str(there.get(name, "none")), str(here.get(name, "none")))
                differences[name] = values if simple else ("", "")
    if [file.sha256 for file in manifest.module.files] != [file.sha256 for file in module.files]:
        differences["ONNX file"] = ("", "")
    return differences


def _bytes(module: ModuleSpec) -> int:
    return sum(file.bytes for file in module.files)
