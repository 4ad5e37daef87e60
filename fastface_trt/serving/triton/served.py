"""The model behind `model.py`: Triton's requests on one side, a `Worker` on the other.

`execute` only reads the requests and returns: their answers go out from one thread as they are
ready, so the next of Triton's batches joins the UNet calls of those before it. `execute` waits
where as much is in work as the model may hold, and thereby the rest waits in Triton's own queue,
under its queue policy.
"""

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, TypeAlias

from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import Cancelled, InvalidRequest, Unavailable
from fastface_trt.runtime.face import Face
from fastface_trt.serving.triton.requests import Picture, read_pictures
from fastface_trt.serving.triton.responses import Responses
from fastface_trt.serving.work import Event, PictureDone, State, StepDone, Task, TaskFailed, Worker

POLL_SECONDS = 0.1
"""How often requests that wait are asked whether their client has gone; those that are in work are
asked after each step."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A request of Triton's until it is answered; touched by the answering thread only."""

    sender: Any
    pictures: Sequence[Picture]
    ids: tuple[str, ...]
    done: dict[str, PictureDone] = field(default_factory=dict)
    polled: float = 0.0


@dataclass(frozen=True, slots=True)
class _FaceFound:
    task_id: str
    future: "Future[Face]"


class _Stop:
    pass


_Message: TypeAlias = _Asked | _FaceFound | Event | _Stop


