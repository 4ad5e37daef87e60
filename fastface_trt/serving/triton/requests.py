"""From the tensors of one Triton request to the pictures that it asks for.

Every array is copied: Triton takes its memory back when `execute` returns. Shape legend: B pictures
of one request, H × W pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastface_trt.engines.manifest import ExportManifest, first_problem
from fastface_trt.errors import FastFaceError, InvalidRequest
from fastface_trt.requests import check_size, request_for
from fastface_trt.runtime.face import ChannelOrder, Face
from fastface_trt.runtime.guidance import parse_schedule
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.manipulation import AttentionManipulation
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.triton import tensors
from fastface_trt.serving.work import Pixels

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""Inputs by name, each [B, …] as `tensors.INPUTS` says."""


class Asked(BaseModel):
    """The JSON of PARAMETERS; what is not named here is a field of `GenerationRequest`.

    deadline: seconds from now. face_index: which face, largest first. previews: small pictures with
    every step, of a decoupled model.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    preset: str = "plain"
    face_index: int | None = Field(default=None, ge=0)
    channel_order: ChannelOrder = "bgr"
    deadline: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    previews: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
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
) -> list[Picture]:
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


def _picture(arrays: Arrays, row: int, face: Face | Pixels, manifest: ExportManifest) -> Picture:
    asked = _asked(arrays, row)
    values = dict(asked.model_extra or {})
    if "prompt" in values:
        raise InvalidRequest("PARAMETERS holds a prompt.", "Send it as PROMPT.")
    if tensors.SEED in arrays:
        if "seed" in values:
            raise InvalidRequest("The seed is given twice.", "Send SEED or seed in PARAMETERS.")
        values["seed"] = int(arrays[tensors.SEED][row].item())
    prompt = _string(arrays, tensors.PROMPT, row)
    try:
        request = request_for(manifest, prompt, preset=asked.preset, **_fields(values))
        check_size(manifest, request)
    except FastFaceError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"PARAMETERS has a value of a wrong kind: {error}.", "See GenerationRequest."
        ) from None
    return Picture(
        request=request,
        face=face,
        face_index=asked.face_index,
        channel_order=asked.channel_order,
        deadline=None if asked.deadline is None else monotonic() + asked.deadline,
        previews=asked.previews,
    )


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `GenerationRequest` from JSON, as `GenerationRequest.to_dict` writes them.

    alpha and beta may also be named schedules, as on the command line.
    """
    fields = dict(values)
    for name in ("alpha", "beta"):
        if isinstance(fields.get(name), str):
            fields[name] = parse_schedule(fields[name])
    if "manipulation" in fields:
        fields["manipulation"] = AttentionManipulation.from_dict(fields["manipulation"])
    return fields


def _asked(arrays: Arrays, row: int) -> Asked:
    if tensors.PARAMETERS not in arrays:
        return Asked()
    text = _string(arrays, tensors.PARAMETERS, row)
    try:
        values = json.loads(text or "{}")
        if not isinstance(values, dict):
            raise InvalidRequest("PARAMETERS is not a JSON object.", 'Send e.g. {"steps": 4}.')
        return Asked.model_validate(values)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"PARAMETERS is not JSON: {error}.", 'Send e.g. {"steps": 4}.'
        ) from None
    except ValidationError as error:
        where, problem = first_problem(error)
        raise InvalidRequest(f"PARAMETERS is not valid at {where}: {problem}.") from None


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
