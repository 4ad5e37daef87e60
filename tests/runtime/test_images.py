import io
import os
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastface_trt.errors import BadPicture, install_hint
from fastface_trt.runtime.images import load_picture
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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_refuse_good_pixels(monkeypatch):
    data = encoded(Image.fromarray(gradient()), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    np.testing.assert_array_equal(load_picture(data), gradient())

    def fail(_image):
        raise ValueError("bad EXIF")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
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
