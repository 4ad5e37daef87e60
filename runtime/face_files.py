"""Which two ONNX files a face model is; no other file is opened.

A face model is an export's, whose manifest names its files with their hashes; one of InsightFace's
packs, whose hashes are `PACKS`; or a folder of one's own with exactly one detector and one
recogniser. What a file is, its header says, which is read without giving the file to a library.

Packs are downloaded at first use into the folder where InsightFace keeps them, and compared with
their hashes each time they are opened. Of an archive the two files are taken out, by name.
"""

import errno
import hashlib
import http.client
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Final, Literal

from filelock import FileLock

from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import (
    atomic_file,
    sha256_file,
    storage_errors,
    unnamed_files,
    verify_files,
)
from fastface_trt.engines.manifest import FileEntry
from fastface_trt.engines.onnx.file import (
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_OUTPUT,
    OnnxFile,
    check_references,
)
from fastface_trt.errors import ExportIncomplete, FastFaceError, WeightsError


@dataclass(frozen=True, slots=True)
class FaceFiles:
    """The two files; `normalises`: the recogniser's network takes bytes as they are."""

    detector: Path
    recogniser: Path

    @property
    def normalises(self) -> bool:
        """By the names of its first nodes, as InsightFace tells networks of MXNet from others."""
        with OnnxFile(self.recogniser) as onnx:
            names = [node.name for node in islice(onnx.nodes, 8)]
        return any(name.startswith(("Sub", "_minus")) for name in names) and any(
            name.startswith(("Mul", "_mul")) for name in names
        )


@dataclass(frozen=True, slots=True)
class Pack:
    """SHA-256 of a pack's archive, and of both files by their names in it."""

    archive: str
    detector: tuple[str, str]
    recogniser: tuple[str, str]


_SCRFD_10G = "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"
_SCRFD_2_5G = "041f73f47371333d1d17a6fee6c8ab4e6aecabefe398ff32cca4e2d5eaee0af9"
_SCRFD_500M = "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a"
_RESNET_50 = "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"
_RESNET_100 = "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"
_MOBILE = "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f"
PACKS: Mapping[str, Pack] = {
    "antelopev2": Pack(
        "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
        ("scrfd_10g_bnkps.onnx", _SCRFD_10G),
        ("glintr100.onnx", _RESNET_100),
    ),
    "buffalo_l": Pack(
        "80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
        ("det_10g.onnx", _SCRFD_10G),
        ("w600k_r50.onnx", _RESNET_50),
    ),
    "buffalo_m": Pack(
        "d98264bd8f2dc75cbc2ddce2a14e636e02bb857b3051c234b737bf3b614edca9",
        ("det_2.5g.onnx", _SCRFD_2_5G),
        ("w600k_r50.onnx", _RESNET_50),
    ),
    "buffalo_s": Pack(
        "d85a87f503f691807cd8bb97128bdf7a0660326cd9cd02657127fa978bab8b5e",
        ("det_500m.onnx", _SCRFD_500M),
        ("w600k_mbf.onnx", _MOBILE),
    ),
    "buffalo_sc": Pack(
        "57d31b56b6ffa911c8a73cfc1707c73cab76efe7f13b675a05223bf42de47c72",
        ("det_500m.onnx", _SCRFD_500M),
        ("w600k_mbf.onnx", _MOBILE),
    ),
}
"""InsightFace's packs by name. Their authors publish no hashes beside them; these are what several
projects, independently, found in the same archives."""

RELEASE = "https://github.com/deepinsight/insightface/releases/download/model-zoo/"
LARGEST_BYTES: Final = 500_000_000
"""Of an archive: the largest pack has 361 MB."""
_SECONDS_WITHOUT_DATA: Final = 60


def of_export(folder: Path, entries: Iterable[FileEntry]) -> FaceFiles:
    """The face model of the export `folder`, whose files the manifest names in `entries`.

    Raises `ExportIncomplete` for files that are not as named and for others beside them, and
    `WeightsError` where they are not a detector and a recogniser.
    """
    entries = list(entries)
    verify_files(folder, entries)
    named = [entry.path for entry in entries]
    for home in {str(PurePosixPath(name).parent) for name in named}:
        for unnamed in unnamed_files(folder, home, named):
            raise ExportIncomplete(
                f"{folder / unnamed} is not of the export: its manifest does not name it.",
                "Move it elsewhere, or export again with it.",
            )
    return _chosen(folder, sorted(name for name in named if name.endswith(".onnx")), named)


def of_folder(folder: Path) -> FaceFiles:
    """The one detector and the one recogniser in `folder`; other kinds of ONNX files are passed by.

    Raises `WeightsError` where there are none or several, or one is no ONNX file.
    """
    folder = _with_models(folder)
    return _chosen(folder, sorted(path.name for path in folder.glob("*.onnx")), ())


def of_pack(name: str, progress: Progress) -> FaceFiles:
    """The files of the pack `name`, downloaded where they are not there.

    Raises `WeightsError` when they cannot be downloaded or are not the pack's, `StorageError`.
    """
    pack, home = PACKS[name], Path("~/.insightface/models").expanduser() / name
    files = _in_pack(pack, home)
    if files is None:
        with storage_errors(home):
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home.parent / f".{name}.lock"):
                files = _in_pack(pack, home)  # another process may just have done it
                if files is None:
                    _download(name, pack, home, progress)
                    files = FaceFiles(home / pack.detector[0], home / pack.recogniser[0])
    for path, (_, sha256) in ((files.detector, pack.detector), (files.recogniser, pack.recogniser)):
        if sha256_file(path) != sha256:
            raise WeightsError(
                f"{path} is not {name}'s: its SHA-256 is another one.",
                "Delete it, and the pack is downloaded again.",
            )
    return files


