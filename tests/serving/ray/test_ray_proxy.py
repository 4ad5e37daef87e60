"""The proxy's own answers, over doubles of what Ray's proxy sends in each case."""

import asyncio

import httpx
import pytest

from tests.serving.http.http_parts import error_of

pytest.importorskip("fastapi")

from fastface_trt.serving.ray.proxy import middlewares


def start(status, *headers):
    return {"type": "http.response.start", "status": status, "headers": [*headers]}


def body(content, more=False):
    return {"type": "http.response.body", "body": content, "more_body": more}


OUR_ID = (b"x-request-id", b"req_ours")
RAYS_ID = (b"x-request-id", b"b4443e45-rays")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


def get(*messages, path="/v1/models"):
    """What a client gets when Ray's proxy sends these messages."""

    async def proxy(scope, receive, send):
        for message in messages:
            await send(message)

    async def ask():
        (middleware,) = middlewares()
        app = middleware.cls(proxy, *middleware.args, **middleware.kwargs)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://x"
        ) as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_a_replicas_answer_passes_with_one_id():
    answer = get(start(200, OUR_ID, RAYS_ID), body(b"a", True), body(b"b"))
    assert (answer.status_code, answer.content) == (200, b"ab")
    assert answer.headers.get_list("x-request-id") == ["req_ours"]


def test_a_replicas_error_passes():
    answer = get(start(503, OUR_ID, RAYS_ID), body(b"its own words"))
    assert (answer.status_code, answer.content) == (503, b"its own words")


def rays_error(status, *headers):
    return get(start(status, RAYS_ID, *headers), body(b"Request dropped ", True), body(b"..."))


def error_with_rays_id(answer, status, code):
    assert answer.headers.get_list("x-request-id") == ["b4443e45-rays"]
    answer.headers["x-request-id"] = "req_"
    return error_of(answer, status, code)


def test_a_full_queue():
    answer = rays_error(503, (b"retry-after", b"7"))
    error_with_rays_id(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "7"


def test_no_replica():
    answer = rays_error(503)
    error_with_rays_id(answer, 503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0


def test_a_request_that_takes_too_long():
    error_with_rays_id(rays_error(408), 504, "deadline_passed")


def test_a_replica_that_dies_before_it_answers():
    answer = get()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert int(answer.headers["retry-after"]) > 0
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_a_replica_that_dies_in_a_stream():
    answer = get(start(200, OUR_ID, EVENTS), body(b"event: step\ndata: {}\n\n", True))
    events = answer.text.strip().split("\n\n")
    assert events[0] == "event: step\ndata: {}"
    assert events[1].startswith("event: error\n")
    assert '"code": "unavailable"' in events[1]
    whole = get(start(200, OUR_ID, EVENTS), body(b"event: step\ndata: {}\n\n", True), body(b""))
    assert "error" not in whole.text


def test_rays_own_addresses_are_its_own():
    answer = get(start(503, RAYS_ID), body(b"unhealthy"), path="/-/healthz")
    assert answer.content == b"unhealthy"
