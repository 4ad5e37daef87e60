"""From pixels to the bytes of a file: what libraries need for it, and what they make of it.

`python -m benchmarks.picture_encoding` encodes one picture after the other with every way that is
installed, prints a table, and writes benchmarks/results/picture-encoding.json. All ways take turns,
so that what else runs on the machine meets all of them; times are medians of many turns, by the
clock and as processor time of all threads, which a loaded machine distorts less. Two pictures of
1024²: `photograph`, made here, and noise, which is what weights that are drawn at random give. What
a PNG decodes to is compared with the picture.

Ours is `fastface_trt.runtime.picture_file` with its metadata. Optional: pip install opencv-python
isal zlib-ng fpng-py. The deflate libraries compress rows that are filtered as ours are.
"""

import io
import json
import platform
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt.measure.machine import describe_machine, load_average
from fastface_trt.measure.tables import Table, markdown_rows
from fastface_trt.runtime.picture_file import PictureFormat, encode_picture

Pixels = NDArray[np.uint8]
Encode = Callable[[Pixels], bytes]

RESULTS = Path(__file__).parent / "results" / "picture-encoding.json"
SIDE = 1024
BASELINE = "Pillow, as it is"
OURS = "ours"
STRATEGIES = ("default", "filtered", "Huffman", "RLE", "fixed")


@dataclass(frozen=True)
class Way:
    """One way to a file."""

    format: PictureFormat
    name: str
    encode: Encode


@dataclass(frozen=True)
class Result:
    """Median milliseconds and bytes of one way and picture; ratios are to Pillow's PNG.

    faster, cheaper: how many times by the clock and in
    processor time, medians over turns of the ratio within a turn.
    """

    picture: str
    format: str
    way: str
    milliseconds: float
    processor_milliseconds: float
    bytes: int
    faster: float
    cheaper: float
    size: float


def photograph(side: int = SIDE, seed: int = 0) -> Pixels:
    """A picture with a photograph's statistics, RGB uint8 [side, side, 3].

    Slow gradients of a sky and a ground; 60 shaded ellipses with edges one and a half pixels wide
    and colours of their own, as objects have; fine texture, blurred over a few pixels, on the right
    half; and a sensor's noise, of 2 grey levels, in every pixel and channel.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    picture = np.stack(
        [
            120 + 70 * np.sin(3 * x + 1) + 40 * y,
            110 + 60 * np.cos(2 * y + x) + 30 * x,
            140 + 50 * np.sin(2 * (x - y)) - 20 * y,
        ],
        axis=-1,
    )
    for _ in range(60):
        centre_x, centre_y = rng.uniform(0, 1, 2)
        radius, flatness = rng.uniform(0.02, 0.18), rng.uniform(0.6, 1.6)
        colour = rng.uniform(20, 235, 3)
        distance = np.hypot(x - centre_x, (y - centre_y) * flatness)
        inside = np.clip((radius - distance) * side / 1.5 + 0.5, 0, 1)[..., None]
        shade = 1 - 0.4 * np.clip(distance / radius, 0, 1)[..., None]
        picture = picture * (1 - inside) + inside * colour * shade
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    blur = np.exp(-2 * (np.pi * 1.5 * frequency) ** 2)
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * blur, (side, side))
    picture += (12 * texture * (x > 0.5))[..., None]
    picture += rng.normal(0, 2, picture.shape)
    return np.rint(picture.clip(0, 255)).astype(np.uint8)


def noise(side: int = SIDE, seed: int = 0) -> Pixels:
    """Independent uniform bytes."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def ways() -> Iterator[Way]:
    """Every way that is installed, Pillow's default first."""
    yield Way("png", BASELINE, lambda p: _pillow(p, "PNG"))
    yield Way("png", OURS, lambda p: encode_picture(p, parameters={}))
    for level in range(1, 10):
        yield Way("png", f"Pillow, level {level}", lambda p, n=level: _pillow(p, "PNG", n))
    for at, strategy in enumerate(STRATEGIES[1:], 1):
        yield Way(
            "png",
            f"Pillow, level 1, {strategy}",
            lambda p, s=at: _pillow(p, "PNG", 1, compress_type=s),
        )
    yield from _opencv()
    yield from _deflaters()
    for package in ("fpng_py", "fpng_py_fix"):  # one code, wheels for different Pythons
        if (fpng := _package(package)) is not None:
            yield Way(
                "png",
                package,
                lambda p, f=fpng: f.fpng_encode_image_to_memory(p.tobytes(), *p.shape[1::-1], 3),
            )
    for quality in (75, 90, 95, 100):
        for form in ("jpeg", "webp"):
            yield Way(form, f"ours, quality {quality}", _ours(form, quality))
    for method in (0, 2, 4, 6):
        yield Way(
            "webp",
            f"Pillow, quality 90, method {method}",
            lambda p, m=method: _pillow(p, "WEBP", quality=90, method=m),
        )


