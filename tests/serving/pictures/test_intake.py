import base64
import io

import numpy as np
import pytest
from PIL import Image

from fastface_trt.errors import BadPicture
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.intake import MAX_SCANS, take_apart
from fastface_trt.serving.pictures.files import decode_base64, decode_picture
from fastface_trt.serving.settings import ServerSettings
from tests.helpers.made_pictures import HEIC_BEGINNING, encoded, gradient

SETTINGS = ServerSettings()
ORIENTATION = 0x0112


def pictures():
    """Files of every format and kind that the server reads, by name."""
    image = Image.fromarray(gradient())
    palette = image.quantize(16)
    layer = image.convert("RGBA")
    layer.putalpha(Image.fromarray(gradient()[..., 2]))
    icc = b"\0" * 300
    return {
        "png": encoded(image),
        "png text": encoded(image, pnginfo=None, icc_profile=icc),
        "png grey": encoded(image.convert("L")),
        "png 16 bit": encoded(Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257)),
        "png palette": encoded(palette),
        "png palette transparent": encoded(palette, transparency=3),
        "png alpha": encoded(layer),
        "png grey with alpha": encoded(layer.convert("LA")),
        "png two colours": encoded(image.convert("1")),
        "png animated": encoded(image, save_all=True, append_images=[image.rotate(90)] * 3),
        "jpeg": encoded(image, "JPEG", icc_profile=icc, comment=b"hello"),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "jpeg restarts": encoded(image, "JPEG", restart_marker_blocks=1),
        "jpeg grey": encoded(image.convert("L"), "JPEG"),
        "jpeg cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "jpeg rgb": encoded(image, "JPEG", keep_rgb=True),
        "jpeg of two pictures (MPO)": encoded(
            image, "MPO", save_all=True, append_images=[image.rotate(90)]
        ),
        "jpeg grey progressive": encoded(image.convert("L"), "JPEG", progressive=True),
        "jpeg behind": encoded(image, "JPEG") + b"\xff\xda" * 1000,
        "webp": encoded(image, "WEBP"),
        "webp lossless": encoded(image, "WEBP", lossless=True),
        "webp alpha": encoded(layer, "WEBP"),
        "webp profile": encoded(image, "WEBP", icc_profile=icc, xmp=b"<x/>"),
        "webp animated": encoded(
            image, "WEBP", save_all=True, append_images=[image.rotate(90)] * 3, lossless=True
        ),
    }


@pytest.mark.parametrize("name", pictures())
def test_reads_what_the_library_reads(name):
    data = pictures()[name]
    pixels = decode_picture(data, SETTINGS)
    np.testing.assert_array_equal(pixels, load_picture(data))
    assert pixels.flags.owndata or pixels.base is None
    pixels[0, 0] = 7


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(Image.fromarray(gradient()), form, exif=exif)
    np.testing.assert_array_equal(decode_picture(data, SETTINGS), load_picture(data))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_pixel_cap_holds_before_the_decoder_starts(form, monkeypatch):
    data = encoded(Image.fromarray(gradient(100, 100)), form)
    decode_picture(data, ServerSettings(max_picture_pixels=10_000))
    monkeypatch.setattr("PIL.Image.open", None)
    with pytest.raises(BadPicture, match="100 × 100 pixels; at most 9,999"):
        decode_picture(data, ServerSettings(max_picture_pixels=9_999))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_small_pictures_are_refused(form):
    with pytest.raises(BadPicture, match="fewer than 16"):
        decode_picture(encoded(Image.new("RGB", (15, 40)), form), SETTINGS)


@pytest.mark.parametrize("form", ["BMP", "TIFF", "GIF", "PPM", "ICO"])
def test_other_formats_are_refused(form):
    with pytest.raises(BadPicture, match="not a PNG, JPEG or WebP"):
        decode_picture(encoded(Image.fromarray(gradient()), form), SETTINGS)


@pytest.mark.parametrize(("form", "name"), [("AVIF", "AVIF"), ("HEIC", "HEIC")])
def test_heic_and_avif_are_read_only_where_the_operator_says_so(form, name):
    data = HEIC_BEGINNING
    if form == "AVIF":
        data = encoded(Image.fromarray(gradient()), "AVIF")
        read = decode_picture(data, ServerSettings(heif=True))
        np.testing.assert_array_equal(read, load_picture(data))
        with pytest.raises(BadPicture, match="60 × 40 pixels"):
            decode_picture(data, ServerSettings(heif=True, max_picture_pixels=2000))
        with pytest.raises(BadPicture, match="truncated or broken"):
            decode_picture(data[:200], ServerSettings(heif=True))
    with pytest.raises(BadPicture, match=f"a {name} file.*--heif"):
        decode_picture(data, SETTINGS)


