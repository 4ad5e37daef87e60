"""What the tests of the HTTP surface share: an app over a fake worker, and a face to send."""

import base64
import contextlib
import json

from starlette.testclient import TestClient

from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.mini import folders
from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.settings import ServerSettings
from tests.serving.scripted_worker import ScriptedWorker

FACE_BYTES = (folders.SAMPLE_FACES / "ada.png").read_bytes()
FACE = base64.b64encode(FACE_BYTES).decode()
PROMPT = "a portrait in a garden"


def mini_manifest():
    return read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)


@contextlib.contextmanager
def client_of(worker=None, *, app_options=None, key=None, **settings):
    """A client of an app with these settings; `client.worker` is its worker."""
    worker = worker or ScriptedWorker()
    app = create_app(worker, ServerSettings(**settings), mini_manifest(), **(app_options or {}))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client:
        client.worker = worker
        yield client


def ask(client, path="/v1/images/generations", **fields):
    body = {"prompt": PROMPT, **({} if {"face_id", "face_url"} & fields.keys() else {"face": FACE})}
    return client.post(path, json={name: v for name, v in (body | fields).items() if v is not ...})


def error_of(response, status, code):
    """The error of a response, which must have this status and code, in OpenAI's shape."""
    assert response.status_code == status, response.text
    ((name, error),) = response.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert response.headers["x-request-id"].startswith("req_")
    return error


def events_of(text):
    """The events of a stream: (name, data) pairs."""
    found = []
    for block in text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found
