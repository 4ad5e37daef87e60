"""The page's routes and files: closed headers, nothing missing, nothing from elsewhere."""

import fnmatch
import re
from importlib import resources
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.serving.ui.page import FILES, page_router
from tests.serving.http.http_parts import client_of, mini_manifest

FOLDER = Path(str(resources.files("fastface_trt.serving.ui")))
REFERENCE = re.compile(r"""(?:src|href)="([^"]+)"|from "([^"]+)"|url\(([^)]+)\)""")
TYPE_OF = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def client():
    with client_of(ui=True, api_keys=("a-key-of-this-server",)) as client:
        yield client


def referenced(name):
    """Addresses that a file of the page names."""
    found = REFERENCE.findall((FOLDER / name).read_text())
    return {next(filter(None, groups)).replace("./", "/ui/") for groups in found}


def test_everything_that_is_referenced_is_served(client):
    reached, waiting = set(), {"index.html"}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        for address in referenced(name):
            answer = client.get(address)
            assert answer.status_code == 200, f"{name} names {address}"
            assert address.startswith("/ui/")
            waiting |= {address.removeprefix("/ui/")} - reached
    assert reached == {"index.html", *FILES}  # and nothing is served that nobody needs


def test_files_come_as_they_are_with_their_types(client):
    for name in FILES:
        answer = client.get(f"/ui/{name}")
        assert answer.content == (FOLDER / name).read_bytes()
        assert answer.headers["content-type"].split(";")[0] == TYPE_OF[name.split(".")[-1]]
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("address", ["/", "/ui/main.js", "/ui/samples.json", "/ui/samples/ada.png"])
def test_headers_keep_the_page_closed(client, address):
    headers = client.get(address).headers
    directives = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert directives.pop("img-src") == "'self' data: blob:"
    for name in ("script-src", "style-src", "connect-src"):
        assert directives.pop(name) == "'self'"
    assert directives.pop("require-trusted-types-for") == "'script'"
    closed = ("default-src", "frame-ancestors", "base-uri", "form-action", "trusted-types")
    assert directives == dict.fromkeys(closed, "'none'")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_a_browser_asks_again_and_is_told_that_nothing_changed(client):
    first = client.get("/ui/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/ui/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/ui/api.js", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "/ui/page.py",
        "/ui/__init__.py",
        "/ui/index.html",
        "/ui/",
        "/ui/..%2Fpage.py",
        "/ui/%2e%2e/settings.py",
        "/ui/samples/..%2Fonnx%2Fmanifest.json",
        "/ui/samples/README.md",
        "/ui/samples/",
    ],
)
def test_other_names_are_not_found(client, address):
    assert client.get(address).status_code == 404


def test_the_page_is_public_and_the_api_is_not(client):
    assert client.get("/").status_code == 200
    assert client.get("/v1/models").status_code == 401


def test_no_page_unless_asked_for():
    with client_of() as client:
        assert client.get("/").status_code == 404
        assert client.get("/ui/main.js").status_code == 404


def test_samples_are_those_of_the_mini_model(client):
    names = client.get("/ui/samples.json").json()["data"]
    assert names == sorted(path.name for path in SAMPLE_FACES.glob("*.png"))
    assert client.get("/ui/samples/ada.png").content == (SAMPLE_FACES / "ada.png").read_bytes()


def test_another_model_has_no_samples():
    from fastapi import FastAPI

    app = FastAPI()
    app.include_router(page_router(mini_manifest().model_copy(update={"checkpoint": "other"})))
    client = TestClient(app)
    assert client.get("/ui/samples.json").json() == {"data": []}
    assert client.get("/ui/samples/ada.png").status_code == 404


@pytest.mark.parametrize("name", ["index.html", *FILES])
def test_nothing_comes_from_elsewhere_and_nothing_is_inline(name):
    text = (FOLDER / name).read_text()
    addresses = set(re.findall(r"""(?:https?:)?//[\w.-]+\.\w+[^\s"')]*""", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    if name.endswith(".html"):
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_the_package_carries_every_file():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fastface_trt.serving.ui"]
    for path in FOLDER.iterdir():
        if path.is_file() and path.suffix != ".py":
            assert path.name in {"index.html", *FILES}, f"{path.name} is never served"
            assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path.name
