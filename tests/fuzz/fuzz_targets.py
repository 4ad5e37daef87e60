"""What is fuzzed: each target takes bytes, and raises when a promise is broken.

A promise is the list of errors in a docstring; any other exception is a finding, and so is a result
that is not what was promised.
"""

import base64
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import atheris
from pydantic import ValidationError

from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    EngineManifest,
    ExportManifest,
    read_manifest,
)
from fastface_trt.errors import BadPicture, FastFaceError, InvalidRequest, ManifestError
from fastface_trt.mini import folders
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.intake import orientation_of
from fastface_trt.runtime.presets import PRESETS
from fastface_trt.runtime.request import GenerationRequest, request_for
from fastface_trt.serving.http.errors import InvalidField, detail_of, invalid_field
from fastface_trt.serving.http.schemas import GenerationBody
from fastface_trt.serving.http.work_order import check_one_face, generation_requests
from fastface_trt.serving.pictures.fetch import Rules, checked_url, request_target
from fastface_trt.serving.pictures.files import decode_base64, decode_picture
from fastface_trt.serving.settings import ServerSettings
from tests.fuzz.hostile_parts import exif_bomb, exif_tiff
from tests.fuzz.json_trees import as_bytes, mutated
from tests.fuzz.make_hostile import FOLDER, hostile

SETTINGS = ServerSettings(max_picture_pixels=250_000, max_body_bytes=100_000)


@dataclass(frozen=True)
class Target:
    """`make` gives the function under test; `seeds` are inputs to begin with."""

    make: Callable[[], Callable[[bytes], None]]
    runs: int
    max_len: int
    seeds: list[bytes] = field(default_factory=list)


def picture(read):
    def test(data):
        try:
            pixels = read(data)
        except BadPicture:
            return
        height, width, channels = pixels.shape
        assert (channels, pixels.dtype) == (3, "uint8")
        assert min(height, width) >= 16
        assert height * width <= SETTINGS.max_picture_pixels

    return test


def local_picture(data):
    """What only the local door reads."""
    return load_picture(data, max_pixels=SETTINGS.max_picture_pixels, formats=("TIFF", "BMP"))


def exif():
    def test(data):
        assert 1 <= orientation_of(data) <= 8

    return test


def base64_text():
    def test(data):
        choose = atheris.FuzzedDataProvider(data[1:])
        near = data[:1] == b"\1"
        text = data[1:].decode("latin-1") if near else choose.ConsumeUnicode(4000)
        try:
            decoded = decode_base64(text, SETTINGS)
        except BadPicture:
            return
        assert len(decoded) <= SETTINGS.max_body_bytes
        text = text.lstrip()
        body = text.partition(",")[2] if text[:5].lower() == "data:" else text
        digits = "".join(body.translate(str.maketrans("-_", "+/")).split()).rstrip("=")
        assert decoded == base64.b64decode(digits + "=" * (-len(digits) % 4))

    return test


def url():
    rules = Rules()

    def test(data):
        text = data.decode("utf-8", "surrogateescape")
        try:
            parts = checked_url(text, rules)
        except InvalidRequest:
            return
        assert (parts.scheme, parts.port or 443) == ("https", 443)
        assert "@" not in parts.netloc
        assert text.isascii()
        assert text.isprintable()
        target = request_target(parts)
        assert target.startswith(b"/")
        assert b" " not in target

    return test


def manifest(kind, good):
    """Half of the inputs are files as they are, half are good manifests with wrong parts."""

    def make():
        folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="."))
        path = folder / "manifest.json"

        def test(data):
            choose = atheris.FuzzedDataProvider(data[1:])
            raw = data[:1] < b"\x80"
            path.write_bytes(data[1:] if raw else as_bytes(mutated(good, choose)))
            try:
                found = read_manifest(path, kind)
            except ManifestError:
                return
            files = found.files() if kind is ExportManifest else found.files
            for file in files:
                assert "\0" not in file.path
                assert (folder / file.path).resolve().is_relative_to(folder.resolve())
            found.model_dump_json()

        return test

    return make


def request():
    """Dictionaries that come near one of `GenerationRequest.to_dict`."""
    base = json.loads(mini().read_text())["steps"]
    export = read_manifest(mini(), ExportManifest)
    good = [request_for(export, "a person", preset=name).to_dict() for name in PRESETS]
    good = json.loads(json.dumps(good))
    assert base == export.steps

    def test(data):
        choose = atheris.FuzzedDataProvider(data)
        values = mutated(choose.PickValueInList(good), choose)
        try:
            made = GenerationRequest.from_dict(values)
        except FastFaceError:
            return
        text = json.dumps(made.to_dict(), allow_nan=False)
        assert GenerationRequest.from_dict(json.loads(text)).to_dict() == json.loads(text)
        assert made.unet_samples >= 1

    return test


