"""A run of `evaluate` read back: what was asked, and what is finished so far.

The folder may still be growing, or its run may have been killed: a cut last line is left out, and
a picture that was made twice counts once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fastface_trt.errors import InvalidRequest
from fastface_trt.evaluation.intervals import Interval, paired_difference

SETTINGS_FILE, RESULTS_FILE = "run.json", "results.jsonl"
SCHEMA_VERSION = 1
_MEND = "Give the folder that `fastface-trt evaluate` wrote."


@dataclass(frozen=True, slots=True)
class Judge:
    """A metric of a run: its name in the results, and how to speak of it."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    what: str

    @property
    def axis_label(self) -> str:
        """Label with unit and direction, for an axis."""
        arrow = "↑" if self.higher_is_better else "↓"
        return f"{self.label} [{self.unit}] {arrow}" if self.unit else f"{self.label} {arrow}"


@dataclass(frozen=True, slots=True)
class SettingView:
    """One setting: its name, the values of what varies, and the fields of its request."""

    name: str
    axes: Mapping[str, Any]
    request: Mapping[str, Any]
    line: str


@dataclass(frozen=True, slots=True)
class PictureView:
    """One finished picture; `picture` is its file below the run's folder, None when not kept."""

    setting: str
    pair: int
    person: str
    prompt: str
    seed: int
    metrics: Mapping[str, float | None]
    unet_samples: int
    seconds: float
    picture: Path | None


@dataclass(frozen=True)
class RunView:
    """Settings, judges and finished pictures of a run, by setting and pair."""

    folder: Path
    about: Mapping[str, Any]
    judges: tuple[Judge, ...]
    settings: tuple[SettingView, ...]
    results: Mapping[str, Mapping[int, PictureView]]

    @property
    def title(self) -> str:
        """What the run is called."""
        return str(self.about.get("title") or self.about.get("experiment") or "Evaluation")

    @property
    def pairs(self) -> int:
        """How many pairs each setting is meant to have."""
        return int(self.about.get("pairs") or max(map(len, self.results.values()), default=0))

    @cached_property
    def baseline(self) -> SettingView | None:
        """The setting that others are compared with, None in a run without pictures.

        The one that the run names, else the one called plain or baseline, else the preset plain at
        λ = 0.8, else at any λ, else the first.
        """
        done = [setting for setting in self.settings if self.results[setting.name]]
        given = [s for s in done if s.name == self.about.get("baseline")]
        named = given + [s for s in done if s.name.lower() in ("plain", "baseline")]
        plain = [s for s in done if s.axes.get("preset") == "plain"]
        usual = [s for s in plain if s.axes.get("ip_adapter_scale", 0.8) == 0.8]
        return next(iter(named + usual + plain + done), None)

    def judge(self, name: str) -> Judge | None:
        """The judge of that name, None where the run has none."""
        return next((judge for judge in self.judges if judge.name == name), None)

    def values(self, setting: str, judge: str) -> dict[int, float]:
        """A metric of one setting by pair, without the pictures that have none."""
        found = {pair: result.metrics.get(judge) for pair, result in self.results[setting].items()}
        return {pair: float(value) for pair, value in found.items() if value is not None}

    def mean(self, setting: str, judge: str) -> Interval:
        """Mean of a metric over the pairs that have it."""
        return Interval.of(list(self.values(setting, judge).values()))

    def difference(self, setting: str, baseline: str, judge: str) -> Interval:
        """Mean paired difference of a metric to a baseline."""
        return paired_difference(self.values(setting, judge), self.values(baseline, judge))

    def has(self, judge: str) -> bool:
        """Whether any picture has a value of that judge."""
        return any(self.values(setting.name, judge) for setting in self.settings)

    def face(self, person: str) -> Path | None:
        """The source picture of a person, None where it is not in the folder."""
        path = _inside(self.folder, f"faces/{person}.png")
        return path if path is not None and path.is_file() else None


def read_view(folder: Path) -> RunView:
    """Read a run's folder; raise `InvalidRequest` for one that is none, or of another version."""
    about = _read_about(folder / SETTINGS_FILE)
    try:
        judges = tuple(
            Judge(
                name=str(one["name"]),
                label=str(one.get("label") or one["name"]),
                unit=str(one.get("unit") or ""),
                higher_is_better=bool(one.get("higher_is_better", True)),
                what=str(one.get("what") or ""),
            )
            for one in about.get("judges", ())
        )
        settings = tuple(
            SettingView(
                name=str(one["name"]),
                axes=dict(one.get("axes") or {}),
                request=dict(one.get("request") or {}),
                line=str(one.get("line") or ""),
            )
            for one in about.get("settings", ())
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidRequest(
            f"{folder / SETTINGS_FILE} does not describe a run: {error}.", _MEND
        ) from None
    results: dict[str, dict[int, PictureView]] = {setting.name: {} for setting in settings}
    for result in _read_results(folder):
        if result.setting in results:
            results[result.setting][result.pair] = result
    ordered = {name: dict(sorted(found.items())) for name, found in results.items()}
    return RunView(folder, about, judges, settings, ordered)


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.", _MEND) from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}.", _MEND) from None
    version = about.get("schema_version") if isinstance(about, dict) else None
    if version != SCHEMA_VERSION:
        raise InvalidRequest(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}.",
            "Run the evaluation again with this version.",
        )
    return dict(about)


def _read_results(folder: Path) -> list[PictureView]:
    path = folder / RESULTS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_result(folder, json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                continue  # a run that was killed while it wrote
            raise InvalidRequest(
                f"Line {number} of {path} is no result: {error!r}.",
                "Remove that line; `fastface-trt evaluate` makes its picture again.",
            ) from None
    return found


def _result(folder: Path, one: Mapping[str, Any]) -> PictureView:
    picture = one.get("picture")
    path = _inside(folder, picture) if picture else None
    return PictureView(
        setting=str(one["setting"]),
        pair=int(one["pair"]),
        person=str(one.get("person", "")),
        prompt=str(one.get("prompt", "")),
        seed=int(one.get("seed", 0)),
        metrics=dict(one["metrics"]),
        unet_samples=int(one.get("unet_samples", 0)),
        seconds=float(one.get("seconds", 0)),
        picture=path if path is not None and path.is_file() else None,
    )


def _inside(folder: Path, name: str) -> Path | None:
    """`folder`/`name`, None for a name that leads out of the folder."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return None
    return folder / relative
