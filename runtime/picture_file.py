"""Picture files that say how they were made: generation parameters, and an "AI-generated" mark.

PNG, JPEG and WebP carry the same. The parameters are stored twice, as JSON under our own name for
exact reading, and as the text that image browsers and other generators show. The mark is the IPTC's
digital source type in an XMP packet, which is what platforms look for. Nothing is written about the
source picture: whoever wants a path or a name in the metadata must put it into the parameters.

| | JSON | text | mark |
|---|---|---|---|
| PNG | iTXt `fastface-trt` | tEXt `parameters` | iTXt `XML:com.adobe.xmp` |
| JPEG, WebP | EXIF ImageDescription | EXIF UserComment | XMP |

A PNG of a photograph is mostly noise, for which a search for repetitions takes most of the time and
finds next to nothing. So rows are filtered by the average of their neighbours, and zlib is told to
look for runs and Huffman codes alone; `python -m benchmarks.picture_encoding` compares the ways.
"""

import contextlib
import errno
import io
import json
import os
import secrets
import struct
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, cast
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from fastface_trt import __version__
from fastface_trt.engines.files import write_durably
from fastface_trt.errors import BadPicture, InvalidRequest, StorageError
from fastface_trt.runtime.images import read_file
from fastface_trt.runtime.intake import Refused, description_of, format_of, take_apart
from fastface_trt.runtime.picture_names import check_template, counted, picture_name

PictureFormat = Literal["png", "jpeg", "webp"]
"""A media type is image/ and this."""

FORMATS: Final[dict[str, PictureFormat]] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}
"""Formats by the suffix of a file."""

_OTHER_PICTURES: Final = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".jp2", ".jxl", ".pdf", ".svg", ".tif", ".tiff")
)

QUALITY: Final = 90
"""Of JPEG and WebP, 0 to 100, where nobody asks for another."""

PARAMETERS_KEY = "fastface-trt"
SOFTWARE = f"FastFace-TRT {__version__}"
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<xmp:CreatorTool>{escape(SOFTWARE)}</xmp:CreatorTool>"
    f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)

_LABELS = {
    "steps": "Steps",
    "scheduler": "Sampler",
    "seed": "Seed",
    "size": "Size",
    "checkpoint": "Model",
}
"""Keys that other tools know under another name, in the order in which they expect them."""


def picture_format(path: str | os.PathLike[str], wanted: str | None = None) -> PictureFormat:
    """The format of a file called `path`: the one that is wanted, or its suffix's, or PNG.

    Raises `InvalidRequest` where the suffix says another one than is wanted, or that is none.
    """
    suffix = Path(path).suffix.lower()
    told = FORMATS.get(suffix)
    if wanted is None:
        return told or "png"
    if wanted not in FORMATS.values():
        raise InvalidRequest(f"There is no format {wanted!r}.", "Use png, jpeg or webp.")
    if told not in (None, wanted):
        raise InvalidRequest(
            f"The name {Path(path).name} says {told}, and the format asked for is {wanted}.",
            "Leave out the format, or give the file the suffix of its format.",
        )
    return cast(PictureFormat, wanted)


