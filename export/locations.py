"""Locations: what a user names as weights, found on disk or fetched from the hub.

A location that exists as a path, or looks like one, is local and nothing is asked of the hub;
otherwise it is `owner/name`, with `@revision` or a path inside it. The hub's list of files is read
first, so that of several variants (`.fp16`, safetensors and `.bin`) one is downloaded. The hub
client's own settings (`HF_HOME`, `HF_HUB_OFFLINE`, tokens) apply.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastface_trt.checkpoints import ADAPTERS, HubItem
from fastface_trt.engines.files import sha256_file
from fastface_trt.engines.manifest import Source
from fastface_trt.errors import FastFaceError, WeightsError
from fastface_trt.export.number_formats import PLAIN

_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx")

Choose = Callable[[Sequence[str]], Iterable[str]]
"""Of the names of a repository's files, those to download."""


@contextmanager
def weights_errors(what: str) -> Iterator[None]:
    """Turn whatever a loader raises into one `WeightsError` that names `what`."""
    try:
        yield
    except FastFaceError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > 300:
            reason = reason[:297] + "..."
        raise WeightsError(
            f"{what} could not be loaded: {reason.rstrip('.')}.", _advice(error)
        ) from error


def _advice(error: Exception) -> str:
    """The advice that belongs to an error of the hub client or of a file."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return "Accept its licence on the hub's page, and log in: hf auth login."
    if isinstance(error, hub.RevisionNotFoundError):
        return "Check what stands behind the @."
    if isinstance(error, hub.RepositoryNotFoundError):
        return "Check the spelling of owner/name; a private one needs a token: hf auth login."
    of_http = type(error).__module__.partition(".")[0] in ("httpx", "requests", "urllib3")
    if of_http or isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return "Go online, or name a local folder or file; offline only the hub cache is there."
    if isinstance(error, hub.EntryNotFoundError):
        return "Check the path inside the repository."
    if isinstance(error, json.JSONDecodeError):
        return "A configuration is not JSON: download it again."
    if isinstance(error, OSError):
        return "Check the path, its permissions, and the free space of the disk."
    return "Check that the files are complete, and of the kind that is asked for."


@dataclass(frozen=True)
class Located:
    """A hub item or path as a local path, with its record for the manifest."""

    path: Path
    source: Source


def sha256_folder(folder: Path) -> str:
    """One SHA-256 for a folder: over the relative names and the SHA-256 of all its files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def is_local(item: HubItem) -> bool:
    """Whether an item is a path, so that the hub is not asked for it."""
    path = Path(item.location).expanduser()
    repository = item.location.partition("@")[0]
    looks_local = path.is_absolute() or repository.count("/") != 1 or repository.startswith(".")
    return path.exists() or looks_local or path.suffix in _FILES


def locate(
    item: HubItem, role: str, *, patterns: Sequence[str] = ("*",), choose: Choose | None = None
) -> Located:
    """Find an item on disk, downloading it when it is a hub id; raise `WeightsError` when absent.

    `patterns`, or where patterns do not say it `choose`, tell which files of a repository (below
    the item's path) are wanted.
    """
    local = Path(item.location).expanduser()
    if is_local(item):
        path = local / item.path if item.path else local
        if not path.exists():
            raise WeightsError(f"There is no {path} ({role}).", "Check the path.")
        digest = sha256_file(path) if path.is_file() else sha256_folder(path)
        return Located(
            path, Source(role=role, location=local.name, sha256=digest, licence=item.licence)
        )
    if (item.path or "").endswith(".gguf"):  # before gigabytes of it are downloaded
        raise WeightsError(f"{item.path} is a GGUF file, whose weights cannot be read here.", PLAIN)
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, _, revision = item.location.partition("@")
    wanted = revision or item.revision
    with weights_errors(f"{repository} of the hub ({role})"):
        if item.path and "." in Path(item.path).name:
            path = Path(hf_hub_download(repository, item.path, revision=wanted))
            root = path
            for _ in Path(item.path).parts:
                root = root.parent
        else:
            below = f"{item.path}/" if item.path else ""
            if choose is None:
                wanted_files = [below + pattern for pattern in patterns]
            else:
                names = [n.removeprefix(below) for n in _listing(repository, wanted, below)]
                wanted_files = [below + name for name in choose(names)]
            root = Path(snapshot_download(repository, revision=wanted, allow_patterns=wanted_files))
            path = root / item.path if item.path else root
    # The cache names a snapshot's folder by its commit, which is the exact revision.
    return Located(
        path,
        Source(role=role, location=repository, revision=root.name, licence=item.licence),
    )


