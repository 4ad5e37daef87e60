"""Finding faces on a thread of its own, beside the engines' work."""

import logging
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from fastface_trt.errors import Busy, EngineFailed, FastFaceError, Unavailable
from fastface_trt.pipeline import FastFace
from fastface_trt.runtime.face import Face
from fastface_trt.serving.work import Pixels

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    pixels: Pixels
    index: int | None
    future: Future[Face]


class FaceAnalysis:
    """One thread that analyses one picture at a time; at most `max_waiting` pictures wait."""

    def __init__(self, fastface: FastFace, max_waiting: int) -> None:
        self._fastface = fastface
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._asked: deque[_Asked] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="face-analysis", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, pixels: Pixels, index: int | None) -> Future[Face]:
        """The face of a picture, later; the future raises `Busy` where too many wait already."""
        asked = _Asked(pixels, index, Future())
        with self._changed:
            error: FastFaceError | None = None
            if self._closed:
                error = Unavailable("This worker takes no more pictures.", "Try another.")
            elif len(self._asked) >= self._max_waiting:
                error = Busy("Too many pictures wait for face analysis.", "Try again soon.")
            if error is None:
                self._asked.append(asked)
                self._changed.notify()
        if error is not None:
            asked.future.set_exception(error)
        return asked.future

    def close(self) -> None:
        """Finish the picture at hand and refuse the others with `Unavailable`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _serve(self) -> None:
        while (asked := self._next()) is not None:
            if asked.future.set_running_or_notify_cancel():
                self._analyze(asked)
        for left in self._asked:
            if left.future.set_running_or_notify_cancel():
                left.future.set_exception(Unavailable("This worker was closed.", "Try another."))
        self._asked.clear()

    def _next(self) -> _Asked | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._asked)
            return None if self._closed else self._asked.popleft()

    def _analyze(self, asked: _Asked) -> None:
        try:
            face = self._fastface.analyze(asked.pixels, index=asked.index)
        except FastFaceError as error:
            asked.future.set_exception(error)
        except Exception:
            _log.exception("Face analysis failed.")
            asked.future.set_exception(
                EngineFailed("The face could not be analysed.", "Try another picture.")
            )
        else:
            asked.future.set_result(face)