def encode_picture(
    picture: NDArray[np.uint8],
    *,
    parameters: Mapping[str, Any],
    ai_generated: bool = True,
    format: PictureFormat = "png",
    quality: int | None = None,
) -> bytes:
    """The bytes of a file of `picture` (RGB, uint8 [H, W, 3]) with its metadata.

    `parameters` must be JSON (numpy scalars and arrays are converted); NaN is refused because no
    other JSON reader would take it. `quality` is that of JPEG and WebP. Raises ValueError or
    TypeError for a wrong picture or value, `InvalidRequest` for a quality of a PNG or out of 0 to
    100, and for parameters that are too long for a JPEG.
    """
    if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
        raise ValueError(f"picture is {picture.dtype} {picture.shape}, not uint8 [H, W, 3]")
    plain = json.dumps(dict(parameters), allow_nan=False, default=_plain)
    readable = _readable(json.loads(plain), picture.shape[1], picture.shape[0])
    if format == "png":
        if quality is not None:
            raise InvalidRequest("A PNG has no quality.", "Leave it out, or use jpeg or webp.")
        return _png(np.ascontiguousarray(picture), plain, readable, ai_generated)
    if quality is not None and not 0 <= quality <= 100:
        raise InvalidRequest(f"The quality is {quality}.", "Use a number from 0 to 100.")
    options: dict[str, Any] = {"quality": QUALITY if quality is None else quality}
    options["exif"] = _exif(plain, readable)
    if ai_generated:
        options["xmp"] = _XMP.encode()
    if format == "webp":
        options["method"] = 2  # half the time of Pillow's 4 for files a twentieth larger
    elif len(options["exif"]) > _LONGEST_SEGMENT:
        raise InvalidRequest(
            "The generation parameters are too long for a JPEG, which holds 65 kB of them.",
            "Write a PNG or WebP file, or shorten the prompt.",
        )
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format=format.upper(), **options)
    return buffer.getvalue()


def write_picture(
    path: str | Path,
    picture: NDArray[np.uint8],
    *,
    parameters: Mapping[str, Any],
    ai_generated: bool = True,
    format: PictureFormat | None = None,
    quality: int | None = None,
) -> None:
    """Write `picture` (RGB, uint8 [H, W, 3]) to `path`, whole or not at all; see `encode_picture`.

    The format is that of `picture_format`. An existing file is replaced only once the new one is
    safely on the disk. Raises `StorageError` when the folder is missing, not writable or full;
    nothing half-written is left behind.
    """
    path = Path(path)
    data = encode_picture(
        picture,
        parameters=parameters,
        ai_generated=ai_generated,
        format=picture_format(path, format),
        quality=quality,
    )
    with _unwritable(path):
        write_durably(path, data)


def add_picture(
    path: str | Path,
    picture: NDArray[np.uint8],
    *,
    taken: Collection[Path] = (),
    parameters: Mapping[str, Any],
    ai_generated: bool = True,
    format: PictureFormat | None = None,
    quality: int | None = None,
) -> Path:
    """`write_picture` that replaces nothing; returns the path of the file that holds the picture.

    A file that is the same to the byte stays as it is. Beside others the name gets a counter, and
    beside those of `taken` even where they are the same.
    """
    data = encode_picture(
        picture,
        parameters=parameters,
        ai_generated=ai_generated,
        format=picture_format(path, format),
        quality=quality,
    )
    for candidate in counted(Path(path)):
        if candidate in taken:
            continue
        with _unwritable(candidate):
            if not candidate.exists():
                write_durably(candidate, data)
                return candidate
            if candidate.is_file() and candidate.read_bytes() == data:
                return candidate
    raise AssertionError("there is always another number")


@contextlib.contextmanager
def _unwritable(path: Path) -> Iterator[None]:
    """Errors of the system inside are that `path` cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise StorageError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.",
            "Check that its folder exists, is writable and has space.",
        ) from None


class PictureWriter:
    """Writes picture files on a thread of its own, while the caller makes the next picture.

    A context manager: when the block is left, also by an exception, every file is written, in the
    order of the calls. A failure is raised by the next call or at the end, the earliest first;
    files behind it are still tried.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="picture-writer")
        self._writing: list[Future[None]] = []
        self.written: list[Path] = []
        """The files that are on the disk, in the order of the calls."""

    def write(
        self, path: str | Path, picture: NDArray[np.uint8], *, replace: bool = True, **options: Any
    ) -> None:
        """`write_picture` with these arguments, later; `picture` must stay as it is until then.

        With `replace=False` it is `add_picture`, and no two pictures of this writer share a file.
        """
        for earlier in self._writing:
            if earlier.done():
                earlier.result()
        work = self._write if replace else self._add
        self._writing.append(self._thread.submit(work, Path(path), picture, **options))

    def _write(self, path: Path, picture: NDArray[np.uint8], **options: Any) -> None:
        write_picture(path, picture, **options)
        self.written.append(path)

    def _add(self, path: Path, picture: NDArray[np.uint8], **options: Any) -> None:
        self.written.append(add_picture(path, picture, taken=self.written, **options))

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if error is None:
            for one in self._writing:
                one.result()


