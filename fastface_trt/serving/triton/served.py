"""The model behind `model.py`: Triton's requests on one side, a `Worker` on the other.

`execute` only reads the requests and returns: their answers go out from one thread as they are
ready, so the next of Triton's batches joins the UNet calls of those before it. `execute` waits
where as much is in work as the model may hold, and thereby the rest waits in Triton's own queue,
under its queue policy.

In the order of a request's life: `read_pictures` copies what its tensors ask for, since Triton
takes their memory back when `execute` returns; `ServedModel` has its pictures made; `Responses`
turns pictures, steps and errors into objects of Triton's `pb_utils`.

Shape legend: B pictures of one request, H × W pixels.
"""

import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastface_trt.engines.manifest import ExportManifest, first_problem
from fastface_trt.errors import Cancelled, FastFaceError, InvalidRequest, Unavailable
from fastface_trt.runtime.face import ChannelOrder, Face
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.request import GenerationRequest, parse_request
from fastface_trt.serving.triton import tensors
from fastface_trt.serving.work import (
    Event,
    PictureDone,
    Pixels,
    State,
    StepDone,
    Task,
    TaskFailed,
    Worker,
)

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""Inputs by name, each [B, …] as `tensors.INPUTS` says."""
CODES = {
    "invalid_request": "INVALID_ARG",
    "unknown_name": "INVALID_ARG",
    "bad_picture": "INVALID_ARG",
    "no_face_found": "INVALID_ARG",
    "face_index_out_of_range": "INVALID_ARG",
    "busy": "UNAVAILABLE",
    "unavailable": "UNAVAILABLE",
    "deadline_passed": "UNAVAILABLE",
    "cancelled": "CANCELLED",
}
"""Triton's error code by ours, for what a client may be told; the rest is INTERNAL and generic."""
GENERIC = "The picture could not be made; the server's log says why."
POLL_SECONDS = 0.1
"""How often requests that wait are asked whether their client has gone; those that are in work are
asked after each step."""