def measure(pictures: dict[str, Pixels], turns: int, chosen: list[Way]) -> list[Result]:
    """Each way on each picture, in turns; raises AssertionError for a PNG that is another."""
    results = []
    for name, picture in pictures.items():
        seconds: dict[str, list[tuple[float, float]]] = {_key(way): [] for way in chosen}
        files = {}
        for turn in range(-1, turns):  # the first is for caches and imports
            for way in chosen:
                started = perf_counter(), process_time()
                files[_key(way)] = data = way.encode(picture)
                ended = perf_counter(), process_time()
                if turn >= 0:
                    seconds[_key(way)].append((ended[0] - started[0], ended[1] - started[1]))
                elif way.format == "png":
                    with Image.open(io.BytesIO(data)) as image:
                        same = np.array_equal(np.asarray(image.convert("RGB")), picture)
                    assert same, f"{way.name} changes the {name}"
        base = _key(chosen[0])
        for way in chosen:
            taken = np.array(seconds[_key(way)])
            clock, processor = np.median(1000 * taken, axis=0)
            faster, cheaper = np.median(np.array(seconds[base]) / taken, axis=0)
            results.append(
                Result(
                    name,
                    way.format,
                    way.name,
                    round(float(clock), 2),
                    round(float(processor), 2),
                    len(files[_key(way)]),
                    round(float(faster), 2),
                    round(float(cheaper), 2),
                    round(len(files[_key(way)]) / len(files[base]), 3),
                )
            )
    return results


def table(results: list[Result]) -> Table:
    """The results as a table."""
    return Table(
        "Encoding a picture, times as fast and as cheap as Pillow",
        ("picture", "format", "way", "ms", "processor ms", "faster", "cheaper", "kB", "size"),
        tuple(
            (
                one.picture,
                one.format,
                one.way,
                f"{one.milliseconds:.1f}",
                f"{one.processor_milliseconds:.1f}",
                f"{one.faster:.1f}",
                f"{one.cheaper:.1f}",
                f"{one.bytes / 1000:.0f}",
                f"{one.size:.2f}",
            )
            for one in results
        ),
        words=3,
    )


def _key(way: Way) -> str:
    return f"{way.format}: {way.name}"


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def _pillow(picture: Pixels, form: str, level: int | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    more = {} if level is None else {"compress_level": level}
    Image.fromarray(picture).save(buffer, form, **options, **more)
    return buffer.getvalue()


def _ours(form: PictureFormat, quality: int) -> Encode:
    return lambda p: encode_picture(p, parameters={}, format=form, quality=quality)


def _opencv() -> Iterator[Way]:
    cv2 = _package("cv2")
    if cv2 is None:
        return

    def encode(suffix: str, flags: list[int]) -> Encode:
        def run(picture: Pixels) -> bytes:
            done, data = cv2.imencode(suffix, picture[:, :, ::-1], flags)
            assert done
            return bytes(data)

        return run

    for at, strategy in enumerate(STRATEGIES):
        flags = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, at]
        yield Way("png", f"OpenCV, level 1, {strategy}", encode(".png", flags))
        if strategy not in ("Huffman", "RLE") or not hasattr(cv2, "IMWRITE_PNG_FILTER"):
            continue
        for filters in ("FILTER_SUB", "FILTER_UP", "FILTER_AVG", "FAST_FILTERS", "ALL_FILTERS"):
            chosen = [*flags, cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_{filters}")]
            label = filters.lower().replace("_", " ")
            yield Way("png", f"OpenCV, level 1, {strategy}, {label}", encode(".png", chosen))
    yield Way("jpeg", "OpenCV, quality 90", encode(".jpg", [cv2.IMWRITE_JPEG_QUALITY, 90]))
    yield Way("webp", "OpenCV, quality 90", encode(".webp", [cv2.IMWRITE_WEBP_QUALITY, 90]))


def _deflaters() -> Iterator[Way]:
    """A PNG in one piece on one thread, by zlib and by what promises to be faster than it."""

    def encode(deflate: Callable[[bytes], bytes]) -> Encode:
        def run(picture: Pixels) -> bytes:
            height, width, _ = picture.shape
            rows = _averaged(picture.reshape(height, -1))
            header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
            chunks = ((b"IHDR", header), (b"IDAT", deflate(rows.tobytes())), (b"IEND", b""))
            return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*one) for one in chunks)

        return run

    def strategic(strategy: int) -> Callable[[bytes], bytes]:
        def deflate(data: bytes) -> bytes:
            stream = zlib.compressobj(1, strategy=strategy)
            return stream.compress(data) + stream.flush()

        return deflate

    yield Way("png", "zlib, level 1", encode(lambda data: zlib.compress(data, 1)))
    yield Way("png", "zlib, Huffman", encode(strategic(zlib.Z_HUFFMAN_ONLY)))
    yield Way("png", "zlib, RLE", encode(strategic(zlib.Z_RLE)))
    for package, module in (("isal", "isal.isal_zlib"), ("zlib-ng", "zlib_ng.zlib_ng")):
        library = _package(module)
        for level in (1, 2) if library is not None else ():
            yield Way(
                "png",
                f"{package}, level {level}",
                encode(lambda data, one=library, n=level: one.compress(data, n)),
            )


def _averaged(rows_HN: Pixels) -> Pixels:
    """Rows behind the number of PNG's filter Average, uint8 [H, 1 + N]."""
    left_HN, above_HN = np.zeros_like(rows_HN), np.zeros_like(rows_HN)
    left_HN[:, 3:], above_HN[1:] = rows_HN[:, :-3], rows_HN[:-1]
    average_HN = (left_HN & above_HN) + ((left_HN ^ above_HN) >> 1)
    return np.insert(rows_HN - average_HN, 0, 3, axis=1)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@click.command()
@click.option("--turns", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--side", default=SIDE, show_default=True, type=click.IntRange(min=16))
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def main(turns: int, side: int, out: Path) -> None:
    """Time every way to encode a picture that is installed."""
    chosen = list(ways())
    results = measure({"photograph": photograph(side), "noise": noise(side)}, turns, chosen)
    report = {
        "machine": describe_machine(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "turns": turns,
        "side": side,
        "results": [asdict(one) for one in results],
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo("\n".join(markdown_rows(table(results))))


if __name__ == "__main__":
    main()
