"""A worker's process: a `Batcher` behind a pipe.

Why a process: a crash in an engine, or the system's out-of-memory killer, takes only this worker
with it; the pool gives its tasks to another and starts a new one. The same where its engines fail
for good, as those of a GPU do after some errors: it leaves, and its tasks are made elsewhere. It
ends with the server, whatever its engines do at that moment, so a killed server leaves nothing
behind.
"""

import logging
import os
import signal
import sys
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from fastface_trt.engines.children import leave_with_parent
from fastface_trt.engines.device import DeviceLost
from fastface_trt.engines.engine import Closing
from fastface_trt.errors import EngineFailed, FastFaceError
from fastface_trt.measure.memory import give_memory_back
from fastface_trt.runtime.face import Face
from fastface_trt.serving.batching.opening import open_batcher
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import TaskFailed
from fastface_trt.serving.workers.messages import (
    DEAD_ENGINES,
    Analyze,
    Analyzed,
    CallRecord,
    Cancel,
    Close,
    Forget,
    Open,
    OpenFailed,
    Outbox,
    Report,
    Submit,
)

_SECONDS_BETWEEN_REPORTS = 0.1
_LARGE_PICTURE = 12_000_000
"""Bytes of a picture whose analysis leaves so much freed memory behind that it goes back."""

log = logging.getLogger(__name__)


class _Child(Closing):
    """Answers the pool's messages until it is told to leave."""

    def __init__(
        self, connection: "Connection[Any, Any]", settings: WorkerSettings, record: CallRecord
    ) -> None:
        self._connection = connection
        self._outbox = Outbox(connection, "worker outbox")
        self._left = threading.Event()
        self._opened = False
        self._batcher = open_batcher(settings, on_call=record.write, on_dead=self._die)
        self._opened = True
        self._reports = threading.Thread(target=self._report, name="worker reports", daemon=True)
        self._reports.start()

    def answer(self) -> None:
        """Read messages until `Close` or the end of the pipe."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                return
            match message:
                case Submit(task, alone):
                    try:
                        self._batcher.submit(task, self._outbox.put, alone=alone)
                    except FastFaceError as error:
                        self._outbox.put(TaskFailed(task.id, error))
                case Cancel(task_id):
                    self._batcher.cancel(task_id)
                case Analyze(key, pixels, index):
                    self._analyze(key, pixels, index)
                case Forget():
                    self._batcher.forget()
                case Close():
                    return

    def _analyze(self, key: int, pixels: Any, index: int | None) -> None:
        def answer(future: "Future[Face]") -> None:
            error = future.exception()
            if error is None:
                self._outbox.put(Analyzed(key, future.result()))
            elif isinstance(error, FastFaceError):
                self._outbox.put(Analyzed(key, error))
            else:
                log.error("The analysis of a face failed.", exc_info=error)
                self._outbox.put(
                    Analyzed(key, EngineFailed("The analysis of the face failed.", "Try again."))
                )
            if pixels.nbytes > _LARGE_PICTURE:
                give_memory_back()

        self._batcher.analyze(pixels, index).add_done_callback(answer)

    def _report(self) -> None:
        while not self._left.wait(_SECONDS_BETWEEN_REPORTS):
            self._outbox.put(Report(self._batcher.state, self._batcher.load()))

    def _die(self, error: FastFaceError) -> None:
        """Leave before any task ends for it: whoever comes next makes them again."""
        if self._opened:
            self._outbox.close(5)
            os._exit(DEAD_ENGINES)  # engines that failed for good may not close either

    def close(self) -> None:
        """End what is left with `Unavailable` and free the engines."""
        self._left.set()
        self._batcher.close()
        self._outbox.close(5)


def main() -> None:
    """Talk to the pool over the first descriptor of the command line; the second is the record."""
    leave_with_parent(int(sys.argv[1]))
    # The server decides when its workers leave, whoever else is sent these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        message = connection.recv()
    except EOFError:
        return
    assert isinstance(message, Open)
    try:
        child = _Child(connection, message.settings, CallRecord(int(sys.argv[2])))
    except DeviceLost:
        sys.exit(DEAD_ENGINES)  # another process may have more luck
    except FastFaceError as error:
        connection.send(OpenFailed(error))
        return
    with child:
        child.answer()


if __name__ == "__main__":
    main()
