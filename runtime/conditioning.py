"""What the UNet is told: text and image tokens of every branch of a request.

Prompts and faces repeat and encoders cost, so what was encoded is kept for the next request.

A prompt longer than 75 tokens is encoded in windows, each by itself, and their hidden states follow
each other; the pooled text is the first window's. All branches of a request have as many windows as
its longer prompt: an empty window is what an empty prompt is encoded to.

Shape legend: W windows of 77 positions, L = 77·W text positions, C text width of the UNet, P pooled
width, T image tokens: of a FaceID-Portrait export those of a request's pictures, 16 each, until
they are padded to the most that it takes.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.contract import (
    IMAGE_TOKENS,
    MASKED,
    MAX_WINDOWS,
    TEXT,
    TEXT_POSITIONS,
)
from fastface_trt.engines.device import Tensor, dtype_name
from fastface_trt.engines.manifest import EMBEDDING_ALONE
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime import guidance
from fastface_trt.runtime.export_folder import ModuleSet
from fastface_trt.runtime.face import ChannelOrder, Face, FaceParser, clip_pixels, portrait_pixels
from fastface_trt.runtime.prompt_syntax import (
    PromptSyntax,
    Section,
    interpolate,
    multiply,
    parse_prompt,
    weakened,
)
from fastface_trt.runtime.request import GenerationRequest, check_pictures
from fastface_trt.runtime.sampling import Condition
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline
from fastface_trt.runtime.tokenizer import ClipTokenizer, Windows


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """A prompt as the UNet takes it: text [L, C] and pooled [P]."""

    text: Tensor
    pooled: Tensor


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
        # An export that is being calibrated has no UNet yet; the one to come takes all windows.
        unet = modules.manifest.modules.get("unet")
        lengths = [] if unet is None else [i.shape[1] for i in unet.inputs if i.name == TEXT]
        self.most_windows = 1 if any(isinstance(one, int) for one in lengths) else MAX_WINDOWS
        self._texts: Recent[TextEmbedding] = Recent(256)
        self._tokens: Recent[Tensor] = Recent(64)

    def conditions(
        self,
        request: GenerationRequest,
        face_tokens: Tensor,
        timeline: Timeline = NO_TIMELINE,
    ) -> Mapping[str, Condition]:
        """Text and image tokens of the four branches u, t, i and ti of a request."""
        windows, syntax = self.windows(request), request.prompt_syntax
        text = self.text(request.prompt, timeline, syntax=syntax, windows=windows)
        nothing = self.negative_text(request.negative_prompt, text, timeline, syntax=syntax)
        no_face, mask = self.image_tokens(None, timeline=timeline), None
        if self._modules.manifest.max_faces > 1:
            # A branch that knows no face has as many tokens as the others.
            faces = face_tokens.shape[0] // no_face.shape[0]
            no_face, _ = self._padded([no_face] * faces)
            per_face = face_tokens.reshape(faces, -1, face_tokens.shape[-1])
            face_tokens, mask = self._padded([per_face[index] for index in range(faces)])
        return {
            guidance.UNCONDITIONAL: Condition(nothing.text, nothing.pooled, no_face, mask),
            guidance.TEXT: Condition(text.text, text.pooled, no_face, mask),
            guidance.FACE: Condition(nothing.text, nothing.pooled, face_tokens, mask),
            guidance.TEXT_AND_FACE: Condition(text.text, text.pooled, face_tokens, mask),
        }

    def _padded(self, groups: Sequence[Tensor]) -> tuple[Tensor, NDArray[np.float32]]:
        """Tokens [T, C] of several faces among the most that a request may have, and their mask."""
        device, most = self._modules.device, self._modules.manifest.max_faces
        count, width = groups[0].shape
        nothing = device.zeros((count, width), dtype_name(groups[0]))
        joined = device.stack([*groups, *[nothing] * (most - len(groups))])
        return joined.reshape(-1, width), token_mask(len(groups) * count, most * count)

    def windows(self, request: GenerationRequest) -> int:
        """How many windows the texts of a request have in every branch."""
        prompts = (request.prompt, request.negative_prompt)
        return max(len(t) for p in prompts for t in self._tokenise(p, request.prompt_syntax, 1))

    def cut_from(self, prompt: str, syntax: PromptSyntax = "plain") -> str:
        """What of a prompt has no room in the windows; empty where all of it has."""
        return max((one.cut for one in self._tokenise(prompt, syntax, 1)), key=len)

    def text(
        self,
        prompt: str,
        timeline: Timeline = NO_TIMELINE,
        *,
        syntax: PromptSyntax = "plain",
        windows: int = 1,
    ) -> TextEmbedding:
        """Both encoders' penultimate hidden states side by side, and the second's pooled output.

        It has `windows` windows, more where the prompt needs them.
        """
        key = prompt, syntax, windows
        known = self._texts.get(key)
        if known is not None:
            return known
        with timeline.span("tokenise"):
            sections = parse_prompt(prompt, syntax)
            tokens = self._tokenise(prompt, syntax, windows)
        encoded = self._encode_text(tokens, timeline)
        if any((one.weights != 1).any() for one in tokens):
            weighed = self._weighed(encoded, tokens, sections, syntax, timeline)
            encoded = replace(encoded, text=weighed)
        if syntax == "compel":  # which pools the prompt as it is written, signs and all
            written = self._windows_of(parse_prompt(prompt, "plain"), 1, 1)
            encoded = replace(encoded, pooled=self._encode_text(written, timeline).pooled)
        self._modules.device.synchronize()  # from here on other threads read it
        self._texts.put(key, encoded)
        return encoded

    def negative_text(
        self,
        prompt: str,
        positive: TextEmbedding,
        timeline: Timeline = NO_TIMELINE,
        *,
        syntax: PromptSyntax = "plain",
    ) -> TextEmbedding:
        """The text of branches u and i: zeros for no prompt where the checkpoint was made so.

        The zeros have the shapes of `positive`, the request's prompt, so that nothing is encoded.
        """
        if prompt.strip() or not self._modules.manifest.force_zeros_for_empty_prompt:
            windows = positive.text.shape[0] // TEXT_POSITIONS
            return self.text(prompt, timeline, syntax=syntax, windows=windows)
        zeros = self._modules.device.zeros
        text, pooled = positive.text, positive.pooled
        return TextEmbedding(
            zeros(text.shape, dtype_name(text)), zeros(pooled.shape, dtype_name(pooled))
        )

    def _tokenise(self, prompt: str, syntax: PromptSyntax, least: int) -> tuple[Windows, ...]:
        """The windows of a prompt for each encoder, equally many."""
        return self._windows_of(parse_prompt(prompt, syntax), least, self.most_windows)

    def _windows_of(
        self, sections: Sequence[Section], least: int, most: int
    ) -> tuple[Windows, ...]:
        found = [one.windows(sections, least, most) for one in self._tokenizers]
        # The second tokenizer takes every "!" for a token of its own, so it may need one more.
        longest = max(map(len, found))
        return tuple(one.windows(sections, longest, most) for one in self._tokenizers)

    def _encode_text(self, tokens: Sequence[Windows], timeline: Timeline) -> TextEmbedding:
        """The tokens through both encoders, a window at a time."""
        device = self._modules.device
        encoder, encoder_2 = (self._modules[name] for name in ("text_encoder", "text_encoder_2"))
        states: list[Tensor] = []
        pooled: Tensor | None = None
        for first, second in zip(*(one.input_ids[:, None] for one in tokens), strict=True):
            with timeline.span("text_encoder", device):
                hidden = encoder(input_ids=first)["hidden_states"]
            with timeline.span("text_encoder_2", device):
                both = encoder_2(input_ids=second)
            states.append(device.concatenate_last((hidden[0], both["hidden_states"][0])))
            if pooled is None:
                pooled = device.copy(both["text_embeds"][0])
        assert pooled is not None
        if len(states) == 1:
            return TextEmbedding(states[0], pooled)
        joined = device.stack(states)
        return TextEmbedding(joined.reshape(-1, joined.shape[-1]), pooled)

    def _weighed(
        self,
        encoded: TextEmbedding,
        tokens: Sequence[Windows],
        sections: Sequence[Section],
        syntax: PromptSyntax,
        timeline: Timeline,
    ) -> Tensor:
        """Hidden states [L, C] with the weights of their tokens, computed on the host."""
        device, windows = self._modules.device, len(tokens[0])
        width = self._modules["text_encoder"].spec.outputs[0].shape[-1]
        assert isinstance(width, int)

        def by_encoder(text: TextEmbedding) -> list[NDArray[np.float32]]:
            states = device.download(text.text).astype(np.float32)
            return np.split(states.reshape(-1, TEXT_POSITIONS, states.shape[-1]), [width], axis=-1)

        if syntax == "a1111":
            weighed = [
                multiply(states, one.weights)
                for states, one in zip(by_encoder(encoded), tokens, strict=True)
            ]
        else:
            empty = by_encoder(self.text("", timeline))

            def weigh(text: TextEmbedding, of: Sequence[Windows]) -> list[NDArray[np.float32]]:
                return [
                    interpolate(states, nothing[0], one.weights)
                    for states, nothing, one in zip(by_encoder(text), empty, of, strict=True)
                ]

            weighed, total = weigh(encoded, tokens), 1.0
            for share, without in weakened(sections):
                lacking = self._windows_of(without, windows, windows)
                less = weigh(self._encode_text(lacking, timeline), lacking)
                weighed = [a + share * b for a, b in zip(weighed, less, strict=True)]
                total += share
            weighed = [states / total for states in weighed]
        joined = np.concatenate(weighed, axis=-1, dtype=np.float32)
        dtype = np.dtype(dtype_name(encoded.text))
        return device.upload(joined.reshape(-1, joined.shape[-1]).astype(dtype))

    def image_tokens(
        self,
        face: Face | None,
        channel_order: ChannelOrder = "bgr",
        timeline: Timeline = NO_TIMELINE,
    ) -> Tensor:
        """Image tokens [T, C] of a person, or of no face; of several pictures one after the other.

        No face is a zero embedding and an all-zero picture, for PuLID all-zero features of it.
        Raises `InvalidRequest` for a face that was analysed without what the adapter needs, and
        for more pictures of a person than it takes.
        """
        if face is not None and face.others:
            check_pictures(self._modules.manifest, 1 + len(face.others))
            pictures = (replace(face, others=()), *face.others)
            tokens = self._modules.device.stack(
                [self.image_tokens(one, channel_order, timeline) for one in pictures]
            )
            return tokens.reshape(-1, tokens.shape[-1])
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
        if manifest.adapter_kind in EMBEDDING_ALONE:
            unnorm = manifest.adapter_kind == "faceid-portrait-unnorm"
            length = np.float32(face.embedding_norm if unnorm else 1)
            return {"face_embeds": face.embedding[None] * length}
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


def token_mask(tokens: int, most: int) -> NDArray[np.float32]:
    """The mask [T] of a request with so many of the `most` image tokens."""
    return np.where(np.arange(most) < tokens, 0, MASKED).astype(np.float32)


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
