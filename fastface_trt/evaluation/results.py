"""The files of a run: `run.json` (what), `results.jsonl` (one line per picture), pictures, faces.

A folder can be continued after a kill at any moment. `run.json` is there before the first result
and says what the run is; results are appended a batch at a time and flushed to the disk; a batch
of which a part is missing is dropped and made again, since how pictures share a batch may show in
the last bit of a picture.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from fastface_trt.engines.files import storage_errors, write_text_durably
from fastface_trt.engines.manifest import Strict, first_problem
from fastface_trt.errors import InvalidRequest
from fastface_trt.evaluation.judges import Column
from fastface_trt.runtime.picture_file import write_picture

RUN, RESULTS, FACES, PICTURES = "run.json", "results.jsonl", "faces", "pictures"
_FACE_SIDE = 512
_LOCK = ".lock"


class SettingRecord(Strict):
    """A setting as it ran; `request` are the fields of `GenerationRequest.to_dict`."""

    name: str
    axes: dict[str, Any]
    request: dict[str, Any]
    line: str | None = None
    baseline: str | None = None
    export: str
    checkpoint: str
    scheduler: str


class RunRecord(Strict):
    """What a run is. Everything but date, machine and versions must agree to continue it."""

    schema_version: Literal[1] = 1
    experiment: str
    title: str
    export: str
    backend: str
    checkpoint: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    judges: tuple[Column, ...]
    settings: tuple[SettingRecord, ...]
    pairs: int
    seed: int
    data: str
    data_sha256: str
    engines_sha256: str
    """Over the manifests of all exports that the settings run on."""
    batch: int
    max_rows: int
    keep: int


class PictureResult(Strict):
    """One finished picture; `seconds` is its share of its batch, without judging."""

    setting: str
    pair: int
    person: str
    prompt: str
    seed: int
    metrics: dict[str, float | None]
    unet_samples: int
    seconds: float
    picture: str | None


_MAY_DIFFER = {"date", "machine", "versions"}
_FINGERPRINTS = {"data_sha256": "set of people or prompts", "engines_sha256": "export"}


class RunFolder:
    """A run's folder, held by this process."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self.record = record
        self.finished: list[PictureResult] = []

    def start(self) -> None:
        """Write `run.json`, or read what an earlier run left; see the module docstring.

        Raises `InvalidRequest` when that was another run, `StorageError` for the disk.
        """
        file = self.path / RUN
        with storage_errors(self.path):
            if file.exists():
                self._must_agree(read_run(self.path))
                self.finished = self._whole_batches(read_results(self.path, torn=True))
                lines = [result.model_dump_json() + "\n" for result in self.finished]
                write_text_durably(self.path / RESULTS, "".join(lines))
                return
            if any(path.name != _LOCK for path in self.path.iterdir()):
                raise InvalidRequest(
                    f"{self.path} holds files but no {RUN}, so it is not a run's folder.",
                    "Choose a new or empty folder.",
                )
            write_text_durably(file, self.record.model_dump_json(indent=2) + "\n")

    def append(self, results: Sequence[PictureResult]) -> None:
        """Add a batch; when this returns it is on the disk. Raises `StorageError`."""
        text = "".join(result.model_dump_json() + "\n" for result in results)
        with storage_errors(self.path), open(self.path / RESULTS, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.finished.extend(results)

    def has(self, setting: str, pairs: Sequence[int]) -> bool:
        """Whether this batch is finished."""
        done = {result.pair for result in self.finished if result.setting == setting}
        return all(pair in done for pair in pairs)

    def write_picture(
        self, setting: str, pair: int, picture: NDArray[np.uint8], parameters: Mapping[str, Any]
    ) -> str:
        """Keep a picture; returns its path within the folder. Raises `StorageError`."""
        relative = Path(PICTURES) / setting / f"{pair:05d}.png"
        with storage_errors(self.path):
            (self.path / relative).parent.mkdir(parents=True, exist_ok=True)
        write_picture(self.path / relative, picture, parameters=parameters)
        return relative.as_posix()

    def read_picture(self, setting: str, pair: int) -> NDArray[np.uint8]:
        """A kept picture, RGB uint8 [H,W,3]; raises `InvalidRequest` when it is gone."""
        path = self.path / PICTURES / setting / f"{pair:05d}.png"
        try:
            return np.asarray(Image.open(path).convert("RGB"))
        except OSError as error:
            raise InvalidRequest(
                f"The kept picture {path} cannot be read: {error}.",
                "Start the run again in a new folder.",
            ) from None

    def write_faces(self, people: Mapping[str, NDArray[np.uint8]]) -> None:
        """The source pictures, at most 512 pixels on a side, for reports."""
        with storage_errors(self.path):
            (self.path / FACES).mkdir(exist_ok=True)
        for name, pixels in people.items():
            image = Image.fromarray(pixels)
            image.thumbnail((_FACE_SIDE, _FACE_SIDE))
            path = self.path / FACES / f"{name}.png"
            write_picture(path, np.asarray(image), parameters={}, ai_generated=False)

    def _must_agree(self, before: RunRecord) -> None:
        now, then = self.record.model_dump(mode="json"), before.model_dump(mode="json")
        for field in now:
            if field not in _MAY_DIFFER and now[field] != then[field]:
                plain = _is_short(now[field]) and field not in _FINGERPRINTS
                shown = f" ({then[field]!r}, now {now[field]!r})" if plain else ""
                what = _FINGERPRINTS.get(field, field.replace("_", " "))
                raise InvalidRequest(
                    f"{self.path} holds a run of {before.experiment} with another {what}{shown}.",
                    "Continue it with the same options, or choose another --out.",
                )

    def _whole_batches(self, results: Sequence[PictureResult]) -> list[PictureResult]:
        size = self.record.batch
        counts: dict[tuple[str, int], int] = {}
        for result in results:
            batch = (result.setting, result.pair // size)
            counts[batch] = counts.get(batch, 0) + 1
        return [
            result
            for result in results
            if counts[result.setting, result.pair // size]
            == min(size, self.record.pairs - result.pair // size * size)
        ]


@contextmanager
def held_folder(path: Path) -> Iterator[Path]:
    """`path`, made if need be, for one process at a time; raises `InvalidRequest` for a second."""
    with storage_errors(path):
        if path.exists() and not path.is_dir():
            raise InvalidRequest(f"{path} is a file, not a folder.", "Choose another --out.")
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InvalidRequest(
                f"Another process is running an evaluation in {path}.",
                "Wait for it, or choose another --out.",
            ) from None
    try:
        yield path
    finally:
        lock.release()


def read_run(folder: Path) -> RunRecord:
    """`run.json` of a folder; raises `InvalidRequest`."""
    file = folder / RUN
    try:
        return RunRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        place, problem = first_problem(error)
        raise InvalidRequest(
            f"{file} is not valid at {place or 'the top'}: {problem}.", "Run the experiment again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{folder} holds no run: {error}.", "Give the --out folder of fastface-trt evaluate."
        ) from None


def read_results(folder: Path, *, torn: bool = False) -> list[PictureResult]:
    """All results of a folder; `torn` allows a last line that a kill cut off, and drops it.

    Raises `InvalidRequest` naming the first line that is damaged.
    """
    file = folder / RESULTS
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    if torn:
        lines = lines[:-1]  # what follows the last line break is empty, or cut off
    results = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            results.append(PictureResult.model_validate_json(line))
        except ValidationError:
            if torn and number == len(lines):
                break
            raise InvalidRequest(
                f"{file} is damaged in line {number}.",
                "Take that line out, then run the experiment again: what is missing is made anew.",
            ) from None
    return results


def by_setting(results: Sequence[PictureResult], metric: str) -> dict[str, dict[int, float | None]]:
    """Values of one metric: setting → pair → value."""
    table: dict[str, dict[int, float | None]] = {}
    for result in results:
        table.setdefault(result.setting, {})[result.pair] = result.metrics.get(metric)
    return table


def _is_short(value: Any) -> bool:
    return len(json.dumps(value)) < 80


__all__ = [
    "PictureResult",
    "RunFolder",
    "RunRecord",
    "SettingRecord",
    "by_setting",
    "held_folder",
    "read_results",
    "read_run",
]
