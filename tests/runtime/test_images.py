import io
import os
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import BadPicture, install_hint
from fastface_trt.mini import folders
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.intake import MAX_SCANS, take_apart
from fastface_trt.serving.triton.served import read_pictures
from tests.fuzz.hostile_parts import (
    chunk,
    grey,
    ihdr,
    jpeg,
    jpeg_tables,
    png,
    rows,
    sof,
    sos,
    tiff,
)
from tests.helpers.made_pictures import HEIC_BEGINNING, encoded, gradient


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "stream", "pil", "array"])
def test_every_kind_of_source_gives_the_same_pixels(tmp_path, kind):
    pixels = gradient()
    image = Image.fromarray(pixels)
    path = tmp_path / "face.png"
    image.save(path)
    sources = {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "stream": io.BytesIO(path.read_bytes()),
        "pil": image,
        "array": pixels,
    }
    loaded = load_picture(sources[kind])
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, pixels)
    loaded[0, 0] = 7  # the caller's own copy
    assert pixels[0, 0, 0] == 0


def test_stream_that_cannot_seek_is_read_and_stays_open(tmp_path):
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader:
        with os.fdopen(write_end, "wb") as writer:
            writer.write(encoded(Image.fromarray(gradient())))
        np.testing.assert_array_equal(load_picture(reader), gradient())
        assert not reader.closed


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
def test_formats(form):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(form, {})
    loaded = load_picture(encoded(Image.fromarray(gradient()), form, **options))
    if form == "JPEG":
        assert np.abs(loaded.astype(int) - gradient()).mean() < 3
    else:
        np.testing.assert_array_equal(loaded, gradient())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(form, orientation):
    upright = gradient()
    # The stored picture from which the orientation leads back to `upright`, by definition of EXIF.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif)
    np.testing.assert_array_equal(load_picture(data), upright)


def test_broken_exif_does_not_refuse_good_pixels():
    data = encoded(Image.fromarray(gradient()), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    np.testing.assert_array_equal(load_picture(data), gradient())


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    loaded = load_picture(encoded(cmyk, "TIFF"))
    np.testing.assert_array_equal(loaded[3, 3], [255, 0, 0])
    red = load_picture(encoded(cmyk, "JPEG", quality=95))[3, 3]
    assert red[0] > 245
    assert red[1:].max() < 10


def test_grey_and_grey_with_alpha():
    grey = Image.new("L", (32, 32), 100)
    assert (load_picture(encoded(grey)) == 100).all()
    half = Image.new("LA", (32, 32), (0, 128))
    assert (load_picture(encoded(half)) == 127).all()
    assert (load_picture(encoded(Image.new("1", (32, 32), 1))) == 255).all()


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 16, 32))
    loaded = load_picture(encoded(image))
    np.testing.assert_array_equal(loaded[0, 31], [255, 255, 255])
    np.testing.assert_array_equal(loaded[0, 0], [0, 0, 200])


