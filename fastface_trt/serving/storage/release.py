"""What stands in shared storage: releases, which are an export and engines of it, by content.

    objects/HH/HASH     contents of files, by SHA-256; never changed
    releases/HASH.json  a `Release`, by the SHA-256 of its own bytes
    tags/NAME           the hash of a release: the only thing that changes

A release names an export's manifest and engines' manifests by hash, and these name every file by
hash, so one hash decides all bytes that a machine gets.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from fastface_trt.engines.manifest import (
    MANIFEST_LIMIT,
    FileEntry,
    Strict,
    first_problem,
)
from fastface_trt.errors import InvalidRequest, ManifestError

RELEASE_LIMIT = 1 << 20
"""Bytes of a release at most: it holds a few hundred bytes per engine."""

_HASH = re.compile("[0-9a-f]{64}")
_TAG = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REPUBLISH = "Publish it again with this version: fastface-trt publish EXPORT URL --tag NAME."


class ManifestEntry(Strict):
    """A manifest in the storage, with its size in bytes and SHA-256 (hexadecimal)."""

    bytes: int = Field(ge=0, le=MANIFEST_LIMIT)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Release(Strict):
    """An export's manifest, and those of engines that were built from it, by cache key."""

    schema_version: Literal[1] = 1
    export: ManifestEntry
    engines: Mapping[str, ManifestEntry] = Field(default_factory=dict)


class Address(NamedTuple):
    """`URL#REFERENCE`: a storage, and in it a tag or the hash of a release."""

    url: str
    reference: str

    @property
    def pinned(self) -> bool:
        """Whether the reference is a hash, so that nobody can change what is meant."""
        return _HASH.fullmatch(self.reference) is not None

    def __str__(self) -> str:
        return f"{self.url}#{self.reference}"


Document = TypeVar("Document", bound=Strict)


def is_address(export: str) -> bool:
    """Whether an export is given as `URL#REFERENCE` and not as a folder or a name."""
    return "#" in export


def parse_address(text: str) -> Address:
    """Read `URL#TAG` or `URL#HASH`; raises `InvalidRequest`."""
    url, mark, reference = text.rpartition("#")
    if not url or not mark:
        raise InvalidRequest(f"{text!r} names no release.", "Write URL#TAG or URL#HASH.")
    if not _HASH.fullmatch(reference):
        check_tag(reference)
    return Address(url, reference)


def check_tag(name: str) -> str:
    """`name`, if it can be a tag; raises `InvalidRequest`."""
    if not _TAG.fullmatch(name) or _HASH.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} cannot be a tag.",
            "Use up to 100 letters, digits, dots, dashes and underscores, not a hash.",
        )
    return name


def object_name(sha256: str) -> str:
    """Where the storage keeps the contents with this hash."""
    return f"objects/{sha256[:2]}/{sha256}"


def release_name(sha256: str) -> str:
    """Where the storage keeps the release with this hash."""
    return f"releases/{sha256}.json"


def tag_name(tag: str) -> str:
    """Where the storage keeps which release a tag means."""
    return f"tags/{tag}"


def to_json(document: Strict) -> bytes:
    """A manifest or release as it is stored: the same text that a finished folder has."""
    return (document.model_dump_json(indent=2) + "\n").encode()


def sha256_of(content: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def parse_document(content: bytes, kind: type[Document], where: str) -> Document:
    """Read a manifest or release; raises `ManifestError` with the first thing that is wrong."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        place, problem = first_problem(error)
        raise ManifestError(
            f"{where} is not valid at {place or 'the top'}: {problem}.", _REPUBLISH
        ) from None


def check_places(files: list[FileEntry], manifest_name: str, where: str) -> None:
    """Refuse file names that could meet each other or the manifest, or are spelled oddly.

    That they stay inside their folder is checked where a manifest is read. Raises `ManifestError`.
    """
    hashes: dict[str, str] = {}
    for file in files:
        path = PurePosixPath(file.path)
        odd = str(path) != file.path or file.path == "." or "\0" in file.path
        if (
            odd
            or path.parts[0] == manifest_name
            or hashes.get(file.path, file.sha256) != file.sha256
        ):
            raise ManifestError(f"{where} has a file called {file.path!r}.", _REPUBLISH)
        hashes[file.path] = file.sha256
    for name in hashes:
        if any(str(parent) in hashes for parent in PurePosixPath(name).parents):
            raise ManifestError(f"{where} has {name!r} below another file.", _REPUBLISH)
