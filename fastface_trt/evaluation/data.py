"""People, prompts and their pairs: what every setting of an experiment is run on.

Read from a folder in DiverseFaces' layout, or from an OmniContext-like JSON file. The same pairs
with the same noise serve every setting, so that settings are compared pair by pair.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import BadPicture, InvalidRequest
from fastface_trt.mini.prompts import Scene
from fastface_trt.runtime.images import load_picture

SEED = 20_260_000
"""Of the choice of pairs; pair n has noise of seed SEED + n."""

PromptSet = Literal["all", "nostyle", "style"]
_PHOTOS, _SUFFIXES = "id_photos", (".png", ".jpg", ".jpeg", ".webp")
_PROMPT_FILES: Mapping[str, str] = {
    "nostyle": "prompts_nostyle.txt",
    "style": "prompts_style.txt",
}


@dataclass(frozen=True)
class Pair:
    """One person in one prompt with its noise; `scene` is the prompt's meaning where it is known.

    `index` numbers the pairs of a run from 0.
    """

    index: int
    person: str
    prompt: str
    seed: int
    scene: Scene | None = None


@dataclass(frozen=True)
class Dataset:
    """Source pictures by person, RGB uint8 [H,W,3], and the pairs to make."""

    name: str
    people: Mapping[str, NDArray[np.uint8]]
    pairs: Sequence[Pair]
    files: Mapping[str, str]
    """What a person's picture is called in messages."""

    def fingerprint(self) -> str:
        """SHA-256 over people, pictures and pairs: two runs with the same one may be joined."""
        digest = hashlib.sha256()
        for name in sorted(self.people):
            picture = self.people[name]
            digest.update(f"{name}:{picture.shape}:".encode() + picture.tobytes())
        for pair in self.pairs:
            digest.update(repr((pair.index, pair.person, pair.prompt, pair.seed)).encode())
        return digest.hexdigest()


def load_dataset(source: Path, count: int | None, prompts: PromptSet = "all") -> Dataset:
    """The data of a folder or a JSON file: all its pairs, or `count` of them, sampled evenly.

    Raises `BadPicture` for a picture that cannot be used and `InvalidRequest` for anything else,
    naming the file.
    """
    if source.is_dir():
        return _diverse_faces(source, count, prompts)
    if source.is_file():
        return _omni_context(source, count)
    raise InvalidRequest(
        f"There is no data at {source}.",
        f"Give a folder with {_PHOTOS}/ and {_PROMPT_FILES['nostyle']}, a JSON file, or mini.",
    )