def _listing(repository: str, revision: str | None, below: str) -> list[str]:
    """The names of a repository's files; offline those that the cache has."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = HfApi().list_repo_files(repository, revision=revision)
    except HfHubHTTPError:  # the hub's own answer
        raise
    except Exception:  # offline, whichever HTTP library the hub client has
        root = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    return [name for name in names if name.startswith(below)]


def parse_item(text: str, licence: str = "unknown") -> HubItem:
    """A path, a hub id, `id@revision`, or `id/path/to/file` as given on the command line."""
    if Path(text).expanduser().exists() or text.count("/") <= 1 or text.startswith((".", "/", "~")):
        return HubItem(text, licence=licence)
    name, _, revision = text.partition("@")
    owner, repository, path = name.split("/", 2)
    return HubItem(f"{owner}/{repository}", revision or None, path, licence)


def parse_scaled_item(text: str) -> tuple[HubItem, float]:
    """What `parse_item` reads, with `=SCALE` behind it or at scale 1."""
    name, _, scale = text.rpartition("=")
    try:
        if name and not Path(text).expanduser().exists():
            return parse_item(name), float(scale)
    except ValueError:
        pass
    return parse_item(text), 1.0


def parse_adapter(text: str) -> HubItem:
    """The name of a published adapter (`checkpoints.ADAPTERS`), or what `parse_item` reads."""
    named = next((item for name, item in ADAPTERS.items() if name == text), None)
    return parse_item(text) if named is None or Path(text).exists() else named


_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_WEIGHTS = re.compile(
    rf"({'|'.join(_STEMS)})(?:\.(\w+))?(?:-(\d+)-of-(\d+))?(?:\.(\w+))?\.(safetensors|bin)"
)


def pick_weights(names: Iterable[str], what: str, dtype: torch.dtype) -> list[str]:
    """Of the files of a model's folder, those of one set of weights: a file, or all its shards.

    safetensors before `.bin`; for float16 the fp16 variant before the plain one, for other types
    the other way round; another variant where it is the only one. Raises `WeightsError` where
    there is none, where shards are missing, or where only variants remain that nothing tells apart.
    """
    names = sorted(names)
    sets: dict[tuple[str, str, str], dict[int, str]] = {}
    shards: dict[tuple[str, str, str], int] = {}
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match:
            stem, before, number, of, after, form = match.groups()
            key = (form, before or after or "", stem)
            if number is None:  # a whole file makes shards beside it needless
                sets[key], shards[key] = {0: name}, 1
            elif shards.get(key) != 1 or 0 not in sets[key]:
                sets.setdefault(key, {})[int(number)] = name
                shards[key] = int(of)
    if not sets:
        holds = ", ".join(names[:5]) or "nothing"
        raise WeightsError(
            f"{what} has no weights under the names that diffusers and transformers give; it "
            f"holds {holds}.",
            "Wanted is diffusion_pytorch_model or model, as .safetensors or .bin.",
        )
    ranks = ["fp16", ""] if dtype == torch.float16 else ["", "fp16"]

    def order(key: tuple[str, str, str]) -> tuple[bool, bool, int, int]:
        form, variant, stem = key
        rank = ranks.index(variant) if variant in ranks else len(ranks)
        return len(sets[key]) < shards[key], form == "bin", rank, _STEMS.index(stem)

    best = min(sets, key=order)
    if len(sets[best]) < shards[best]:
        raise WeightsError(
            f"{what} has {len(sets[best])} of {shards[best]} shards: only "
            f"{', '.join(sets[best].values())}.",
            "Download the others.",
        )
    rivals = sorted({k[1] for k in sets if k[1] not in ranks and k[0] == best[0]})
    if best[1] in rivals and len(rivals) > 1:
        raise WeightsError(
            f"{what} has weights only in the variants {', '.join(rivals)}.",
            "Keep the one that you want, or rename it to have no variant.",
        )
    return [sets[best][number] for number in sorted(sets[best])]
