"""What the UNet is told: text and image tokens of every branch of a request.

Prompts and faces repeat and encoders cost, so what was encoded is kept for the next request.

Shape legend: L = 77 text positions, C text width of the UNet, P pooled width, T image tokens.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.contract import IMAGE_TOKENS
from fastface_trt.engines.device import Tensor, dtype_name
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.export_folder import ModuleSet
from fastface_trt.runtime.face import ChannelOrder, Face, FaceParser, clip_pixels, portrait_pixels
from fastface_trt.runtime.guidance import FACE, TEXT, TEXT_AND_FACE, UNCONDITIONAL
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import Condition
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline
from fastface_trt.runtime.tokenizer import ClipTokenizer


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """A prompt as the UNet takes it: text [L, C] and pooled [P]; `cut` is what did not fit."""

    text: Tensor
    pooled: Tensor
    cut: str = ""


class Conditioner:
    """Encodes prompts and faces with an export's engines; what it returns stays on their device.

    Encodings are kept in the dtype that the encoders give: the modules of one export fit each
    other, and an engine on the host casts by itself where they do not.
    """

    def __init__(self, modules: ModuleSet) -> None:
        self._modules = modules
        export = modules.export
        self._tokenizers = [
            ClipTokenizer.from_folder(export.folder / name) for name in ("tokenizer", "tokenizer_2")
        ]
        self._parser = FaceParser(export.face_parser) if export.face_parser else None
        self._texts: Recent[TextEmbedding] = Recent(256)
        self._tokens: Recent[Tensor] = Recent(64)

    def conditions(
        self,
        request: GenerationRequest,
        face_tokens: Tensor,
        timeline: Timeline = NO_TIMELINE,
    ) -> Mapping[str, Condition]:
        """Text and image tokens of the four branches u, t, i and ti of a request."""
        text = self.text(request.prompt, timeline)
        nothing = self.negative_text(request.negative_prompt, text, timeline)
        no_face = self.image_tokens(None, timeline=timeline)
        return {
            UNCONDITIONAL: Condition(nothing.text, nothing.pooled, no_face),
            TEXT: Condition(text.text, text.pooled, no_face),
            FACE: Condition(nothing.text, nothing.pooled, face_tokens),
            TEXT_AND_FACE: Condition(text.text, text.pooled, face_tokens),
        }

    def text(self, prompt: str, timeline: Timeline = NO_TIMELINE) -> TextEmbedding:
        """Both encoders' penultimate hidden states side by side, and the second's pooled output."""
        known = self._texts.get(prompt)
        if known is not None:
            return known
        with timeline.span("tokenise"):
            first, second = (tokenizer.encode([prompt]) for tokenizer in self._tokenizers)
        encoder, encoder_2 = (self._modules[name] for name in ("text_encoder", "text_encoder_2"))
        device = self._modules.device
        with timeline.span("text_encoder", device):
            hidden = encoder(input_ids=first.input_ids)["hidden_states"]
        with timeline.span("text_encoder_2", device):
            both = encoder_2(input_ids=second.input_ids)
        encoded = TextEmbedding(
            device.concatenate_last((hidden[0], both["hidden_states"][0])),
            device.copy(both["text_embeds"][0]),
            max(first.cut[0], second.cut[0], key=len),
        )
        device.synchronize()  # from here on other threads read it
        self._texts.put(prompt, encoded)
        return encoded

    def negative_text(
        self, prompt: str, positive: TextEmbedding, timeline: Timeline = NO_TIMELINE
    ) -> TextEmbedding:
        """The text of branches u and i: zeros for no prompt where the checkpoint was made so.

        The zeros have the shapes of `positive`, the request's prompt, so that nothing is encoded.
        """
        if prompt.strip() or not self._modules.manifest.force_zeros_for_empty_prompt:
            return self.text(prompt, timeline)
        zeros = self._modules.device.zeros
        text, pooled = positive.text, positive.pooled
        return TextEmbedding(
            zeros(text.shape, dtype_name(text)), zeros(pooled.shape, dtype_name(pooled))
        )

    def image_tokens(
        self,
        face: Face | None,
        channel_order: ChannelOrder = "bgr",
        timeline: Timeline = NO_TIMELINE,
    ) -> Tensor:
        """Image tokens [T, C] of a face, or of no face.

        No face is a zero embedding and an all-zero picture, for PuLID all-zero features of it.
        Raises `InvalidRequest` for a face that was analysed without what the adapter needs.
        """
        key = None if face is None else (*_identity(face), channel_order)
        known = self._tokens.get(key)
        if known is not None:
            return known
        projection, device = self._modules["face_projection"], self._modules.device
        inputs = (
            self._no_face(timeline)
            if face is None
            else self._of_face(face, channel_order, timeline)
        )
        with timeline.span("face_projection", device):
            projected = projection(**inputs)
            tokens = device.copy(projected[IMAGE_TOKENS][0])
        device.synchronize()  # from here on other threads read them
        self._tokens.put(key, tokens)
        return tokens

    def forget(self) -> None:
        """Drop every encoding that is kept; before the device is closed."""
        self._texts.clear()
        self._tokens.clear()

    def _no_face(self, timeline: Timeline) -> Mapping[str, Tensor]:
        """Inputs of the projection in the branches that know no face."""
        manifest = self._modules.manifest
        zeros = {
            tensor.name: np.zeros(
                [size if isinstance(size, int) else 1 for size in tensor.shape], dtype=np.float32
            )
            for tensor in self._modules["face_projection"].spec.inputs
        }
        if manifest.adapter_kind != "faceid-plus-v2":
            return zeros
        assert manifest.image_encoder_size is not None
        side = manifest.image_encoder_size
        pixels = np.zeros((1, 3, side, side), dtype=np.float32)
        return {**zeros, **self._encode(pixels, timeline)}

    def _of_face(
        self, face: Face, channel_order: ChannelOrder, timeline: Timeline
    ) -> Mapping[str, Tensor]:
        """Inputs of the projection for a face."""
        manifest = self._modules.manifest
        if manifest.adapter_kind == "faceid":
            return {"face_embeds": face.embedding[None]}
        assert manifest.image_encoder_size is not None
        assert manifest.image_mean is not None
        assert manifest.image_std is not None
        if manifest.adapter_kind == "faceid-plus-v2":
            embedding = face.embedding
            pixels = clip_pixels(
                face.crop_bgr,
                size=manifest.image_encoder_size,
                mean=manifest.image_mean,
                std=manifest.image_std,
                channel_order=channel_order,
            )
        else:
            if face.portrait_bgr is None:
                raise InvalidRequest(
                    "This face was analysed for another adapter: it has no portrait for PuLID.",
                    "Pass the picture, or analyse it with the FastFace object that uses it.",
                )
            embedding = face.embedding * np.float32(face.embedding_norm)
            portrait = face.portrait_bgr
            pixels = portrait_pixels(
                portrait,
                size=manifest.image_encoder_size,
                mean=manifest.image_mean,
                std=manifest.image_std,
                background=None if self._parser is None else self._parser.background(portrait),
            )
        return {"face_embeds": embedding[None], **self._encode(pixels[None], timeline)}

    def _encode(self, pixels: NDArray[np.float32], timeline: Timeline) -> Mapping[str, Tensor]:
        encoder = self._modules["image_encoder"]
        with timeline.span("image_encoder", self._modules.device):
            return encoder(pixel_values=pixels)


def _identity(face: Face) -> tuple[Hashable, ...]:
    """What tells one face from another, for every adapter."""
    portrait = None if face.portrait_bgr is None else face.portrait_bgr.tobytes()
    return face.embedding.tobytes(), face.embedding_norm, face.crop_bgr.tobytes(), portrait


Value = TypeVar("Value")


class Recent(Generic[Value]):
    """At most `size` values by key, the most recently used ones; threads may share it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Value | None:
        """The value of `key`, None when it is not here or was pushed out."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: Value) -> None:
        """Keep a value; the one that was not used for longest makes room."""
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._values.clear()
