"""What a build shows: nested bars on a terminal, lines elsewhere, and a JSON log for machines."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastface_trt.engines.files import storage_errors
from fastface_trt.engines.tensorrt.plan import Event

_INDENT = "  "
_DEEPEST = 3
"""Phases below this depth come by the thousand and last milliseconds."""


class BuildDisplay:
    """Takes a builder's events, one module after the other.

    The bar of a module follows the clock against the time that an earlier build took, where there
    was one: phases say what happens now, but not how long the rest will take.
    """

    def __init__(self, bars: Progress | None, log: TextIO | None) -> None:
        self._bars = bars
        self._log = log
        self._module: TaskID | None = None
        self._phases: dict[str, tuple[TaskID, int]] = {}

    def start_module(self, name: str, expected_seconds: float | None) -> None:
        """Begin the bar of a module; `expected_seconds` comes from an earlier build."""
        self.event({"module": name, "event": "start", "expected_seconds": expected_seconds})
        if self._bars is not None:
            self._module = self._bars.add_task(name, total=expected_seconds)

    def end_module(self, name: str, facts: dict[str, Any]) -> None:
        """Take the module's bars away and log how it went."""
        self.event({"module": name, "event": "finished", **facts})
        if self._bars is not None and self._module is not None:
            for task, _ in self._phases.values():
                self._bars.remove_task(task)
            self._bars.remove_task(self._module)
        self._phases.clear()

    def event(self, event: Event) -> None:
        """One event of a builder, in the order in which they come."""
        if self._log is not None:
            self._log.write(json.dumps({"time": round(time(), 3), **event}) + "\n")
            self._log.flush()
        if self._bars is None:
            return
        kind, name = event["event"], event.get("name", "")
        if kind == "phase":
            self._start_phase(name, event["parent"], event["steps"])
        elif kind == "step" and name in self._phases:
            self._bars.update(self._phases[name][0], completed=event["step"])
        elif kind == "end" and name in self._phases:
            self._bars.remove_task(self._phases.pop(name)[0])
        self._advance_module()

    def _advance_module(self) -> None:
        """Move the module's bar to where the clock is; the last hundredth is for the end itself."""
        assert self._bars is not None
        task = next((task for task in self._bars.tasks if task.id == self._module), None)
        if task is not None and task.total:
            done = min(task.elapsed or 0.0, 0.99 * task.total)
            self._bars.update(task.id, completed=done)

    def _start_phase(self, name: str, parent: str, steps: int) -> None:
        assert self._bars is not None
        depth = self._phases[parent][1] + 1 if parent in self._phases else 1
        if depth <= _DEEPEST and name not in self._phases:
            task = self._bars.add_task(_INDENT * depth + name, total=steps or None)
            self._phases[name] = (task, depth)


@contextmanager
def build_display(screen: Console, log: Path | None) -> Iterator[BuildDisplay]:
    """A display on `screen` that logs to file `log`, one JSON object per line.

    Raises `StorageError` when the log cannot be written.
    """
    with ExitStack() as stack:
        file: TextIO | None = None
        if log is not None:
            with storage_errors(log.parent):
                log.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(log, "w", encoding="utf-8"))
        bars: Progress | None = None
        if screen.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            bars = stack.enter_context(Progress(*columns, console=screen, transient=True))
        yield BuildDisplay(bars, file)
