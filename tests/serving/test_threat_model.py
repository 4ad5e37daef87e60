import re
from pathlib import Path

from fastface_trt.runtime.intake import MAX_ENTRIES, MAX_PARTS, MAX_SCANS
from fastface_trt.runtime.tokenizer import LARGEST_LENGTH
from fastface_trt.serving.http import json_text, multipart, protocol
from fastface_trt.serving.http.context import PICTURE_THREADS, PICTURES_IN_HAND
from fastface_trt.serving.pictures.checks import SECONDS
from fastface_trt.serving.pictures.fetch import MAX_REDIRECTS, RESOLVING_THREADS
from fastface_trt.serving.settings import ServerSettings, WorkerSettings

TEXT = (Path(__file__).parents[2] / "docs" / "threat-model.md").read_text()
NO_LIMITS = {  # what is served, where, and how it looks
    *("export", "backend", "cache", "threads", "engine_options", "licence_acknowledged"),
    *("schedule_of", "port", "telemetry", "ui", "model_names"),
}


def test_every_limit_is_explained_and_no_other():
    fields = {*ServerSettings.model_fields, *WorkerSettings.model_fields}
    named = set(re.findall(r"`([a-z0-9_]+)`", TEXT))
    assert fields - NO_LIMITS - named == set()
    assert named - fields == {"code"}


def test_numbers_are_those_of_the_code():
    for words in (
        f"{MAX_SCANS} scans",
        f"{MAX_PARTS:,} parts",
        f"{MAX_ENTRIES} EXIF entries",
        f"most {MAX_REDIRECTS} redirects",
        f"longer than {SECONDS:g} s",
        f"at most {LARGEST_LENGTH:,} tokens",
        f"{protocol.MAX_HEADERS} headers in {protocol.MAX_HEAD_BYTES:,} bytes",
        f"{protocol.FREE_CHUNKS} chunks, and one more per {protocol.CHUNK_BYTES:,} bytes",
        f"{protocol.MAX_CHUNK_LINE} bytes before a chunk",
        f"pieces of {protocol.JOINED_BYTES:,} bytes",
        f"after {protocol.REFUSAL_SECONDS:g} s, and is read for {protocol.LINGER_SECONDS:g} s more",
        f"on {RESOLVING_THREADS} threads of their own",
        f"{json_text.MAX_REST:,} bytes of a body",
        f"{json_text.MAX_TEXT:,} of one text",
        f"{json_text.MAX_NAMES} names, {json_text.MAX_TEXTS:,} names and texts",
        f"{json_text.MAX_LISTS} lists and objects, {json_text.MAX_DEPTH} levels",
        f"{multipart.MAX_PARTS} parts of a form with {multipart.MAX_HEAD:,} bytes",
        "one picture of each client being decoded or analysed, four in all",
    ):
        assert words in TEXT.replace("\n", " "), words
    assert (PICTURES_IN_HAND, PICTURE_THREADS) == (4, 3)
