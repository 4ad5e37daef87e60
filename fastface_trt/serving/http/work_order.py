"""From a checked body to tasks, and from their pictures to files: what all image routes share.

`work_order` is the way in: the requests that a worker gets, one per picture, and the face, which is
registered, in the body, the file of a form, or at an address. `WorkOrder` is the way out.
"""

import asyncio
import base64
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import Busy, InvalidRequest, UnknownName, naming
from fastface_trt.runtime.face import Face, one_person
from fastface_trt.runtime.picture_file import PictureFormat, encode_picture
from fastface_trt.runtime.request import GenerationRequest, check_pictures, parse_request
from fastface_trt.serving.http.admission import Reading
from fastface_trt.serving.http.context import Context
from fastface_trt.serving.http.errors import InvalidField
from fastface_trt.serving.http.middleware import Record, record_of
from fastface_trt.serving.http.responses import Picture, Usage
from fastface_trt.serving.http.schemas import GenerationBody
from fastface_trt.serving.http.tasks import SubmittedTasks, within
from fastface_trt.serving.pictures.files import decode_base64, decode_picture
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import PictureDone, Pixels, Task

FACE_FIELDS = ("face", "face_id", "face_ids", "face_url")


@dataclass(frozen=True)
class WorkOrder:
    """The tasks of one request, ready to be submitted."""

    context: Context
    record: Record
    body: GenerationBody
    tasks: tuple[Task, ...]

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT of its pictures."""
        request = self.tasks[0].request
        return f"{request.width}x{request.height}"

    def submitted(self) -> SubmittedTasks:
        """The tasks in the worker, as long as the block lasts."""
        context = self.context
        return SubmittedTasks(context.worker, self.tasks, context.admission, context.metrics)

    def usage(self, tasks: tuple[Task, ...] | None = None) -> Usage:
        """What these tasks, or all of them, use."""
        tasks = self.tasks if tasks is None else tasks
        samples = sum(task.request.unet_samples for task in tasks)
        return Usage(pictures=len(tasks), unet_samples=samples)

    @property
    def format(self) -> PictureFormat:
        """Of the files that it is answered with."""
        return self.body.output_format or "png"

    async def picture(self, index: int, done: PictureDone) -> Picture:
        """The picture of the `index`-th task as the server gives it away: marked, perhaps signed.

        Raises `Refused` where a check does not let it out, and `SigningFailed`.
        """
        await self.context.checks.check_result(done.pixels)
        self.record.seconds.append(done.seconds)
        return Picture(
            b64_json=await self._encoded(done.pixels, done.parameters),
            seed=self.tasks[index].request.seed,
            parameters=dict(done.parameters),
            warnings=list(done.warnings),
            seconds=dict(done.seconds),
        )

    async def preview_file(self, preview: Pixels) -> str:
        """A preview as a file in base64, marked and signed like a picture."""
        return await self._encoded(preview, {"preview": True})

    async def _encoded(self, pixels: Pixels, parameters: Mapping[str, Any]) -> str:
        context = self.context

        def encode() -> str:
            data = encode_picture(
                pixels,
                parameters=parameters,
                ai_generated=context.settings.ai_mark,
                format=self.format,
                # OpenAI's name for it; at 100 nothing is lost that the format can keep.
                quality=None if self.format == "png" else self.body.output_compression,
            )
            if context.signer is not None:
                data = context.signer.sign(data, self.format)
            return base64.b64encode(data).decode("ascii")

        return await context.in_thread(self.record.owner, encode)


async def work_order(
    context: Context, request: Request, reading: Reading, body: GenerationBody, file: bytes | None
) -> WorkOrder:
    """Check a request, find its face, and make its tasks.

    Raises what `generation_requests`, `deadline_of`, `check_one_face` and `face_of` raise,
    `Refused`, and `DeadlinePassed`.
    """
    record = record_of(request.scope)
    if body.seed is None:
        # As other servers do: another picture each time, and whoever wants one again sends the seed
        # that came with it. Of 32 bits, which JavaScript reads exactly.
        body = body.model_copy(update={"seed": secrets.randbits(32)})
    requests = generation_requests(body, context.manifest, context.settings)
    deadline = deadline_of(body, context.settings, record.arrived)
    check_one_face(body, file=file is not None)
    if context.settings.log_prompts:
        record.prompt = body.prompt
    await within(deadline, context.checks.check_prompt(requests[0]))
    face = await within(deadline, face_of(context, reading, body, file))
    record.tasks = len(requests)
    return WorkOrder(
        context,
        record,
        body.model_copy(update={"face": None}),  # megabytes, for as long as pictures are made
        tuple(
            Task(
                f"{record.id}-{index}",
                one,
                face,
                channel_order=body.channel_order or "bgr",
                deadline=deadline,
                # A preview that nobody checked would show what the check then keeps back.
                previews=bool(body.partial_images) and not context.checks.looks_at_results,
                owner=record.owner,
            )
            for index, one in enumerate(requests)
        ),
    )


def generation_requests(
    body: GenerationBody, manifest: ExportManifest, settings: ServerSettings
) -> list[GenerationRequest]:
    """One request per picture: the export's defaults, the preset's fields, and then the body's.

    Raises `InvalidRequest`, `InvalidField` and `UnknownName`.
    """
    names = (manifest.checkpoint, *settings.model_names)
    if body.model not in (None, *names):
        with naming("model"):
            raise UnknownName("model", body.model or "", names)
    count = body.n or 1
    if count > settings.max_pictures:
        raise InvalidField(
            f"n is {count}.", f"This server makes up to {settings.max_pictures} at once.", param="n"
        )
    if body.partial_images and not body.stream:
        raise InvalidField(
            "partial_images needs a stream.", "Set stream to true.", param="partial_images"
        )
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise InvalidField(
            "A PNG loses nothing, so it has no output_compression but 100.",
            "Ask for output_format jpeg or webp.",
            param="output_compression",
        )
    first = parse_request(body.request_values(), manifest)
    return [replace(first, image_index=index) for index in range(count)]


def deadline_of(body: GenerationBody, settings: ServerSettings, arrived: float) -> float:
    """When the answer is of no use any more, in seconds of `time.monotonic`."""
    seconds = settings.default_deadline if body.deadline is None else body.deadline
    if seconds > settings.max_deadline:
        raise InvalidField(
            f"deadline is {seconds:g} seconds.",
            f"This server works on a request for up to {settings.max_deadline:g}.",
            param="deadline",
        )
    return arrived + seconds


def check_one_face(body: GenerationBody, *, file: bool) -> None:
    """Raise `InvalidRequest` unless there is one face: a field, or the file of a form."""
    named = [name for name in FACE_FIELDS if getattr(body, name) is not None]
    if file:
        named.insert(0, "image")
    if len(named) != 1:
        raise InvalidRequest(
            f"Several faces are given: {', '.join(named)}." if named else "No face is given.",
            "Give one of face (base64), face_id or face_ids (of /v1/faces), face_url, or in a form "
            "the file image.",
        )


async def face_of(
    context: Context, reading: Reading, body: GenerationBody, file: bytes | None
) -> Face:
    """Whichever one face the request has; see `check_one_face`.

    Raises `BadPicture`, `NoFaceFound`, `FaceIndexOutOfRange`, `UnknownFace`, `InvalidField`,
    `Refused`, `Unavailable`, and what `Reading.add` raises.
    """
    owner = reading.owner
    names = body.face_ids or ([] if body.face_id is None else [body.face_id])
    if names:
        if body.face_index is not None:
            raise InvalidField(
                "face_index goes with a picture.",
                "A registered face is one already: leave it out.",
                param="face_index",
            )
        check_pictures(context.manifest, len(names), "face_ids")
        return one_person([(await context.faces.get(owner, name)).face for name in names])
    if body.face is not None:
        file = await context.in_thread(owner, decode_base64, body.face, context.settings)
    elif body.face_url is not None:
        file = await _fetched(context, reading, body.face_url)
    assert file is not None
    return await analysed(context, file, body.face_index, owner)


async def analysed(context: Context, file: bytes, index: int | None, owner: str) -> Face:
    """The face of a picture file: the largest, or the `index`-th by size.

    Raises `BadPicture`, `Refused`, `NoFaceFound`, `FaceIndexOutOfRange`, `Busy`,
    `Unavailable`.
    """
    async with context.pictures_in_hand.of(owner):
        pixels = await context.in_thread(owner, decode_picture, file, context.settings)
        await context.checks.check_face(pixels)
        # A worker may have to send megabytes of pixels to another process.
        future = await context.in_thread(owner, context.worker.analyze, pixels, index, owner)
        try:
            return await asyncio.wrap_future(future)
        except Busy as error:
            context.admission.remember(owner, error)
            raise


async def _fetched(context: Context, reading: Reading, url: str) -> bytes:
    if not context.settings.fetch_urls:
        raise InvalidField(
            "This server fetches no pictures.",
            "Send the picture itself as face, or start the server with --fetch-urls.",
            param="face_url",
        )
    from fastface_trt.serving.pictures.fetch import fetch_picture

    reading.add(context.settings.max_body_bytes)  # nobody knows how many come
    return await fetch_picture(url, context.settings)
