"""The routes of the page: files of the package by a fixed table, with headers that keep it closed.

Nothing of a request becomes part of a path, and nothing is read from disk after the start.
"""

import hashlib
import json
from importlib import resources

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.mini.folders import SAMPLE_FACES

PAGE = "index.html"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "png": "image/png",
}
FILES = (
    "api.js",
    "card.js",
    "compare.js",
    "details.js",
    "dial.js",
    "dom.js",
    "face.js",
    "gallery.js",
    "icon.svg",
    "key.js",
    "main.js",
    "parameters.js",
    "pictures.css",
    "registered.js",
    "report.js",
    "runner.js",
    "stream.js",
    "style.css",
)
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked for again each time, answered by 304: after an update, no old script meets a new page.
    "Cache-Control": "no-cache",
}


class PageFile:
    """One file in memory, and the content security policy that it is shown under."""

    def __init__(self, name: str, data: bytes, policy: str = CONTENT_SECURITY_POLICY) -> None:
        self._data, self._type = data, TYPES[name.rpartition(".")[2]]
        self._policy = policy
        self._tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'

    def answer(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        headers = {**HEADERS, "Content-Security-Policy": self._policy, "ETag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=headers)
        return Response(self._data, media_type=self._type, headers=headers)


def page_router(manifest: ExportManifest) -> APIRouter:
    """The page and its files; with the mini model also the drawn faces that it was trained on."""
    folder = resources.files("fastface_trt.serving.ui")
    page = PageFile(PAGE, (folder / PAGE).read_bytes())
    files = {name: PageFile(name, (folder / name).read_bytes()) for name in FILES}
    samples = sample_faces(manifest)
    listed = json.dumps({"data": sorted(samples)}).encode("ascii")
    files["samples.json"] = PageFile("samples.json", listed)
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index(request: Request) -> Response:
        """The page."""
        return page.answer(request)

    @router.get("/ui/{file}")
    async def file(request: Request, file: str) -> Response:
        """A file of the page."""
        return _one(files, file).answer(request)

    @router.get("/ui/samples/{name}")
    async def sample(request: Request, name: str) -> Response:
        """A drawn face to try."""
        return _one(samples, name).answer(request)

    return router


def sample_faces(manifest: ExportManifest) -> dict[str, PageFile]:
    """The drawn faces by file name; none for other models, which see no face in a drawing."""
    if manifest.checkpoint != "mini":
        return {}
    found = sorted(SAMPLE_FACES.glob("*.png"))
    return {path.name: PageFile(path.name, path.read_bytes()) for path in found}


def _one(files: dict[str, PageFile], name: str) -> PageFile:
    if name not in files:
        raise HTTPException(404, "There is no such file")
    return files[name]