def test_palette_with_and_without_transparency():
    image = Image.new("P", (32, 32), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (0, 0, 16, 32))
    loaded = load_picture(encoded(image))
    np.testing.assert_array_equal(loaded[0, 31], [10, 20, 30])
    np.testing.assert_array_equal(loaded[0, 0], [200, 0, 0])
    loaded = load_picture(encoded(image, transparency=0))
    np.testing.assert_array_equal(loaded[0, 31], [255, 255, 255])
    np.testing.assert_array_equal(loaded[0, 0], [200, 0, 0])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(form):
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    loaded = load_picture(encoded(Image.fromarray(values), form))
    np.testing.assert_array_equal(loaded[:, :, 0], np.rint(values / 257).astype(np.uint8))
    assert (loaded == loaded[:, :, :1]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_defined_white_are_refused(dtype):
    image = Image.fromarray(np.full((32, 32), 100_000, dtype=dtype))
    with pytest.raises(BadPicture, match="no defined white"):
        load_picture(encoded(image, "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(form):
    first, second = Image.fromarray(gradient()), Image.new("RGB", (60, 40), "red")
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(first, form, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(load_picture(data), gradient())


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_two_pictures_and_a_progressive_one(progressive):
    first, second = Image.fromarray(gradient()), Image.new("RGB", (60, 40), "red")
    more = {"progressive": progressive, "quality": 95, "subsampling": 0}
    for form, options in (("MPO", {"save_all": True, "append_images": [second]}), ("JPEG", {})):
        loaded = load_picture(encoded(first, form, **options, **more))
        assert np.abs(loaded.astype(int) - gradient()).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_pictures_of_phones(form, orientation):
    """Their rotation is in the container, and readers turn the picture or tell the orientation."""
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.fromarray(gradient())
    image.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    options = {"exif": image.getexif()} if form == "AVIF" else {"chroma": 444}
    loaded = load_picture(encoded(image, form, quality=100, **options))
    assert loaded.shape == upright.shape
    assert np.abs(loaded.astype(int) - upright).mean() < 3


def test_a_heic_file_names_the_extra_that_reads_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "IMG_0001.jpg"  # whatever it is called
    path.write_bytes(HEIC_BEGINNING)
    with pytest.raises(BadPicture, match=r"IMG_0001.jpg is a HEIC file") as caught:
        load_picture(path)
    assert install_hint("heif") in caught.value.hint


def test_an_avif_file_where_pillow_reads_none(monkeypatch):
    data = encoded(Image.fromarray(gradient()), "AVIF")
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(BadPicture, match="an AVIF file, which this build of Pillow"):
        load_picture(data)


def test_array_of_another_type_or_shape_is_refused():
    for wrong in [
        np.zeros((32, 32, 3), np.float32),
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((3, 32, 32), np.uint8),
    ]:
        with pytest.raises(BadPicture, match="dtype"):
            load_picture(wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am a letter and no picture", "is not a PNG"),
        (encoded(Image.new("P", (32, 32)), "GIF"), "is not a PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "is not a PNG"),
        (encoded(Image.new("RGB", (15, 300))), "fewer than 16 on a side"),
    ],
)
def test_what_is_no_usable_picture_says_so_and_names_the_file(tmp_path, content, message):
    path = tmp_path / "me.png"
    path.write_bytes(content)
    with pytest.raises(BadPicture, match=message) as caught:
        load_picture(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    with pytest.raises(BadPicture, match=message):
        load_picture(content)


def test_paths_that_hold_no_file(tmp_path):
    with pytest.raises(BadPicture, match="does not exist"):
        load_picture(tmp_path / "none.png")
    with pytest.raises(BadPicture, match="not a file"):
        load_picture(tmp_path)
    with pytest.raises(BadPicture, match="Download it"):
        load_picture("https://example.org/face.jpg")
    with pytest.raises(BadPicture):
        load_picture("a\0b.png")
    with pytest.raises(BadPicture):
        load_picture("x" * 5000)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadPicture, match="not a file"):
        load_picture(tmp_path / "pipe")


def test_closed_stream_is_refused():
    stream = io.BytesIO(encoded(Image.fromarray(gradient())))
    stream.close()
    with pytest.raises(BadPicture, match="cannot be read"):
        load_picture(stream)


@pytest.mark.parametrize("side", [200, 10_000, 20_000])
def test_pixel_limit_is_checked_before_decoding(monkeypatch, side):
    # 10,000² makes PIL warn and 20,000² makes it raise; both must end as the one error, in silence.
    bomb = io.BytesIO()
    Image.new("1", (side, side)).save(bomb, format="PNG")
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadPicture, match="pixels") as caught:
            load_picture(bomb.getvalue(), max_pixels=200 * 200 - 1)
    assert caught.value.hint == "Scale it down first."
    assert decoded == []


def test_pixel_limit_holds_for_images_in_memory_too():
    load_picture(gradient(40, 50), max_pixels=2000)
    for source in [gradient(40, 51), Image.fromarray(gradient(40, 51))]:
        with pytest.raises(BadPicture, match="at most 2,000"):
            load_picture(source, max_pixels=2000)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_truncated_at_any_place(form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    for share in [0.01, 0.1, 0.5, 0.9]:
        with pytest.raises(BadPicture):
            load_picture(data[: max(1, int(len(data) * share))])
    with pytest.raises(BadPicture, match="truncated or broken"):
        # TIFF keeps its directory at the end, so only there the header goes first.
        load_picture(data[: len(data) // 2] if form != "TIFF" else _hollow(data))


def _hollow(tiff):
    """A TIFF whose directory is intact and whose pixels lie beyond the end of the file."""
    image = Image.open(io.BytesIO(tiff))
    offset = image.tag_v2[273][0].to_bytes(4, "little")
    return tiff.replace(offset, (10**6).to_bytes(4, "little"))


SEEDS = [
    encoded(Image.fromarray(gradient(24, 24)), form)
    for form in ["PNG", "JPEG", "BMP", "TIFF", "WEBP"]
]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_a_picture_or_the_one_error(data):
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = load_picture(bytes(content), max_pixels=1_000_000)
        except BadPicture:
            return
    assert loaded.dtype == np.uint8
    assert loaded.shape[2] == 3


def scans(count):
    """A JPEG of 256 pixels in so many scans, of which all but the first are empty."""
    tables, grey = jpeg_tables(encoded(Image.fromarray(gradient()), "JPEG")), ((1, 0x11),)
    empty = sos((1,), 1, 63, 0, b"\xff\x00")
    return jpeg(sof(16, 16, 0xC2, components=grey), tables, sos((1,), 0, 0), *[empty] * (count - 1))


def in_tiff(picture):
    """A JPEG as the strip of a TIFF."""
    return tiff(grey(16, 16, tag259=7), picture)


@pytest.mark.parametrize("wrap", [bytes, in_tiff])
@pytest.mark.parametrize("way", ["path", "bytes", "stream", "opened by Pillow", "Triton"])
def test_scans_are_bounded_whichever_way_a_picture_comes(tmp_path, way, wrap):
    def read(data):
        path = tmp_path / "face.jpg"
        path.write_bytes(data)
        if way == "opened by Pillow":
            with Image.open(path) as image:
                load_picture(image)
        elif way == "Triton":
            manifest = read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)
            prompt, file = np.array([[b"photo"]], object), np.array([[data]], object)
            read_pictures({"PROMPT": prompt, "FACE_FILE": file}, manifest)
        else:
            load_picture({"path": path, "bytes": data, "stream": io.BytesIO(data)}[way])

    read(wrap(scans(MAX_SCANS)))
    with pytest.raises(BadPicture, match="more than 40 scans"):
        read(wrap(scans(MAX_SCANS + 1)))


def test_what_pillow_has_decoded_is_taken_as_it_is():
    with Image.open(io.BytesIO(scans(MAX_SCANS + 1))) as image:
        image.load()
        assert load_picture(image).shape == (16, 16, 3)


@pytest.mark.parametrize("way", ["path", "bytes", "stream", "pipe"])
def test_bytes_are_bounded_before_they_are_read(tmp_path, way):
    data = encoded(Image.fromarray(gradient()))
    (tmp_path / "face.png").write_bytes(data)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader:
        with os.fdopen(write_end, "wb") as writer:
            writer.write(data)
        source = {"path": tmp_path / "face.png", "bytes": data, "pipe": reader}
        source = source.get(way, io.BytesIO(data))
        with pytest.raises(BadPicture, match=f"more than {len(data) - 1:,} bytes"):
            load_picture(source, max_bytes=len(data) - 1)
    load_picture(data, max_bytes=len(data))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("way", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr", "I;16"])
def test_a_tiff_that_was_taken_apart_is_what_pillow_reads(mode, way, big):
    if mode == "I;16":
        image = Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(gradient()).convert(mode)
    if way == "jpeg" and mode in ("1", "P", "I;16"):
        pytest.skip("no JPEG has such pixels")
    data = encoded(image, "TIFF", compression=way, big_tiff=big, description="no more")
    file = take_apart(data)
    assert b"no more" not in file.data
    with Image.open(io.BytesIO(data)) as known, Image.open(io.BytesIO(file.data)) as read:
        assert (read.mode, read.size) == (known.mode, known.size)
        np.testing.assert_array_equal(np.asarray(read), np.asarray(known))
    assert load_picture(data).shape == (40, 60, 3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiles_and_planes_of_a_tiff_are_read(order):
    pixels = gradient(32, 48)
    tiles = [
        pixels[y : y + 16, x : x + 16].tobytes() for y in range(0, 32, 16) for x in range(0, 48, 16)
    ]
    offsets = (4, [8 + 768 * at for at in range(6)])
    tiled = grey(48, 32, tag258=(3, [8] * 3), tag262=2, tag277=3, tag322=16, tag323=16)
    tiled |= {324: offsets, 325: (4, [768] * 6)}
    data = tiff(tiled, b"".join(tiles), order=order)
    np.testing.assert_array_equal(load_picture(data), pixels)
    planes = grey(48, 32, tag258=(3, [8] * 3), tag262=2, tag277=3, tag284=2)
    data = tiff(planes, *[pixels[..., channel].tobytes() for channel in range(3)], order=order)
    np.testing.assert_array_equal(load_picture(data), pixels)


@pytest.mark.parametrize("header", [12, 40, 56, 108, 124])
def test_a_bmp_of_every_header_is_read(header):
    rows = gradient(16, 20)[::-1, :, ::-1].tobytes()
    fields = struct.pack("<L4H", 12, 20, 16, 1, 24)
    if header != 12:
        fields = struct.pack("<LllHH", header, 20, 16, 1, 24).ljust(header, b"\0")
    data = b"BM" + struct.pack("<LHHL", 14 + header + len(rows), 0, 0, 14 + header) + fields + rows
    np.testing.assert_array_equal(load_picture(data), gradient(16, 20))


def large(kind):
    """A picture of 16 megapixels; numpy and Pillow would have it as 16 bytes a pixel or more."""
    side, rng = 4000, np.random.default_rng(0)
    bits = {"grey of 16 bits": (0, 16), "alpha of 16 bits": (6, 64), "palette": (3, 8)}
    if kind in bits:
        colour, width = bits[kind]
        body = chunk(b"IDAT", rows(side, side, width))
        palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", b"\0")
        depth = 8 if kind == "palette" else 16
        return png(
            ihdr(side, side, depth, colour), palette if colour == 3 else b"", body, chunk(b"IEND")
        )
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 4), np.uint8), "RGBA")
    image = image.resize((side, side), Image.Resampling.NEAREST)
    if kind == "transparent WebP":
        return encoded(image, "WEBP", lossless=True, method=0, quality=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.convert("CMYK"), "JPEG", progressive=True, exif=exif)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("grey of 16 bits", 9),
        ("alpha of 16 bits", 9),
        ("palette", 9),
        ("transparent WebP", 20),
        ("turned progressive CMYK JPEG", 20),
    ],
)
def test_memory_follows_from_the_pixels(tmp_path, kind, most):
    """Bytes of memory for each pixel, three of them the result."""
    (tmp_path / "large").write_bytes(large(kind))
    code = """
import sys
from pathlib import Path
from fastface_trt.runtime.images import load_picture

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

before = peak()
pixels = load_picture(sys.argv[1])
print((peak() - before) / (pixels.size / 3))
"""
    command = [sys.executable, "-c", code, tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < most