def http_body():
    """Bodies of the HTTP surface, to the requests that a worker would get."""
    export = read_manifest(mini(), ExportManifest)
    good = [
        json.loads(json.dumps(body))
        for body in (
            {"prompt": "a person", "face": "AAAA", "n": 2, "size": "96x96", "seed": 3},
            {"prompt": "a person", "face_id": "face_1", "preset": "am1+dcg", "steps": 4},
            {"prompt": "a person", "face_url": "https://x.example/", "stream": True},
            {"prompt": "a", "images": [{"image_url": "data:,"}], "stream": "1", "quality": "auto"},
            {
                "prompt": "a person",
                "face": "data:image/png;base64,AAAA",
                "partial_images": 2,
                "stream": True,
                "alpha": [1, 2, 2, 1],
                "beta": "cosine:high=3,low=1",
                "ip_adapter_scale": {"down": 0.5},
                "manipulation": {"up": {"kind": "softmask", "scale": [1, 2, 2, 1]}},
                "rescale": 0.7,
                "dcg_variant": 2,
                "scope": "branch",
                "plan": "lean",
                "channel_order": "rgb",
                "deadline": 5.5,
                "model": "mini",
                "user": "somebody",
                "response_format": "b64_json",
                "output_format": "png",
            },
        )
    ]

    def test(data):
        choose = atheris.FuzzedDataProvider(data[1:])
        raw = data[:1] < b"\x40"
        text = data[1:] if raw else as_bytes(mutated(choose.PickValueInList(good), choose))
        try:
            body = GenerationBody.model_validate_json(text)
        except ValidationError as error:
            found = invalid_field(error.errors(include_input=False, include_url=False))
            assert detail_of(found, "req_1").code == "invalid_request"
            return
        except InvalidField:  # several pictures, or none that is one
            return
        try:
            check_one_face(body, file=False)
            made = generation_requests(body, export, SETTINGS)
        except FastFaceError as error:
            # What is wrong with a body is its client's, and never the server's own trouble.
            if detail_of(error, "req_1").type != "invalid_request_error":
                raise
            return
        assert 1 <= len(made) <= SETTINGS.max_pictures
        for one in made:
            assert one.width * one.height <= 4096 * 4096
            json.dumps(one.to_dict(), allow_nan=False)

    return test


def mini():
    return folders.EXPORT / EXPORT_MANIFEST


def export_manifest():
    """The mini export's manifest, with fewer files so that parts are hit evenly."""
    tree = json.loads(mini().read_text())
    tree["modules"] = {name: tree["modules"][name] for name in ("text_encoder", "unet")}
    return tree


def engine_manifest():
    module = export_manifest()["modules"]["unet"]
    made = EngineManifest(
        key="0" * 64,
        backend="onnxruntime",
        backend_version="1",
        module=module,
        files=module["files"],
        build_seconds=1.5,
    )
    return json.loads(made.model_dump_json())


def turned(order):
    """A block that says how the picture lies, after what a camera says before it."""
    entries = [(tag, 2, 4, 0) for tag in (0x010E, 0x010F, 0x0110)]
    value = 6 << (16 if order == ">" else 0)
    return b"Exif\0\0" + exif_tiff([*entries, (0x0112, 3, 1, value)], order)


def targets():
    """All targets by name."""
    pictures = [*hostile().values(), *(path.read_bytes() for path in FOLDER.iterdir())]
    local = [data for name, data in hostile().items() if name.startswith(("tiff-", "bmp-"))]
    text = base64.b64encode(b"a picture " * 9)
    export, engine = export_manifest(), engine_manifest()
    return {
        "picture": Target(
            lambda: picture(lambda data: decode_picture(data, SETTINGS)), 150_000, 4096, pictures
        ),
        "local_picture": Target(lambda: picture(local_picture), 60_000, 4096, local),
        "exif": Target(exif, 30_000, 1024, [exif_bomb(), *(turned(order) for order in "<>")]),
        "base64": Target(
            base64_text, 30_000, 4096, [b"\1" + text, b"\1data:image/png;base64," + text]
        ),
        "url": Target(
            url,
            30_000,
            300,
            [b"https://x.example/face.png?a=b#c", b"https://[::1]:443/", b"https://a@b:80/"],
        ),
        "export_manifest": Target(
            manifest(ExportManifest, export), 15_000, 8192, [b"\0" + as_bytes(export)]
        ),
        "engine_manifest": Target(
            manifest(EngineManifest, engine), 20_000, 8192, [b"\0" + as_bytes(engine)]
        ),
        "request": Target(request, 60_000, 512),
        "http_body": Target(http_body, 60_000, 4096),
    }
