"""Write the hostile pictures of tests/fuzz/hostile: `python tests/fuzz/make_hostile.py`.

Each is made to break a reader in one way, and is small; none comes from anywhere else. They are
kept as files so that a change of an encoder cannot change what is tested.
"""

import sys
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image

from tests.fuzz.hostile_parts import (
    SIDE,
    after_start,
    anmf,
    bmp,
    chunk,
    encoded,
    exif_bomb,
    exif_tiff,
    good_png,
    grey,
    ihdr,
    jpeg,
    jpeg_tables,
    png,
    riff,
    rows,
    segment,
    sof,
    sos,
    tiff,
    vp8x,
    webp_chunk,
    webp_frame,
)

FOLDER = Path(__file__).parent / "hostile"
MEGABYTE = zlib.compress(bytes(1_000_000), 9)


def pngs():
    """Name and bytes of every hostile PNG."""
    idat, end = chunk(b"IDAT", rows()), chunk(b"IEND")
    palette = chunk(b"PLTE", bytes(range(30)))
    text = [chunk(b"zTXt", b"name\0\0" + MEGABYTE)] * 4
    international = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + MEGABYTE)
    large = zlib.compress(bytes(4_000_000), 9)
    return {
        "bomb-within-cap": png(ihdr(1900, 1900, 1, 0), chunk(b"IDAT", rows(1900, 1900, 1)), end),
        "bomb-of-size": png(ihdr(65535, 65535, 1, 0), idat, end),
        "largest-size": png(ihdr(2**31 - 1, 2**31 - 1), idat, end),
        "negative-size": png(ihdr(2**32 - 1, 2**32 - 1), idat, end),
        "no-size": png(ihdr(0, 0), idat, end),
        "no-height": png(ihdr(SIDE, 0), idat, end),
        "one-long-row": png(ihdr(3_000_000, 1), idat, end),
        "text-bombs": good_png(*text),
        "xmp-bomb": good_png(international),
        "profile-bomb": good_png(chunk(b"iCCP", b"name\0\0" + MEGABYTE)),
        "more-data-than-pixels": good_png(data=large),
        "less-data-than-pixels": png(ihdr(1000, 1000), chunk(b"IDAT", rows()), end),
        "exif-bomb": good_png(chunk(b"eXIf", exif_bomb())),
        "exif-of-itself": good_png(chunk(b"eXIf", exif_tiff([(0x8769, 4, 1, 8)]))),
        "exif-beyond-end": good_png(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
        "wrong-checksum": png(ihdr(), chunk(b"IDAT", rows(), crc=1), end),
        "two-headers": png(ihdr(), ihdr(60000, 60000), idat, end),
        "header-after-pixels": png(ihdr(), idat, ihdr(60000, 60000), end),
        "header-second": png(chunk(b"tEXt", b"a\0b"), ihdr(), idat, end),
        "header-too-long": png(chunk(b"IHDR", ihdr()[8:21] + b"xx"), idat, end),
        "no-header": png(idat, end),
        "no-pixels": png(ihdr(), end),
        "no-end": png(ihdr(), idat),
        "only-signature": png(),
        "chunk-without-end": png(ihdr(), b"\xff\xff\xff\xffIDAT" + rows()),
        "chunk-of-2GB": png(ihdr(), b"\x7f\xff\xff\xfftEXt"),
        "unknown-critical-chunk": good_png(chunk(b"ABCD", b"x")),
        "pixels-not-deflated": good_png(data=b"not deflated at all"),
        "pixels-end-early": good_png(data=rows()[:-6]),
        "unknown-filter": good_png(data=rows(filter_type=9)),
        "unknown-colour": png(ihdr(colour=5), idat, end),
        "unknown-depth": png(ihdr(depth=7), idat, end),
        "unknown-compression": png(ihdr(compression=3), idat, end),
        "unknown-interlace": png(ihdr(interlace=9), idat, end),
        "interlaced": png(ihdr(interlace=1), idat, end),
        "no-palette": png(ihdr(colour=3), chunk(b"IDAT", rows(bits=8)), end),
        "palette-too-short": png(
            ihdr(colour=3), palette, chunk(b"IDAT", zlib.compress(b"\0" + b"\xff" * 600)), end
        ),
        "palette-too-long": png(ihdr(colour=3), chunk(b"PLTE", bytes(3000)), idat, end),
        "transparency-too-long": good_png(chunk(b"tRNS", bytes(4000))),
        "transparency-empty": good_png(chunk(b"tRNS")),
        "empty-chunks": good_png(*[chunk(b"tEXt", b"")] * 300),
        "many-frames": good_png(
            chunk(b"acTL", b"\xff\xff\xff\xff\0\0\0\0"),
            chunk(b"fcTL", bytes(4) + b"\xff" * 8 + bytes(14)),
            chunk(b"fdAT", bytes(4) + rows()),
        ),
        "something-behind": good_png() + b"\0" * 2000,
    }


def jpegs():
    """Name and bytes of every hostile JPEG."""
    good = encoded("JPEG")
    tables = jpeg_tables(good)
    scan = sos()
    grey = ((1, 0x11),)
    empty_scans = [sos((1,), 1, 63, 0, b"\xff\x00")] * 300
    exif = segment(0xE1, b"Exif\0\0" + exif_bomb())
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "bomb-of-size": jpeg(sof(65535, 65535), tables, scan),
        "no-height": jpeg(sof(SIDE, 0), tables, scan),
        "no-width": jpeg(sof(0, SIDE), tables, scan),
        "two-sizes": jpeg(sof(SIDE, SIDE), sof(60000, 60000), tables, scan),
        "many-scans": jpeg(
            sof(1900, 1900, 0xC2, components=grey), tables, sos((1,), 0, 0), *empty_scans
        ),
        "little-data": jpeg(sof(1900, 1900), tables, scan),
        "no-tables": jpeg(sof(SIDE, SIDE), scan),
        "tables-of-noise": jpeg(sof(SIDE, SIDE), segment(0xC4, b"\x00" + b"\xff" * 300), scan),
        "tables-too-long": jpeg(segment(0xDB, b"\xff" * 500), sof(SIDE, SIDE), scan),
        "no-size": jpeg(tables, scan),
        "no-scan": jpeg(sof(SIDE, SIDE), tables),
        "no-end": good[:-2],
        "ends-in-pixels": good[: len(good) - 40],
        "ends-in-a-segment": good[:30],
        "segment-of-length-0": after_start(good, b"\xff\xe5\x00\x00"),
        "segment-of-length-1": after_start(good, b"\xff\xe5\x00\x01"),
        "segment-beyond-end": after_start(good, b"\xff\xe5\xff\xff"),
        "fill-bytes": good[:2] + b"\xff" * 3000 + good[2:],
        "only-fill-bytes": b"\xff\xd8" + b"\xff" * 3000,
        "many-segments": after_start(good, *[segment(0xFE, b"")] * 700),
        "noise-between-segments": good[:2] + b"noise" + good[2:],
        "exif-bomb": after_start(good, exif),
        "exif-in-parts": after_start(good, *[segment(0xE1, b"Exif\0\0" + b"x" * 300)] * 8),
        "exif-beyond-end": after_start(good, segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")),
        "exif-wrong-type": after_start(
            good, segment(0xE1, b"Exif\0\0" + exif_tiff([(0x0112, 2, 9999, 2**31)]))
        ),
        "exif-orientation-99": after_start(
            good, segment(0xE1, b"Exif\0\0" + exif_tiff([(0x0112, 3, 1, 99)]))
        ),
        "profile-in-missing-parts": after_start(
            good, segment(0xE2, b"ICC_PROFILE\0\xff\xff" + bytes(100))
        ),
        "profile-part-too-short": after_start(good, segment(0xE2, b"ICC_PROFILE\0")),
        "photoshop-block": after_start(
            good, segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff")
        ),
        "adobe-too-short": after_start(good, segment(0xEE, b"Adobe")),
        "many-pictures": after_start(
            good, segment(0xE2, b"MPF\0" + exif_tiff([(0xB001, 4, 1, 2**31)]))
        ),
        "arithmetic": jpeg(sof(SIDE, SIDE, 0xC9), tables, scan),
        "lossless": jpeg(sof(SIDE, SIDE, 0xC3), tables, scan),
        "12-bit": jpeg(sof(SIDE, SIDE, 0xC1, precision=12), tables, scan),
        "255-components": jpeg(
            sof(SIDE, SIDE, components=tuple((name, 0x11) for name in range(255))), tables, scan
        ),
        "no-components": jpeg(sof(SIDE, SIDE, components=()), tables, scan),
        "two-components": jpeg(sof(SIDE, SIDE, components=grey * 2), tables, scan),
        "sampling-0": jpeg(sof(SIDE, SIDE, components=((1, 0x00),)), tables, sos((1,))),
        "sampling-15": jpeg(sof(SIDE, SIDE, components=((1, 0xFF),)), tables, sos((1,))),
        "cmyk-without-adobe": encoded("JPEG", Image.new("CMYK", (SIDE, SIDE))).replace(
            b"Adobe", b"Nobody", 1
        ),
        "turned": encoded("JPEG", exif=turned),
        "only-start": b"\xff\xd8\xff",
        "start-and-end": b"\xff\xd8\xff\xd9",
    }


def webps():
    """Name and bytes of every hostile WebP."""
    lossy, lossless = encoded("WEBP", quality=50), encoded("WEBP", lossless=True)
    frame, large = webp_frame(lossy), b"\x2f" + (0x3FFF | 0x3FFF << 14).to_bytes(4, "little")
    animated = 0x02
    anim = webp_chunk(b"ANIM", bytes(6))
    return {
        "canvas-of-2-to-24": riff(vp8x(2**24, 2**24), frame),
        "canvas-of-16384": riff(vp8x(16384, 16384), frame),
        "canvas-unlike-frame": riff(vp8x(1900, 1900), frame),
        "canvas-smaller-than-frame": riff(vp8x(16, 16), frame),
        "animated-canvas": riff(vp8x(1900, 1900, animated), anim, anmf(frame)),
        "bomb-of-size": riff(webp_chunk(b"VP8L", large + bytes(20))),
        "bomb-of-size-lossy": riff(
            webp_chunk(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(20))
        ),
        "no-chunks": riff(),
        "short": b"RIFF\x04\0\0\0WEBP",
        "size-beyond-end": riff(frame, size=2**32 - 1),
        "size-0": riff(frame, size=0),
        "chunk-beyond-end": riff(webp_chunk(b"VP8 ", b"abc", size=2**32 - 1)),
        "chunk-empty": riff(webp_chunk(b"VP8 ")),
        "lossless-empty": riff(webp_chunk(b"VP8L", large)),
        "extended-too-short": riff(webp_chunk(b"VP8X", b"abc"), frame),
        "extended-twice": riff(vp8x(SIDE, SIDE), vp8x(16000, 16000), frame),
        "extended-after-frame": riff(frame, vp8x(16000, 16000)),
        "two-frames": riff(vp8x(SIDE, SIDE), frame, webp_frame(lossless)),
        "many-frames": riff(
            vp8x(SIDE, SIDE, animated), anim, *[webp_chunk(b"ANMF", bytes(16))] * 200
        ),
        "frame-outside": riff(vp8x(SIDE, SIDE, animated), anim, anmf(frame, x=2**23, y=2**23)),
        "frame-larger": riff(
            vp8x(SIDE, SIDE, animated), anim, anmf(frame, width=16000, height=16000)
        ),
        "frame-in-frame": riff(vp8x(SIDE, SIDE, animated), anim, anmf(anmf(anmf(frame)))),
        "animated-without-frames": riff(vp8x(SIDE, SIDE, animated), anim),
        "alpha-of-noise": riff(vp8x(SIDE, SIDE, 0x10), webp_chunk(b"ALPH", b"\xff" * 50), frame),
        "exif-bomb": riff(vp8x(SIDE, SIDE, 0x08), frame, webp_chunk(b"EXIF", exif_bomb())),
        "profile-of-noise": riff(vp8x(SIDE, SIDE, 0x20), webp_chunk(b"ICCP", b"x" * 99), frame),
        "all-flags": riff(vp8x(SIDE, SIDE, 0xFF), frame),
        "ends-in-pixels": lossy[: len(lossy) - 20],
        "lossless-ends-in-pixels": lossless[: len(lossless) - 20],
        "riff-in-riff": riff(riff(frame)),
        "noise-behind": lossy + b"\xff" * 1000,
    }


def tiffs():
    """Name and bytes of every hostile TIFF."""
    strip = bytes(SIDE * SIDE)
    everything = 7, 2**31, 0
    tables = jpeg_tables(encoded("JPEG"))
    scans = jpeg(
        sof(1900, 1900, 0xC2, components=((1, 0x11),)),
        *(tables, sos((1,), 0, 0), *[sos((1,), 1, 63, 0, b"\xff\x00")] * 300),
    )
    return {
        "good": tiff(grey(), strip),
        "good-big": tiff(grey(tag256=(16, [SIDE])), strip, big=True, order=">"),
        "many-scans": tiff(grey(1900, 1900, tag259=7), scans),
        "bomb-of-size": tiff(grey(60000, 60000), strip),
        "bomb-of-strips": tiff(
            grey(16, 200_000, tag278=1, tag273=(4, 200_000, 8), tag279=(4, 200_000, 8)), strip
        ),
        "strips-of-the-same-bytes": tiff(
            grey(SIDE, 600, tag278=1, tag273=(4, [8] * 600), tag279=(4, [len(strip)] * 600)), strip
        ),
        "strips-beyond-end": tiff(grey(tag273=(4, [2**31])), strip),
        "strips-missing": tiff(grey(tag278=1), strip),
        "fields-of-everything": tiff(
            grey(tag270=everything, tag700=everything, tag34377=everything), strip
        ),
        "palette-of-everything": tiff(grey(tag262=3, tag320=(3, 2**31, 0)), strip),
        "tables-of-everything": tiff(grey(tag259=7, tag347=(7, 2**32 - 1, 0)), strip),
        "huge-tiles": tiff(
            grey(tag322=2**20, tag323=2**20, tag324=(4, [8]), tag325=(4, [9])), strip
        ),
        "tiles-of-no-size": tiff(grey(tag322=0, tag323=0, tag324=(4, [8]), tag325=(4, [9]))),
        "no-width": tiff(grey(0, SIDE), strip),
        "no-rows": tiff(grey(tag278=0), strip),
        "many-samples": tiff(grey(tag277=65535, tag284=2), strip),
        "many-entries": tiff(grey(), strip, count=65535),
        "entries-of-2-to-63": tiff(grey(), strip, big=True, count=2**63),
        "directory-beyond-end": b"II*\0\xff\xff\xff\xff",
        "big-directory-beyond-end": b"MM\0+\0\x08\0\0" + b"\xff" * 8,
        "only-start": b"II*\0",
        "floats": tiff(grey(tag258=32, tag339=3), bytes(4 * SIDE * SIDE)),
        "deflate-bomb": tiff(grey(tag259=8), MEGABYTE),
        "deflate-of-noise": tiff(grey(tag259=8), b"not deflated at all"),
        "lzw-of-noise": tiff(grey(tag259=5), b"\xff" * 500),
        "packbits-of-noise": tiff(grey(tag259=32773), b"\x81" * 500),
        "packbits-that-ends": tiff(grey(tag259=32773), b"\x7f"),
        "fax": tiff(grey(tag259=4, tag258=1), strip),
        "old-jpeg": tiff(grey(tag259=6), strip),
        "unknown-compression": tiff(grey(tag259=60000), strip),
        "types-unknown": tiff(grey(tag256=(99, 1, SIDE)), strip),
    }


def bmps():
    """Name and bytes of every hostile BMP."""
    jump = b"\0\x02\xff\xff"  # moves by 255 rows
    return {
        "good": bmp(),
        "good-from-the-top": bmp(SIDE, -SIDE),
        "rows-of-jumps": bmp(2**20, 16, 8, 1, jump * 100),
        "rows-of-jumps-in-4-bits": bmp(2**20, 16, 4, 2, jump * 100),
        "bomb-of-size": bmp(60000, 60000, data=b""),
        "larger-than-its-rows": bmp(1900, 1900, data=bytes(1000)),
        "negative-width": bmp(-SIDE, SIDE, data=bytes(2000)),
        "lowest-height": bmp(SIDE, -(2**31), data=bytes(2000)),
        "no-depth": bmp(1900, 1900, 0, data=b""),
        "png-inside": bmp(compression=5, data=good_png()),
        "unknown-header": bmp(header=41),
        "header-beyond-end": bmp(data=b"", header=2**31),
        "only-start": b"BM",
    }


def others():
    """Name and bytes of what is no picture that is read here, though it may say so."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", bytes(1_000_000))
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    return {
        "empty": b"",
        "one-byte": b"\x89",
        "zeros": bytes(2000),
        "text.png": b"I am a PNG picture, believe me.",
        "page.html": b"<!doctype html><script>alert(1)</script>",
        "drawing.svg": svg,
        "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\n",
        "document.pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>",
        "archive.zip": archive.getvalue(),
        "animation.gif": encoded("GIF"),
        "bitmap.bmp": encoded("BMP"),
        "fax.tiff": encoded("TIFF"),
        "icon.ico": encoded("ICO"),
        "jpeg2000.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
        "avif": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(100),
        "png-then-zip.png": good_png() + archive.getvalue(),
        "html-in-jpeg.jpg": after_start(
            encoded("JPEG"), segment(0xFE, b"<script>alert(1)</script>")
        ),
    }


def hostile():
    """File name and bytes of all of them."""
    kinds = (
        *(("png", pngs()), ("jpg", jpegs()), ("webp", webps())),
        *(("tiff", tiffs()), ("bmp", bmps()), ("other", others())),
    )
    return {f"{kind}-{name}": data for kind, files in kinds for name, data in files.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    for name, data in hostile().items():
        (FOLDER / name).write_bytes(data)
    sizes = [path.stat().st_size for path in FOLDER.iterdir()]
    sys.stdout.write(f"{len(sizes)} files, {sum(sizes)} bytes, the largest {max(sizes)}\n")
