"""What goes back to Triton: pictures, steps and errors, as objects of its `pb_utils`.

Shape legend: B pictures of one request, H × W pixels.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastface_trt.errors import FastFaceError
from fastface_trt.serving.triton import tensors
from fastface_trt.serving.work import PictureDone, Pixels, StepDone

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
