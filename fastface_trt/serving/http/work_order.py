"""From a body to tasks: what images and edits, streamed or not, have in common."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from fastface_trt.runtime.picture_file import PictureFormat, encode_picture
from fastface_trt.serving.http.context import Context
from fastface_trt.serving.http.conversion import (
    check_one_face,
    deadline_of,
    generation_requests,
)
from fastface_trt.serving.http.face_input import face_of, within
from fastface_trt.serving.http.front import Record, record_of
from fastface_trt.serving.http.responses import Usage
from fastface_trt.serving.http.schemas import GenerationBody
from fastface_trt.serving.http.tasks import Tasks
from fastface_trt.serving.work import PictureDone, Pixels, Task


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

    def submitted(self) -> Tasks:
        """The tasks in the worker, as long as the block lasts."""
        context = self.context
        return Tasks(context.worker, self.tasks, context.admission, context.metrics)

    def usage(self, tasks: tuple[Task, ...] | None = None) -> Usage:
        """What these tasks, or all of them, use."""
        tasks = self.tasks if tasks is None else tasks
        samples = sum(task.request.unet_samples for task in tasks)
        return Usage(pictures=len(tasks), unet_samples=samples)

    @property
    def format(self) -> PictureFormat:
        """Of the files that it is answered with."""
        return self.body.output_format or "png"

    async def file(self, done: PictureDone) -> str:
        """The picture as the server gives it away: a marked, perhaps signed file in base64.

        Raises `Refused` where a check does not let it out, and `SigningFailed`.
        """
        await self.context.checks.check_result(done.pixels)
        self.record.seconds.append(done.seconds)
        return await self._encoded(done.pixels, done.parameters)

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

        return await context.beside(encode)


async def work_order(
    context: Context, request: Request, body: GenerationBody, file: bytes | None
) -> WorkOrder:
    """Check a request, find its face, and make its tasks.

    Raises what `conversion` and `face_of` raise, `Refused`, and `DeadlinePassed`.
    """
    record = record_of(request.scope)
    requests = generation_requests(body, context.manifest, context.settings)
    deadline = deadline_of(body, context.settings, record.arrived)
    check_one_face(body, file=file is not None)
    if context.settings.log_prompts:
        record.prompt = body.prompt
    await within(deadline, context.checks.check_prompt(requests[0]))
    face = await within(deadline, face_of(context, body, file, record.owner))
    record.tasks = len(requests)
    return WorkOrder(
        context,
        record,
        body,
        tuple(
            Task(
                f"{record.id}-{index}",
                one,
                face,
                channel_order=body.channel_order or "bgr",
                deadline=deadline,
                # A preview that nobody checked would show what the check then keeps back.
                previews=bool(body.partial_images) and not context.checks.looks_at_results,
            )
            for index, one in enumerate(requests)
        ),
    )