def _in_pack(pack: Pack, home: Path) -> FaceFiles | None:
    folder = _with_models(home)
    files = FaceFiles(folder / pack.detector[0], folder / pack.recogniser[0])
    return files if files.detector.is_file() and files.recogniser.is_file() else None


def _with_models(folder: Path) -> Path:
    """`folder`, or the one inside it that has the models: the archive of antelopev2 holds a folder
    of its own, so that it lies one too deep where somebody unpacked it."""
    if any(folder.glob("*.onnx")):
        return folder
    inner = {path.parent for path in folder.glob("*/*.onnx") if path.parent.name != "__MACOSX"}
    return inner.pop() if len(inner) == 1 else folder


def _download(name: str, pack: Pack, home: Path, progress: Progress) -> None:
    """Put the pack's two files into folder `home`, each whole or not at all."""
    address = f"{RELEASE}{name}.zip"
    progress(f"Downloading {address}")
    # Without a name, so that nothing of it is left by a process that is killed.
    with tempfile.TemporaryFile(dir=home) as archive:
        try:
            with urllib.request.urlopen(address, timeout=_SECONDS_WITHOUT_DATA) as answer:
                found = _copy(answer, archive)
        except (http.client.HTTPException, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # the disk's, not the network's
            raise _not_downloaded(name, home, str(error)) from error
        if found != pack.archive:
            raise _not_downloaded(name, home, "the archive is cut, or not the one that is known")
        with zipfile.ZipFile(archive) as opened:
            for member, sha256 in (pack.detector, pack.recogniser):
                places = {member, f"{name}/{member}"}.intersection(opened.namelist())
                if len(places) != 1:
                    raise _not_downloaded(name, home, f"the archive has no {member}")
                with opened.open(places.pop()) as source, atomic_file(home / member) as target:
                    if _copy(source, target) != sha256:
                        raise _not_downloaded(name, home, f"its {member} is not the known one")


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy at most `LARGEST_BYTES` and return their SHA-256."""
    digest, left = hashlib.sha256(), LARGEST_BYTES
    while block := source.read(min(left, 1 << 20)):
        digest.update(block)
        target.write(block)
        left -= len(block)
    return digest.hexdigest()


def _not_downloaded(name: str, home: Path, why: str) -> WeightsError:
    return WeightsError(
        f"The face model {name} cannot be downloaded: {why.strip('<>. ')}.",
        f"Go online and try again, or unpack {RELEASE}{name}.zip into {home}.",
    )


def _chosen(folder: Path, graphs: Iterable[str], data: Iterable[str]) -> FaceFiles:
    """The detector and the recogniser among ONNX files of `folder`, which read only `data`."""
    found: dict[str, list[str]] = {"detector": [], "recogniser": []}
    try:
        for name in graphs:
            kind = _kind(folder / name)
            if kind is not None:
                check_references(folder, name, data)
                found[kind].append(name)
    except FastFaceError as error:
        raise WeightsError(
            f"The face model {folder} cannot be opened: {error.message}",
            "Put a detector and a recogniser, each in one ONNX file, into that folder.",
        ) from error
    for role, paths in found.items():
        if len(paths) != 1:
            names = " and ".join(PurePosixPath(path).name for path in paths)
            raise WeightsError(
                f"The face model {folder} has no {role}."
                if not paths
                else f"The face model {folder} has more than one {role}: {names}.",
                "A face model is one detector (SCRFD) and one recogniser, an ONNX model with a "
                "112×112 input and an embedding as its only output.",
            )
    return FaceFiles(folder / found["detector"][0], folder / found["recogniser"][0])


def _kind(path: Path) -> Literal["detector", "recogniser"] | None:
    """What an ONNX file is, by its inputs and outputs as InsightFace tells them apart."""
    with OnnxFile(path) as onnx:
        held: dict[int, list[memoryview]] = {
            GRAPH_INPUT: [],
            GRAPH_OUTPUT: [],
            GRAPH_INITIALIZER: [],
        }
        for field, value in onnx.fields(onnx.graph):
            if field in held and isinstance(value, memoryview):
                held[field].append(value)
        if len(held[GRAPH_OUTPUT]) >= 5:
            return "detector"
        weights = {_inside(onnx, one, 8).tobytes() for one in held[GRAPH_INITIALIZER]}
        # Files of the first versions of ONNX list weights among the inputs.
        inputs = [i for i in held[GRAPH_INPUT] if _inside(onnx, i, 1).tobytes() not in weights]
        if len(inputs) != 1:
            return None
        # Type, tensor, shape; then dimensions with their numbers.
        shape = [
            dict(onnx.fields(value)).get(1, 0)
            for field, value in onnx.fields(_inside(onnx, inputs[0], 2, 1, 2))
            if field == 1 and isinstance(value, memoryview)
        ]
    square = len(shape) == 4 and shape[2] == shape[3]
    side = shape[3] if square else 0
    # Of the packs' other files, landmarks take 192 pixels and attributes 96.
    fits = isinstance(side, int) and side >= 112 and side % 16 == 0 and side != 192
    return "recogniser" if fits else None


def _inside(onnx: OnnxFile, message: memoryview, *numbers: int) -> memoryview:
    """The field of a message that is reached by field numbers; empty where there is none."""
    for number in numbers:
        held = (value for field, value in onnx.fields(message) if field == number)
        message = next((value for value in held if isinstance(value, memoryview)), memoryview(b""))
    return message


def copy_models(model: Path, target: Path) -> None:
    """Copy the detector and the recogniser in folder `model` to the new folder `target`."""
    files = of_folder(model)
    target.mkdir()
    for path in (files.detector, files.recogniser):
        shutil.copyfile(path, target / path.name)