@dataclass(frozen=True, slots=True)
class Destination:
    """Where pictures go: one into a file, replacing it, or any number into a folder, see `of`."""

    out: Path
    format: PictureFormat
    template: str | None

    @classmethod
    def of(
        cls,
        out: str | os.PathLike[str],
        *,
        count: int,
        format: str | None = None,
        template: str | None = None,
    ) -> "Destination":
        """`out` is a file where its suffix is one of `FORMATS`, or else a folder.

        In a folder `picture_name` makes the names of `template`. Raises `InvalidRequest` and
        `UnknownName` for what does not fit together, or does not fit `count` pictures.
        """
        place = cls(Path(out), picture_format(out, format), template)
        if place.is_file and count != 1:
            raise InvalidRequest(
                f"{place.out} is one file, and {count} pictures are asked for.", "Give a folder."
            )
        if place.is_file and template is not None:
            raise InvalidRequest(
                f"{place.out} is a file, and the name {template!r:.60} is for files in a folder.",
                "Give a folder, or leave out the name.",
            )
        if place.out.suffix.lower() in _OTHER_PICTURES and not place.out.is_dir():
            raise InvalidRequest(
                f"{place.out} says {place.out.suffix.lower()}, a format that is not written.",
                "Use .png, .jpg or .webp, or give a folder.",
            )
        if template is not None:
            check_template(template)
        return place

    @property
    def is_file(self) -> bool:
        """Whether it takes one picture."""
        return self.out.suffix.lower() in FORMATS

    def write(
        self,
        writer: PictureWriter,
        fields: Mapping[str, Any],
        picture: NDArray[np.uint8],
        **options: Any,
    ) -> None:
        """`writer.write` with these options, of a picture with these `picture_names.FIELDS`."""
        path = self.out
        if not self.is_file:
            suffix = next(suffix for suffix, known in FORMATS.items() if known == self.format)
            path /= f"{picture_name(fields, self.template)}{suffix}"
        with _unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        writer.write(path, picture, replace=self.is_file, format=self.format, **options)

    def check(self) -> None:
        """Raise `StorageError` unless something can be written there.

        Tried with a file that is gone again afterwards, like folders that were made for it.
        """
        folder = self.out.parent if self.is_file else self.out
        made: list[Path] = []
        with _unwritable(self.out):
            try:
                if self.is_file and self.out.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "It is a folder")
                for one in (*reversed(folder.parents), folder):
                    if not one.is_dir():
                        one.mkdir()
                        made.append(one)
                trial = folder / f".fastface-{secrets.token_hex(8)}.tmp"
                trial.touch(exist_ok=False)
                trial.unlink()
            finally:
                for one in reversed(made):
                    with contextlib.suppress(OSError):  # somebody else uses it by now
                        one.rmdir()


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The generation parameters that `write_picture` stored in the file at `path`.

    Raises `BadPicture` when the file cannot be read, is no PNG, JPEG or WebP, or carries no
    parameters.
    """
    try:
        data = read_file(path)
        if format_of(data[:64]) in ("PNG", "JPEG", "WEBP"):
            take_apart(data)  # refuses what would take a decoder long
        file = io.BytesIO(data)
        # Pillow warns of what is broken in an EXIF block, and then leaves it out.
        with warnings.catch_warnings(), Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            warnings.simplefilter("ignore")
            image.load()
            stored = image.info.get(PARAMETERS_KEY)
            if image.format != "PNG":
                stored = description_of(image.info.get("exif", b""))
    except BadPicture:
        raise
    except Refused as refused:
        raise BadPicture(f"The picture {path} {refused.message}.", refused.hint) from None
    except Exception as error:  # a foreign file, a broken chunk: all end here
        raise BadPicture(
            f"The picture {path} cannot be read: {str(error).rstrip('.')}.",
            "Pass a PNG, JPEG or WebP file written by fastface-trt.",
        ) from None
    parameters: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        parameters = json.loads(str(stored))
    if image.format != "PNG":
        ours = isinstance(parameters, dict) and parameters.keys() == {PARAMETERS_KEY}
        stored = parameters = parameters[PARAMETERS_KEY] if ours else None
    if stored is None:
        raise BadPicture(
            f"The picture {path} carries no generation parameters.",
            "Pass a file as fastface-trt wrote it; editors and messengers drop them.",
        )
    if not isinstance(parameters, dict):
        raise BadPicture(
            f"The generation parameters in {path} are broken.",
            "Pass a file as fastface-trt wrote it.",
        )
    return parameters


_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_AVERAGE: Final = 3
"""Of a PNG's filters, the one that takes half the sum of the pixels at the left and above."""


