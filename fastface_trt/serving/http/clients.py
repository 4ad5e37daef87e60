"""How clients that were made for other servers write a request, and why some of it is refused.

They send every field that they know, most of them at a value that asks for nothing: OpenAI's
default, or what is done here anyway. Those are read and change nothing. A value that asks for more
is refused with the reason. Numbers and flags may be written as text, as forms and many JSON writers
do; null, and empty text, is a field that was left out.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

REASONS: Mapping[str, str] = {
    "quality": "Pictures have one quality here: leave it out, and choose a preset or steps.",
    "background": "The model draws whole pictures, none with a transparent background.",
    "moderation": "What is allowed is the operator's to say: leave it out.",
    "input_fidelity": "How closely the face is followed is ip_adapter_scale.",
    "style": "Say the style in the prompt.",
    "response_format": "Pictures are not kept here, so there is no address of one: b64_json.",
    "mask": "Pictures are drawn anew and none is repainted in parts: leave the mask out.",
    "markup": "Pictures are drawn anew and none is repainted in parts: leave the markup out.",
    "svg": "Pictures have pixels: ask for output_format png, jpeg or webp.",
    "complexity": "It is of SVG files, and pictures have pixels here: leave it out.",
    "frame_count": "It is of GIF files, and pictures do not move here: leave it out.",
    "frame_duration_ms": "It is of GIF files, and pictures do not move here: leave it out.",
    "width": "Send size, as WIDTHxHEIGHT.",
    "height": "Send size, as WIDTHxHEIGHT.",
    "guidance_scale": "Guidance is alpha and beta here.",
    "cfg_scale": "Guidance is alpha and beta here.",
    "true_cfg_scale": "Guidance is alpha and beta here.",
    "num_images": "Send n.",
    "num_images_per_prompt": "Send n.",
    "batch_size": "Send n.",
    "strength": "The picture gives the face only; how closely it is followed is ip_adapter_scale.",
    "url": "Send face_url.",
    "image_url": "Send face_url.",
}
"""Hints about fields, or values of them, that others have and this server does not."""

ABSENT = frozenset({"mask", "markup", "svg", "complexity", "frame_count", "frame_duration_ms"})
"""OpenAI's fields that are read only where they say nothing."""

FLAGS = frozenset({"stream"})
_TRUTHS = {"true": True, "1": True, "yes": True, "on": True} | dict.fromkeys(
    ("false", "0", "no", "off"), False
)
_NOTHING = ("null", "none", "undefined")
"""How forms write that a field was left out, beside empty text."""


def as_sent(
    values: Mapping[str, Any], *, known: Collection[str], whole: Collection[str]
) -> dict[str, Any]:
    """The fields that a client gave, in the types that the models take.

    `known` are the model's fields, `whole` those of them that are whole numbers. Only what is
    written in another way is changed; what does not fit stays for the model to refuse.
    """
    read = {}
    for name, value in values.items():
        if value == "" and name != "prompt" and (name in known or name in ABSENT):
            continue
        if value is None and name in ABSENT:
            continue
        if name in FLAGS:
            value = _flag(value)
        elif name in whole:
            value = _whole(value)
        elif name == "output_format" and value == "jpg":
            value = "jpeg"
        if name == "seed" and value == -1:  # "any", as other programs write it
            continue
        read[name] = value
    return read


def says_nothing(text: str) -> bool:
    """Whether the text of a form's field means that the field was left out."""
    return len(text) < 10 and text.lower() in _NOTHING  # it may be a picture


def _flag(value: Any) -> Any:
    if isinstance(value, str):
        return _TRUTHS.get(value.strip().lower(), value)
    return bool(value) if isinstance(value, int) and value in (0, 1) else value


def _whole(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