class ServedModel:
    """A worker as a Triton model; owns the worker and the thread that answers, until `close`.

    `capacity` is how many pictures may be in work, waiting in the worker included; at least
    Triton's `max_batch_size`.
    """

    def __init__(
        self,
        worker: Worker,
        manifest: ExportManifest,
        pb_utils: Any,
        *,
        capacity: int,
        decoupled: bool,
        drain_seconds: float = 30.0,
    ) -> None:
        self._worker, self._manifest, self._pb = worker, manifest, pb_utils
        self._decoupled, self._drain_seconds = decoupled, drain_seconds
        self._responses = Responses(pb_utils)
        self._numbers = itertools.count()
        self._room = threading.Semaphore(capacity)
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._waiting: dict[str, _Asked] = {}
        self._thread = threading.Thread(target=self._answer, name="fastface-triton")
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._worker.state is State.READY

    def execute(self, requests: Sequence[Any]) -> None:
        """Take Triton's requests; what is wrong with one is answered in that one."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                pictures = read_pictures(self._arrays(request), self._manifest)
                if self._decoupled and len(pictures) > 1:
                    raise InvalidRequest(
                        f"A request of a decoupled model asks for {len(pictures)} pictures.",
                        "Send one request for each.",
                    )
            except Exception as problem:  # of whatever kind: the others of the batch go on
                self._send(sender, self._responses.error(problem), self._responses.final)
                continue
            for _ in pictures:
                self._room.acquire()
            ids = tuple(f"triton-{next(self._numbers)}" for _ in pictures)
            self._inbox.put(_Asked(sender, pictures, ids))

    def close(self) -> None:
        """Finish what it has within `drain_seconds`, answer everything, free the worker."""
        self._worker.drain(self._drain_seconds)
        self._worker.close()  # what it still had ends with an error, which is answered below
        self._inbox.put(_Stop())
        self._thread.join()

    def _arrays(self, request: Any) -> dict[str, Any]:
        arrays = {}
        for tensor in request.inputs():
            if not tensor.is_cpu():
                raise InvalidRequest(
                    f"{tensor.name()} lies in GPU memory.",
                    "Leave FORCE_CPU_ONLY_INPUT_TENSORS at yes: faces are read on the CPU.",
                )
            arrays[tensor.name()] = tensor.as_numpy()
        return arrays

    # Everything below runs on the answering thread.

    def _answer(self) -> None:
        while True:
            try:
                message = self._inbox.get(timeout=POLL_SECONDS if self._waiting else None)
            except Empty:
                self._poll()
                continue
            if isinstance(message, _Stop):
                for asked in dict.fromkeys(self._waiting.values()):
                    self._fail(asked, Unavailable("The model was unloaded."))
                return
            self._handle(message)
            self._poll()

    def _handle(self, message: _Asked | _FaceFound | Event) -> None:
        if isinstance(message, _Asked):
            self._waiting.update(dict.fromkeys(message.ids, message))
            self._guarded(message, message.ids[0], message)
            return
        task_id = message.task_id if isinstance(message, _FaceFound) else message.id
        asked = self._waiting.get(task_id)
        if asked is not None:  # else its request was answered with another picture's error
            self._guarded(asked, task_id, message)

    def _guarded(self, asked: _Asked, task_id: str, message: _Asked | _FaceFound | Event) -> None:
        try:
            self._one(asked, task_id, message)
        except Exception as problem:  # ours: it must not take the answers of others with it
            if task_id in self._waiting:
                self._fail(asked, problem)

    def _one(self, asked: _Asked, task_id: str, message: _Asked | _FaceFound | Event) -> None:
        if isinstance(message, _Asked):
            self._start(asked)
        elif isinstance(message, _FaceFound):
            self._face_found(asked, message)
        elif isinstance(message, StepDone):
            if self._decoupled:
                self._send(asked.sender, self._responses.step(message))
            self._cancel_if_gone(asked)
        elif isinstance(message, PictureDone):
            asked.done[task_id] = message
            if len(asked.done) == len(asked.ids):
                self._finish(asked)
        elif isinstance(message, TaskFailed):
            self._fail(asked, message.error)

    def _start(self, asked: _Asked) -> None:
        for task_id, picture in zip(asked.ids, asked.pictures, strict=True):
            if task_id not in self._waiting:
                return  # the one before it was refused, and the request with it
            if isinstance(picture.face, Face):
                self._submit(task_id, picture, picture.face)
                continue
            future = self._worker.analyze(picture.face, picture.face_index)
            future.add_done_callback(partial(self._found, task_id))

    def _found(self, task_id: str, future: "Future[Face]") -> None:
        """Called on the thread that looks for faces."""
        self._inbox.put(_FaceFound(task_id, future))

    def _face_found(self, asked: _Asked, found: _FaceFound) -> None:
        if found.future.cancelled():
            raise Unavailable("The model is being unloaded.")
        picture = asked.pictures[asked.ids.index(found.task_id)]
        self._submit(found.task_id, picture, found.future.result())

    def _submit(self, task_id: str, picture: Picture, face: Face) -> None:
        task = Task(
            id=task_id,
            request=picture.request,
            face=face,
            channel_order=picture.channel_order,
            deadline=picture.deadline,
            previews=picture.previews and self._decoupled,
        )
        self._worker.submit(task, self._inbox.put)

    def _poll(self) -> None:
        for asked in dict.fromkeys(self._waiting.values()):
            if monotonic() - asked.polled >= POLL_SECONDS:
                self._cancel_if_gone(asked)

    def _cancel_if_gone(self, asked: _Asked) -> None:
        # The request itself is Triton's again since `execute` returned; its sender is still ours.
        asked.polled = monotonic()
        if asked.sender.is_cancelled():
            self._fail(asked, Cancelled("The client cancelled the request."))

    def _finish(self, asked: _Asked) -> None:
        done = [asked.done[task_id] for task_id in asked.ids]
        self._end(asked, self._responses.pictures(done))

    def _fail(self, asked: _Asked, problem: Exception) -> None:
        """Answer the whole request with an error, and stop what else it asked for."""
        unfinished = [task_id for task_id in asked.ids if task_id not in asked.done]
        self._end(asked, self._responses.error(problem))
        for task_id in unfinished:
            self._worker.cancel(task_id)

    def _end(self, asked: _Asked, response: Any) -> None:
        for task_id in asked.ids:
            self._waiting.pop(task_id, None)
            self._room.release()
        self._send(asked.sender, response, self._responses.final)

    def _send(self, sender: Any, response: Any, flags: int = 0) -> None:
        try:
            sender.send(response, flags=flags)
        except self._pb.TritonModelException as problem:
            # The way to this client is gone; the others still have theirs.
            self._pb.Logger.log_error(f"A response could not be sent: {problem}")