class Parameters(BaseModel):
    """The JSON of PARAMETERS; what is not named here is for `parse_request`.

    deadline: seconds from now. face_index: which face, largest first. previews: small pictures with
    every step, of a decoupled model.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    face_index: int | None = Field(default=None, ge=0)
    channel_order: ChannelOrder = "bgr"
    deadline: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    previews: bool = False


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """One picture that is asked for; `face` is pixels where it must be found first.

    `deadline` is in seconds of `time.monotonic`.
    """

    request: GenerationRequest
    face: Face | Pixels
    face_index: int | None
    channel_order: ChannelOrder
    deadline: float | None
    previews: bool


def read_pictures(
    arrays: Arrays, manifest: ExportManifest, *, max_pixels: int = 40_000_000
) -> list[PictureRequest]:
    """The B pictures of a request.

    Raises `InvalidRequest`, `UnknownName` and `BadPicture`.
    """
    if tensors.PROMPT not in arrays:
        raise InvalidRequest("The input PROMPT is missing.", "Send BYTES of shape [B,1].")
    count = len(arrays[tensors.PROMPT])
    for name, array in arrays.items():
        if len(array) != count:
            raise InvalidRequest(
                f"{name} has a batch of {len(array)} and PROMPT one of {count}.",
                "All inputs need the same first dimension.",
            )
    faces = _faces(arrays, manifest, max_pixels)
    pictures = [_picture(arrays, row, faces[row], manifest) for row in range(count)]
    if len({(one.request.height, one.request.width) for one in pictures}) > 1:
        raise InvalidRequest(
            "The pictures of one request have different sizes, and IMAGE is one tensor.",
            "Send one request for each size.",
        )
    return pictures


def _picture(
    arrays: Arrays, row: int, face: Face | Pixels, manifest: ExportManifest
) -> PictureRequest:
    asked = _asked(arrays, row)
    values = dict(asked.model_extra or {})
    if "prompt" in values:
        raise InvalidRequest("PARAMETERS holds a prompt.", "Send it as PROMPT.")
    if tensors.SEED in arrays:
        if "seed" in values:
            raise InvalidRequest("The seed is given twice.", "Send SEED or seed in PARAMETERS.")
        values["seed"] = int(arrays[tensors.SEED][row].item())
    values["prompt"] = _string(arrays, tensors.PROMPT, row)
    return PictureRequest(
        request=parse_request(values, manifest, spelling={"prompt": tensors.PROMPT}),
        face=face,
        face_index=asked.face_index,
        channel_order=asked.channel_order,
        deadline=None if asked.deadline is None else monotonic() + asked.deadline,
        previews=asked.previews,
    )


def _asked(arrays: Arrays, row: int) -> Parameters:
    if tensors.PARAMETERS not in arrays:
        return Parameters()
    text = _string(arrays, tensors.PARAMETERS, row)
    try:
        values = json.loads(text or "{}")
        if not isinstance(values, dict):
            raise InvalidRequest("PARAMETERS is not a JSON object.", 'Send e.g. {"steps": 4}.')
        return Parameters.model_validate(values)
    except ValidationError as error:
        where, problem = first_problem(error)
        raise InvalidRequest(f"PARAMETERS is not valid at {where}: {problem}.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"PARAMETERS is not JSON: {error}.", 'Send e.g. {"steps": 4}.'
        ) from None


def _string(arrays: Arrays, name: str, row: int) -> str:
    value = arrays[name][row].item()
    try:
        return value if isinstance(value, str) else bytes(value).decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} is not UTF-8.", "Encode the text as UTF-8.") from None


def _faces(arrays: Arrays, manifest: ExportManifest, max_pixels: int) -> Sequence[Face | Pixels]:
    given = [
        name for name in (tensors.FACE, tensors.FACE_FILE, tensors.FACE_EMBEDDING) if name in arrays
    ]
    if len(given) != 1:
        raise InvalidRequest(
            f"The request gives {' and '.join(given) or 'no face'}.",
            "Send exactly one of FACE, FACE_FILE and FACE_EMBEDDING.",
        )
    if (tensors.FACE_CROP_BGR in arrays) != (given[0] == tensors.FACE_EMBEDDING):
        raise InvalidRequest("FACE_EMBEDDING and FACE_CROP_BGR go together.", "Send both.")
    if given[0] == tensors.FACE_EMBEDDING:
        return _analysed(arrays, manifest)
    if given[0] == tensors.FACE:
        return [load_picture(pixels, max_pixels=max_pixels) for pixels in arrays[tensors.FACE]]
    return [
        load_picture(bytes(data.item()), max_pixels=max_pixels)
        for data in arrays[tensors.FACE_FILE]
    ]


def _analysed(arrays: Arrays, manifest: ExportManifest) -> list[Face]:
    if manifest.adapter_kind == "pulid":
        raise InvalidRequest(
            "PuLID looks at more of the face than an embedding and a crop.",
            "Send FACE or FACE_FILE.",
        )
    faces = []
    for embedding, crop in zip(
        arrays[tensors.FACE_EMBEDDING], arrays[tensors.FACE_CROP_BGR], strict=True
    ):
        norm = float(np.linalg.norm(embedding))
        if not np.isfinite(norm) or norm < 1e-6:
            raise InvalidRequest(
                "FACE_EMBEDDING is zero or not finite.", "Send InsightFace's embedding."
            )
        faces.append(
            Face(
                embedding=(embedding / norm).astype(np.float32),
                embedding_norm=norm,
                crop_bgr=np.array(crop),
                box=(0.0, 0.0, float(tensors.CROP_SIDE), float(tensors.CROP_SIDE)),
                score=1.0,
                index=0,
                count=1,
                detector_size=tensors.CROP_SIDE,
            )
        )
    return faces


@dataclass(slots=True, eq=False)
class _PendingRequest:
    """A request of Triton's until it is answered; touched by the answering thread only."""

    sender: Any
    pictures: Sequence[PictureRequest]
    ids: tuple[str, ...]
    done: dict[str, PictureDone] = field(default_factory=dict)
    polled: float = 0.0


@dataclass(frozen=True, slots=True)
class _FaceFound:
    task_id: str
    future: "Future[Face]"


class _Stop:
    pass


