"""The interface of judges: a column of numbers, one per picture, with its meaning in words.

Judges that look at the same thing (the face of a picture, its CLIP embedding) share it through a
`Sample`, which remembers what was found, so that no network runs twice on one picture.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.manifest import Strict
from fastface_trt.errors import UnknownName
from fastface_trt.evaluation.data import Dataset, Pair

Value = TypeVar("Value")


class Column(Strict):
    """What a judge's numbers are, for tables and axes."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    what: str


class Sample:
    """One generated picture before the judges: RGB uint8 [H,W,3], and the pair it was made for."""

    def __init__(self, picture: NDArray[np.uint8], pair: Pair) -> None:
        self.picture = picture
        self.pair = pair
        self._known: dict[object, Any] = {}

    def once(self, key: object, compute: Callable[["Sample"], Value]) -> Value:
        """`compute(self)`, computed at the first call with this `key`."""
        if key not in self._known:
            self._known[key] = compute(self)
        return cast(Value, self._known[key])


class Judge(ABC):
    """One metric. `load` opens what it needs and looks at the source pictures, once per run."""

    column: Column

    @abstractmethod
    def load(self, data: Dataset) -> None:
        """Open networks; raises `MissingDependency`, `WeightsError`, `LicenceNotAcknowledged`."""

    @abstractmethod
    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample in order; None where the picture has nothing to judge."""


def choose_judges(known: Mapping[str, Value], names: Sequence[str] | None) -> list[Value]:
    """What `names` name, in the order of `known`, None: all; raises `UnknownName`."""
    for name in names or ():
        if name not in known:
            raise UnknownName("judge", name, known)
    return [judge for name, judge in known.items() if names is None or name in names]