def _png(picture: NDArray[np.uint8], plain: str, readable: str, ai_generated: bool) -> bytes:
    """A PNG file, with our text behind its header."""
    info = PngInfo()
    info.add_itxt(PARAMETERS_KEY, plain)
    info.add_text("parameters", readable)
    info.add_text("Software", SOFTWARE)
    if ai_generated:
        info.add_itxt("XML:com.adobe.xmp", _XMP)
    height, width = picture.shape[:2]
    rows = picture.reshape(height, width * 3)
    left, above = np.zeros_like(rows), np.zeros_like(rows)
    left[:, 3:], above[1:] = rows[:, :-3], rows[:-1]
    filtered = np.full((height, 1 + width * 3), _AVERAGE, np.uint8)
    # Half the sum without its ninth bit: what both have, and half of what one has.
    np.subtract(rows, (left & above) + ((left ^ above) >> 1), out=filtered[:, 1:])
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    pixels = deflate.compress(filtered.data) + deflate.flush()
    # Eight bits, RGB, and the only ways there are of compressing, filtering and not interlacing.
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    texts = [(kind, data) for kind, data, *_ in info.chunks]
    chunks = [(b"IHDR", header), *texts, (b"IDAT", pixels), (b"IEND", b"")]
    return b"".join([_SIGNATURE, *(_chunk(kind, data) for kind, data in chunks)])


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(data, zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", check)])


_LONGEST_SEGMENT: Final = 65533
"""Bytes of a JPEG's APP1 segment, whose length is 16 bits and counts itself."""


def _exif(plain: str, readable: str) -> bytes:
    """An EXIF block: the JSON, which is ASCII, and the text as other generators store it."""
    exif = Image.Exif()
    exif.endian = ">"
    exif[ExifTags.Base.ImageDescription] = f'{{"{PARAMETERS_KEY}": {plain}}}'
    exif[ExifTags.Base.Software] = SOFTWARE
    comment = b"UNICODE\0" + readable.encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def _plain(value: object) -> Any:
    """What JSON can hold of a numpy value; everything else is a mistake of the caller's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be stored as a generation parameter")


def _readable(parameters: Mapping[str, Any], width: int, height: int) -> str:
    """The prompt, then one line "Name: value, …", as other generators write and parse it."""
    rest = {**parameters, "size": f"{width}x{height}"}
    lines = [str(rest.pop("prompt", ""))]
    if negative := rest.pop("negative_prompt", None):
        lines.append(f"Negative prompt: {negative}")
    known = [key for key in _LABELS if key in rest]
    others = [key for key in rest if key not in _LABELS]
    settings = [
        f"{_LABELS.get(key, key)}: {_quoted(rest[key])}"
        for key in (*known, *others)
        if rest[key] is not None
    ]
    text = "\n".join([*lines, ", ".join(settings)])
    # A chunk ends at a null character, and half a surrogate pair has no UTF-8.
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _quoted(value: Any) -> str:
    """A value that cannot be mistaken for the next setting; quoted where it could be."""
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text) if any(mark in text for mark in ",:\n") else text