_Message: TypeAlias = _PendingRequest | _FaceFound | Event


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
        self._inbox: SimpleQueue[_Message | _Stop] = SimpleQueue()
        self._waiting: dict[str, _PendingRequest] = {}
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
            self._inbox.put(_PendingRequest(sender, pictures, ids))

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
                for pending in dict.fromkeys(self._waiting.values()):
                    self._fail(pending, Unavailable("The model was unloaded."))
                return
            self._handle(message)
            self._poll()

    def _handle(self, message: _Message) -> None:
        if isinstance(message, _PendingRequest):
            self._waiting.update(dict.fromkeys(message.ids, message))
            self._guarded(message, message.ids[0], message)
            return
        task_id = message.task_id if isinstance(message, _FaceFound) else message.id
        pending = self._waiting.get(task_id)
        if pending is not None:  # else its request was answered with another picture's error
            self._guarded(pending, task_id, message)

    def _guarded(self, pending: _PendingRequest, task_id: str, message: _Message) -> None:
        try:
            self._dispatch(pending, task_id, message)
        except Exception as problem:  # ours: it must not take the answers of others with it
            if task_id in self._waiting:
                self._fail(pending, problem)

    def _dispatch(self, pending: _PendingRequest, task_id: str, message: _Message) -> None:
        if isinstance(message, _PendingRequest):
            self._start(pending)
        elif isinstance(message, _FaceFound):
            self._face_found(pending, message)
        elif isinstance(message, StepDone):
            if self._decoupled:
                self._send(pending.sender, self._responses.step(message))
            self._cancel_if_gone(pending)
        elif isinstance(message, PictureDone):
            pending.done[task_id] = message
            if len(pending.done) == len(pending.ids):
                self._finish(pending)
        elif isinstance(message, TaskFailed):
            self._fail(pending, message.error)

    def _start(self, pending: _PendingRequest) -> None:
        for task_id, picture in zip(pending.ids, pending.pictures, strict=True):
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

    def _face_found(self, pending: _PendingRequest, found: _FaceFound) -> None:
        if found.future.cancelled():
            raise Unavailable("The model is being unloaded.")
        picture = pending.pictures[pending.ids.index(found.task_id)]
        self._submit(found.task_id, picture, found.future.result())

    def _submit(self, task_id: str, picture: PictureRequest, face: Face) -> None:
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
        for pending in dict.fromkeys(self._waiting.values()):
            if monotonic() - pending.polled >= POLL_SECONDS:
                self._cancel_if_gone(pending)

    def _cancel_if_gone(self, pending: _PendingRequest) -> None:
        # The request itself is Triton's again since `execute` returned; its sender is still ours.
        pending.polled = monotonic()
        if pending.sender.is_cancelled():
            self._fail(pending, Cancelled("The client cancelled the request."))

    def _finish(self, pending: _PendingRequest) -> None:
        done = [pending.done[task_id] for task_id in pending.ids]
        self._end(pending, self._responses.pictures(done))

    def _fail(self, pending: _PendingRequest, problem: Exception) -> None:
        """Answer the whole request with an error, and stop what else it pending for."""
        unfinished = [task_id for task_id in pending.ids if task_id not in pending.done]
        self._end(pending, self._responses.error(problem))
        for task_id in unfinished:
            self._worker.cancel(task_id)

    def _end(self, pending: _PendingRequest, response: Any) -> None:
        for task_id in pending.ids:
            self._waiting.pop(task_id, None)
            self._room.release()
        self._send(pending.sender, response, self._responses.final)

    def _send(self, sender: Any, response: Any, flags: int = 0) -> None:
        try:
            sender.send(response, flags=flags)
        except self._pb.TritonModelException as problem:
            # The way to this client is gone; the others still have theirs.
            self._pb.Logger.log_error(f"A response could not be sent: {problem}")


class Responses:
    """Makes the responses of one model with the `pb_utils` of its Triton process."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb = pb_utils
        self.final: int = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

    def pictures(self, done: Sequence[PictureDone]) -> Any:
        """IMAGE and IMAGE_PARAMETERS of all pictures of a request, which have one size.

        One picture is handed over without a copy (DLPack), several are copied into one tensor;
        sending copies either into the memory that this process shares with Triton.
        """
        first = done[0].pixels
        if len(done) == 1:
            pixels_BHW3 = self._writable(first)[None]
        else:
            pixels_BHW3 = np.stack([one.pixels for one in done])
        facts = [
            json.dumps(
                {
                    "parameters": dict(one.parameters),
                    "warnings": list(one.warnings),
                    "seconds": dict(one.seconds),
                },
                ensure_ascii=False,
            ).encode()
            for one in done
        ]
        return self._pb.InferenceResponse(
            output_tensors=[
                self._pb.Tensor.from_dlpack(tensors.IMAGE, pixels_BHW3),
                self._pb.Tensor(tensors.IMAGE_PARAMETERS, np.array(facts, np.object_)[:, None]),
            ]
        )

    def step(self, event: StepDone) -> Any:
        """STEP, and PREVIEW where there is one."""
        numbers = np.array([[event.step, event.steps]], np.int32)
        outputs = [self._pb.Tensor(tensors.STEP, numbers)]
        if event.preview is not None:
            preview = self._writable(event.preview)[None]
            outputs.append(self._pb.Tensor.from_dlpack(tensors.PREVIEW, preview))
        return self._pb.InferenceResponse(output_tensors=outputs)

    def error(self, problem: Exception) -> Any:
        """The error of one request; what is not the client's doing goes to the log instead."""
        name = CODES.get(problem.code) if isinstance(problem, FastFaceError) else None
        if name is None:
            self._pb.Logger.log_error(f"{type(problem).__name__}: {problem}")
            text, name = GENERIC, "INTERNAL"
        else:
            text = str(problem)
        code = getattr(self._pb.TritonError, name)
        return self._pb.InferenceResponse(error=self._pb.TritonError(text, code))

    @staticmethod
    def _writable(pixels_HW3: Pixels) -> Pixels:
        """The pixels as DLPack exports them: in C order, and not read-only."""
        return np.require(pixels_HW3, requirements=["C", "W"])
