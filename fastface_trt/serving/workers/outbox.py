"""A connection that is written to without waiting: whoever sends never blocks on a slow reader."""

import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


class Outbox:
    """Messages for the other end of a connection, pickled and written by a thread of its own.

    Nothing is lost while both ends live; when the other end has gone, what is left is dropped.
    """

    def __init__(self, connection: "Connection[Any, Any]", name: str) -> None:
        self._connection = connection
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=name, daemon=True)
        self._thread.start()

    def put(self, message: object) -> None:
        """Queue a message; messages arrive in the order of these calls."""
        self._messages.put(message)

    def close(self, seconds: float) -> None:
        """Write what is left, for at most this long."""
        self._messages.put(None)
        self._thread.join(timeout=seconds)

    def _write(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:  # the reader sees the end of the connection and tells everybody
                return