def test_bytes_are_bounded():
    data = encoded(Image.fromarray(gradient()))
    with pytest.raises(BadPicture, match="more than 100 bytes"):
        decode_picture(data, ServerSettings(max_body_bytes=100))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_refused_in_the_same_words(form):
    data = encoded(Image.fromarray(gradient()), form)
    for length in range(12, len(data), 7):
        with pytest.raises(BadPicture) as caught:
            decode_picture(data[:length], SETTINGS)
        assert caught.value.message == "The picture is truncated or broken."


def test_scans_of_a_jpeg_are_bounded():
    """Each scan makes the decoder pass over the whole picture, whatever its few bytes hold."""
    data = encoded(Image.fromarray(gradient()), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")  # refines what the scans before it say; again is harmless
    scans = data.count(b"\xff\xda")
    for count, refused in ((MAX_SCANS - scans, False), (MAX_SCANS - scans + 1, True)):
        longer = data[:-2] + data[last:-2] * count + data[-2:]
        assert longer.count(b"\xff\xda") == scans + count
        if refused:
            with pytest.raises(BadPicture):
                decode_picture(longer, SETTINGS)
        else:
            assert decode_picture(longer, SETTINGS).shape == (40, 60, 3)


def test_only_what_pixels_need_reaches_a_decoder():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010E] = "a description"
    extras = {"exif": exif, "icc_profile": b"a profile" * 40}
    image = Image.fromarray(gradient())
    for form, more in (("PNG", {}), ("JPEG", {"comment": b"a comment"}), ("WEBP", {"xmp": b"xmp"})):
        file = take_apart(encoded(image, form, **extras, **more))
        assert (file.format, file.width, file.height, file.orientation) == (form, 60, 40, 6)
        for word in (b"a description", b"a profile", b"a comment", b"xmp", b"Exif", b"EXIF"):
            assert word not in file.data
        with Image.open(io.BytesIO(file.data)) as opened:
            assert not opened.getexif()
    extended = take_apart(encoded(image, "WEBP", **extras)).data
    assert extended[12:16] == b"VP8X"
    assert extended[20] & ~0x12 == 0  # flags say that there is no more than that


def test_base64_with_and_without_data_url():
    data = encoded(Image.fromarray(gradient()))
    text = base64.b64encode(data).decode()
    assert decode_base64(text, SETTINGS) == data
    assert decode_base64(f"data:image/png;base64,{text}", SETTINGS) == data
    assert decode_base64(f"DATA:image/WebP;Base64,{text}", SETTINGS) == data


def lines(text):
    """As RFC 2045 and the command base64 break it."""
    return "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76)) + "\n"


@pytest.mark.parametrize(
    "written",
    [
        lines,
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.rstrip("="),
        lambda text: f"data:image/jpg;charset=utf-8;base64,{text}",
        lambda text: f"data:image/x-png;name=face.png;base64, {lines(text)}",
        lambda text: f" data:;base64,{text.rstrip('=')}",
        lambda text: f"data:application/octet-stream;base64,{text}",
    ],
)
@pytest.mark.parametrize("end", [b"", b"a", b"ab"])
def test_base64_is_read_however_it_is_written(written, end):
    data = bytes(range(256)) + b"\xfb\xff\xfe" + end
    assert decode_base64(written(base64.b64encode(data).decode()), SETTINGS) == data


def test_an_address_in_place_of_a_picture_is_told_where_it_belongs():
    with pytest.raises(BadPicture, match="face_url"):
        decode_base64("https://example.com/a.png", SETTINGS)


@pytest.mark.parametrize(
    "text",
    ["a", "ab==ab==", "====", "=abc", "abc===", "ab*d", "abcé", "ab\0d", "\ud800abc"],
)
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(BadPicture, match="not base64"):
        decode_base64(text, SETTINGS)


@pytest.mark.parametrize(
    "url",
    [
        "data:,abcd",
        "data:text/html;base64,abcd",
        "data:image/svg+xml;base64,abcd",
        "data:image/png,abcd",
        "data:image/png;base64;charset=x,abcd",
        "data:image/png;base64",
        "data:" + "image/png" * 100 + ";base64,abcd",
    ],
)
def test_data_url_of_other_kinds_is_refused(url):
    with pytest.raises(BadPicture, match="data: URL"):
        decode_base64(url, SETTINGS)


def test_base64_size_is_known_before_decoding():
    settings = ServerSettings(max_body_bytes=30)
    assert len(decode_base64("A" * 40, settings)) == 30
    assert len(decode_base64("A" * 38 + "==", ServerSettings(max_body_bytes=28))) == 28
    with pytest.raises(BadPicture, match="more than 30 bytes"):
        decode_base64("?" * 44, settings)  # not even looked at
