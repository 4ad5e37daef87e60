"""What pictures' files are called: a template with fields, and names that every system takes.

Text keeps its script: letters, digits, marks and signs such as emoji stay, in Unicode's composed
form (NFC); everything between them becomes one hyphen. A name is at most 255 bytes long as UTF-8,
with its suffix and room for a counter, and none that Windows reserves.
"""

import hashlib
import json
import os
import string
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from PIL import Image

from fastface_trt.errors import InvalidRequest, UnknownName

FIELDS: Final = ("face", "prompt", "preset", "seed", "index", "steps", "hash")
"""`face` is the name of the face's file, `index` which of a seed's pictures, `hash` what
`picture_hash` says."""

DEFAULT: Final = "{face}_{prompt}_{preset}_{seed}-{hash}"
DEFAULT_OF_SEVERAL: Final = "{face}_{prompt}_{preset}_{seed}-{index}-{hash}"
"""The default for all but the first picture of a seed."""

_LONGEST_FIELD: Final = 40
_LONGEST_FIELD_BYTES: Final = 80
_LONGEST_NAME_BYTES: Final = 255 - len(".webp") - len("-1000000")
_JOINERS: Final = "\u200c\u200d"
"""They hold the parts of an emoji together, and letters of some scripts apart."""
_FORBIDDEN: Final = frozenset('<>:"/\\|?*')
_RESERVED: Final = frozenset(
    ("CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10)))
)


def check_template(template: str) -> None:
    """Raise `InvalidRequest` or `UnknownName` unless every name can be made of this template."""
    if not isinstance(template, str):
        raise InvalidRequest(f"The name is {template!r:.60}.", "Write text such as {face}-{seed}.")
    if any(mark in template for mark in "/\\"):
        raise InvalidRequest(
            f"The name {template!r:.60} has a path separator.", "Choose the folder with --out."
        )
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template)]
        for field in fields:
            if field is not None and field not in FIELDS:
                raise UnknownName("field of a name", field, FIELDS)
        template.format_map(dict.fromkeys(FIELDS, "") | {"seed": 0, "index": 0, "steps": 1})
    except (ValueError, MemoryError, LookupError) as error:
        raise InvalidRequest(
            f"The name {template!r:.60} is no template: {str(error).lower()}.",
            "Write fields in braces, such as {face}-{seed}.",
        ) from None


def picture_name(fields: Mapping[str, Any], template: str | None = None) -> str:
    """The name, without a suffix, of a picture with these `FIELDS`; raises as `check_template`."""
    if template is None:
        template = DEFAULT_OF_SEVERAL if fields["index"] else DEFAULT
    check_template(template)
    clean = {name: _clean(v) if isinstance(v, str) else v for name, v in fields.items()}
    name = unicodedata.normalize("NFC", template.format_map(clean))
    name = "".join("-" if c in _FORBIDDEN or not _visible(c) else c for c in name)
    name = _cut(name, _LONGEST_NAME_BYTES).strip(" .") or "picture"
    return f"_{name}" if name.partition(".")[0].rstrip().upper() in _RESERVED else name


def name_fields(
    parameters: Mapping[str, Any], *, face: str, preset: str, hash: str
) -> dict[str, Any]:
    """`FIELDS` of a picture with these generation parameters."""
    made = {name: parameters[name] for name in ("prompt", "seed", "steps")}
    return made | {
        "face": face,
        "preset": preset,
        "hash": hash,
        "index": parameters["image_index"],
    }


def counted(path: Path) -> Iterator[Path]:
    """`path`, then the same with -2, -3, … before its suffix."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1


def picture_hash(*what: Mapping[str, Any] | bytes | str) -> str:
    """8 hexadecimal digits of the SHA-256 of all that a picture depends on, whatever its order."""
    digest = hashlib.sha256()
    for one in what:
        if isinstance(one, Mapping):
            one = json.dumps(one, sort_keys=True)
        data = one.encode() if isinstance(one, str) else one
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:8]


def face_name(source: object) -> str:
    """What to call a face: its file's name without the suffix, where it came in one."""
    if isinstance(source, list | tuple) and source:  # several of one person
        source = source[0]
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    elif not isinstance(source, str | os.PathLike):
        source = getattr(source, "name", "")
    return Path(os.fsdecode(source)).stem if isinstance(source, str | os.PathLike) else ""


def _clean(text: str) -> str:
    """A text as a part of a file's name; `picture` where nothing of it can stay."""
    kept = "".join(c if _stays(c) else " " for c in text)
    short = "-".join(kept.split())[:_LONGEST_FIELD]
    return _cut(short, _LONGEST_FIELD_BYTES).strip(f"-{_JOINERS}") or "picture"


def _stays(character: str) -> bool:
    kind = unicodedata.category(character)
    sign = kind in ("So", "Sk") and ord(character) > 0xFF
    return kind[0] in "LMN" or sign or character == "+" or character in _JOINERS


def _visible(character: str) -> bool:
    return unicodedata.category(character)[0] != "C" or character in _JOINERS


def _cut(text: str, size: int) -> str:
    """At most `size` bytes of UTF-8, no character in halves."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")