def sample_product(people: int, prompts: int, count: int | None) -> list[tuple[int, int]]:
    """`count` of all (person, prompt) pairs, each at most once; None: all of them.

    Both are shuffled once, then pair n is person n mod P with prompt (n + ⌊n / lcm(P, Q)⌋) mod Q.
    This visits every pair exactly once, and among the first n all people and all prompts occur
    equally often, but for one.
    """
    total = people * prompts
    count = total if count is None else count
    if not 1 <= count <= total:
        raise InvalidRequest(
            f"{count} pairs were asked for, and {people} people with {prompts} prompts make "
            f"{total}.",
            f"Ask for 1 to {total}.",
        )
    rng = np.random.default_rng(SEED)
    person_order, prompt_order = rng.permutation(people), rng.permutation(prompts)
    period = lcm(people, prompts)
    return [
        (int(person_order[n % people]), int(prompt_order[(n + n // period) % prompts]))
        for n in range(count)
    ]


def sample_listed(people: Sequence[str], count: int | None) -> list[int]:
    """Indices of `count` of the pairs whose people are listed: people take turns."""
    count = len(people) if count is None else count
    if not 1 <= count <= len(people):
        raise InvalidRequest(
            f"{count} pairs were asked for, and the data has {len(people)}.",
            f"Ask for 1 to {len(people)}.",
        )
    order = np.random.default_rng(SEED).permutation(len(people))
    seen: dict[str, int] = {}
    turns: list[tuple[int, int, int]] = []
    for index in order:
        turn = seen[people[index]] = seen.get(people[index], -1) + 1
        turns.append((turn, len(turns), int(index)))
    return [index for _, _, index in sorted(turns)[:count]]


def _diverse_faces(folder: Path, count: int | None, prompts: PromptSet) -> Dataset:
    photos = sorted(
        path
        for path in (folder / _PHOTOS).glob("*")
        if path.suffix.lower() in _SUFFIXES and path.is_file()
    )
    if not photos:
        raise InvalidRequest(
            f"{folder / _PHOTOS} holds no pictures.",
            f"Put one picture per person there ({', '.join(_SUFFIXES)}).",
        )
    names = [path.stem for path in photos]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(
                f"{folder / _PHOTOS} has two pictures called {name}.", "Rename one of them."
            )
    wanted = _PROMPT_FILES if prompts == "all" else {prompts: _PROMPT_FILES[prompts]}
    texts = [
        line
        for file in wanted.values()
        if prompts != "all" or (folder / file).exists()
        for line in _read_lines(folder / file)
    ]
    if not texts:
        raise InvalidRequest(
            f"{folder} has neither {' nor '.join(wanted.values())} with a prompt in it.",
            "Write one prompt a line into one of them.",
        )
    chosen = sample_product(len(photos), len(texts), count)
    pairs = [
        Pair(index, names[person], texts[prompt], SEED + index)
        for index, (person, prompt) in enumerate(chosen)
    ]
    return _with_pictures(folder.name, pairs, dict(zip(names, photos, strict=True)))


def _read_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"The prompts {file} cannot be read: {error}.", "Write one prompt a line, in UTF-8."
        ) from None
    return [line.strip() for line in lines if line.strip()]


def _omni_context(file: Path, count: int | None) -> Dataset:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidRequest(f"{file} cannot be read: {error}.", "Give a JSON list.") from None
    if not isinstance(entries, list):
        raise InvalidRequest(f"{file} is not a JSON list.", "Give a list of tasks.")
    tasks = [_task(file, number, entry) for number, entry in enumerate(entries)]
    single = [task for task in tasks if task is not None]
    if not single:
        raise InvalidRequest(
            f"None of the {len(entries)} tasks of {file} is of one character with one picture.",
            'Their task_type names "single" and "character", e.g. single_character.',
        )
    files: dict[str, Path] = {}
    people = []
    for picture, _ in single:
        known = next((name for name, path in files.items() if path == picture), None)
        name = known or _free_name(picture.stem, files)
        files[name] = picture
        people.append(name)
    chosen = sample_listed(people, count)
    pairs = [
        Pair(index, people[task], single[task][1], SEED + index)
        for index, task in enumerate(chosen)
    ]
    return _with_pictures(file.stem, pairs, files)


def _task(file: Path, number: int, entry: Any) -> tuple[Path, str] | None:
    """Picture and prompt of a task with a single character; None for the other tasks."""
    values: dict[str, Any] = entry if isinstance(entry, dict) else {}
    prompt = values.get("prompt", values.get("instruction"))
    pictures = values.get("input_images")
    if (
        not isinstance(prompt, str)
        or not prompt.strip()
        or not isinstance(pictures, list)
        or not all(isinstance(picture, str) for picture in pictures)
    ):
        raise InvalidRequest(
            f"Task {number} of {file} is not a task.",
            'A task is {"prompt" or "instruction": text, "input_images": [paths], '
            '"task_type": text}.',
        )
    kind = str(values.get("task_type", "single_character")).lower()
    if "single" not in kind or "character" not in kind or len(pictures) != 1:
        return None
    return (file.parent / pictures[0]).resolve(), prompt.strip()


def _free_name(stem: str, taken: Mapping[str, Path]) -> str:
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def _with_pictures(name: str, pairs: Sequence[Pair], files: Mapping[str, Path]) -> Dataset:
    people: dict[str, NDArray[np.uint8]] = {}
    for person in dict.fromkeys(pair.person for pair in pairs):
        people[person] = load_picture(files[person])
    if len(people) == 0:
        raise BadPicture(f"{name} has no pictures.", "Add pictures of people.")
    return Dataset(name, people, pairs, {person: str(files[person]) for person in people})
