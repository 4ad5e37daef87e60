"""Pages of another origin: what a browser asks before it sends, and what it needs to read."""

import pytest

from fastface_trt.errors import InvalidRequest, Unavailable
from fastface_trt.serving.settings import ServerSettings
from tests.serving.http.http_parts import FACE, PROMPT, ask, client_of
from tests.serving.scripted_worker import ScriptedWorker

ORIGIN = "http://localhost:3000"
ROUTES = (
    *("/v1/images/generations", "/v1/images/edits", "/v1/faces", "/v1/faces/face_x", "/v1/models"),
    *("/health", "/metrics", "/openapi.json", "/nothing"),
)


def preflight(client, path, origin=ORIGIN, method="POST", **more):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        **more,
    }
    return client.options(path, headers=headers)


def allowed(answer):
    return answer.headers.get("access-control-allow-origin")


@pytest.mark.parametrize("origins", [(ORIGIN,), ("https://a.example", f"{ORIGIN}/"), ("*",)])
@pytest.mark.parametrize("path", ROUTES)
def test_a_preflight_is_answered_for_every_route_without_a_key(origins, path):
    with client_of(allow_origins=origins, api_keys=("a-long-key",)) as client:
        for method in ("POST", "GET", "DELETE"):
            answer = preflight(client, path, method=method)
            assert answer.status_code == 200
            assert allowed(answer) in (ORIGIN, "*")
            assert method in answer.headers["access-control-allow-methods"]
            told = answer.headers["access-control-allow-headers"].lower()
            assert {"authorization", "content-type"} <= set(told.split(","))
        # Chrome, of a page of the internet and a server of the house.
        private = preflight(client, path, **{"Access-Control-Request-Private-Network": "true"})
        assert private.headers["access-control-allow-private-network"] == "true"


def test_answers_streams_and_errors_may_be_read_by_the_page():
    headers = {"Origin": ORIGIN}
    body = {"prompt": PROMPT, "face": FACE}
    path = "/v1/images/generations"
    with client_of(allow_origins=(ORIGIN,), api_keys=("a-long-key",)) as client:
        refused = client.post(path, json=body, headers=headers)
        assert (refused.status_code, allowed(refused)) == (401, ORIGIN)
        headers["Authorization"] = "Bearer a-long-key"
        for answer, status in (
            (client.post(path, json=body, headers=headers), 200),
            (client.post(path, json={**body, "stream": True}, headers=headers), 200),
            (client.post(path, json={**body, "n": 99}, headers=headers), 400),
            (client.post(path, content=b"x", headers=headers), 415),
            (client.get("/nothing", headers=headers), 404),
            (client.get("/v1/models", headers=headers), 200),
        ):
            assert (answer.status_code, allowed(answer)) == (status, ORIGIN)
            assert "Origin" in answer.headers["vary"]
            exposed = answer.headers["access-control-expose-headers"]
            assert {"Retry-After", "X-Request-Id"} <= set(exposed.split(", "))
            assert answer.headers["x-request-id"]
            assert "access-control-allow-credentials" not in answer.headers


def test_the_servers_own_failures_and_refusals_too():
    class Broken(ScriptedWorker):
        def submit(self, task, on_event):
            raise KeyError

    worker = ScriptedWorker()
    worker.analysis_error = Unavailable("Restarting.")
    for one, status in ((Broken(), 500), (worker, 503)):
        with client_of(one, allow_origins=("*",)) as client:
            client.headers["Origin"] = ORIGIN
            answer = ask(client)
            assert (answer.status_code, allowed(answer)) == (status, "*")
    with client_of(allow_origins=("*",), max_body_bytes=10) as client:
        client.headers["Origin"] = ORIGIN
        assert (ask(client).status_code, allowed(ask(client))) == (413, "*")


def test_without_the_option_there_are_no_such_headers():
    with client_of() as client:
        assert preflight(client, "/v1/images/generations").status_code == 405
        for answer in (
            preflight(client, "/v1/models"),
            client.get("/v1/models", headers={"Origin": ORIGIN}),
        ):
            assert not any(name.startswith("access-control") for name in answer.headers)


def test_another_origin_is_told_nothing():
    with client_of(allow_origins=(ORIGIN,)) as client:
        for origin in ("http://localhost:3001", "https://localhost:3000", "null", "http://evil"):
            assert allowed(preflight(client, "/v1/models", origin)) is None
            assert allowed(client.get("/v1/models", headers={"Origin": origin})) is None


def test_headers_of_one_answer_do_not_stay_for_the_next():
    """The head of a stream is one constant of the module."""
    with client_of(allow_origins=(ORIGIN,)) as client:
        client.headers["Origin"] = ORIGIN
        for _ in range(3):
            answer = ask(client, stream=True)
            names = [name.lower() for name, _ in answer.headers.multi_items()]
            assert names.count("access-control-allow-origin") == 1


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "HTTPS://App.Example.com/", "http://[::1]:8080", "chrome-extension://abc"],
)
def test_what_an_origin_is(origin):
    assert ServerSettings(allow_origins=(origin,)).allow_origins == (origin.lower().rstrip("/"),)


@pytest.mark.parametrize(
    "origin",
    [
        "localhost:3000",
        "example.com",
        "https://example.com/app",
        "http://a b",
        "https://*.a.com",
        "http://a,http://b",
        "",
    ],
)
def test_what_is_none_is_refused_in_one_sentence(origin):
    with pytest.raises(InvalidRequest, match=r"no origin of a web page.*SCHEME://HOST"):
        ServerSettings(allow_origins=(origin,))
