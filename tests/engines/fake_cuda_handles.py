"""Streams, events, pools and graphs of the simulated driver, and what the real one documents."""

import inspect
import itertools
import re
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache


class Handle:
    """A stream, event, pool or executable graph."""

    numbers = itertools.count(0x1000)

    def __init__(self, kind):
        self.kind, self.number = kind, next(self.numbers)
        self.alive = True

    def __int__(self):
        return self.number

    def __repr__(self):
        return f"{self.kind}#{self.number}"


@dataclass(eq=False)
class FakeStream(Handle):
    queue: deque = field(default_factory=deque)
    submitted: int = 0
    done: int = 0
    recording: list | None = None
    recorder: int | None = None
    strict: bool = False
    broken: bool = False

    def __post_init__(self):
        Handle.__init__(self, "stream")

    __hash__ = object.__hash__


@lru_cache
def documented_values(real):
    """How many values the real function returns beside its code."""
    section = (
        inspect.cleandoc(real.__doc__).rpartition("Returns\n-------\n")[2].partition("\n\n")[0]
    )
    return len(re.findall(r"^\w+ : ", section, re.M))
