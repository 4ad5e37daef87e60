import asyncio
import hmac

import pytest
from starlette.testclient import TestClient

from fastface_trt.serving.http import middleware
from fastface_trt.serving.http.errors import RateLimited
from fastface_trt.serving.http.middleware import RateLimit, client_of_address
from tests.serving.http.http_parts import ask, client_of, error_of

KEYS = ("first-key", "second-key")


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def client():
    with client_of(api_keys=KEYS) as client:
        yield client


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_let_in(client, key):
    assert client.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "first-key"},
        {"Authorization": "Basic first-key"},
        bearer("first-ke"),
        bearer("first-keys"),
        bearer("first-key,second-key"),
        {"Authorization": "Bearer schlüssel".encode("latin-1")},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/faces", "/v1/nothing"])
def test_nothing_else_is(client, headers, path):
    answer = client.get(path, headers=headers)
    assert error_of(answer, 401, "invalid_api_key")["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_request_without_a_key_is_refused_before_its_body_is_read(client):
    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    sent = []
    scope = {"type": "http", "method": "POST", "path": "/v1/faces", "headers": [], "state": {}}
    asyncio.run(client.app({**scope, "query_string": b""}, receive, send))
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/metrics", "/docs"])
def test_what_needs_no_key(client, path):
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("root", ["/prefix", "/prefix/", "/v1", "/"])
@pytest.mark.parametrize(
    "path", ["/v1/models", "/prefix/v1/models", "/v1/v1/models", "//v1/models", "/v1/../v1/models"]
)
def test_a_prefix_is_no_way_around_the_gate(client, root, path):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": []}
    asyncio.run(client.app({**scope, "query_string": b"", "state": {}}, receive, send))
    assert sent[0]["status"] in (401, 404)


def test_with_a_key_a_prefix_changes_nothing():
    with client_of(api_keys=KEYS) as client:
        other = TestClient(client.app, root_path="/prefix", headers=bearer(KEYS[0]))
        assert other.get("/prefix/v1/models").status_code == 200
        assert other.get("/v1/models").status_code == 200


def test_two_keys_are_none(client):
    """Of which a proxy may have looked at the other."""
    headers = [("Authorization", f"Bearer {key}") for key in (KEYS[0], "other-key")]
    for given in (headers, headers[::-1]):
        error_of(client.get("/v1/models", headers=given), 401, "invalid_api_key")


@pytest.mark.parametrize("api_keys", [(), KEYS])
def test_metrics_have_keys_of_their_own(api_keys):
    with client_of(api_keys=api_keys, metrics_keys=("of-a-scraper",)) as client:
        for headers in ({}, bearer(KEYS[0]), bearer("of-a-scrape")):
            error_of(client.get("/metrics", headers=headers), 401, "invalid_api_key")
        assert "fastface_state" in client.get("/metrics", headers=bearer("of-a-scraper")).text
        asked = client.get("/v1/models", headers=bearer("of-a-scraper"))
        assert asked.status_code == (401 if api_keys else 200)
        assert client.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/prefix/metrics", "//metrics", "/v1/../metrics"])
@pytest.mark.parametrize("root", ["", "/", "/prefix", "/metrics"])
def test_a_prefix_is_no_way_to_metrics(path, root):
    with client_of(metrics_keys=("of-a-scraper",)) as client:
        answer = TestClient(client.app, root_path=root).get(path)
    assert answer.status_code in (401, 404)


@pytest.mark.parametrize("path", ["/metrics", "/v1/models"])
def test_should_the_gate_and_the_router_disagree_nobody_is_let_in(path, monkeypatch):
    monkeypatch.setattr(middleware, "path_of", lambda scope: "/another")
    with client_of(api_keys=KEYS, metrics_keys=KEYS) as client:
        assert client.get(path, headers=bearer(KEYS[0])).status_code == 401


def test_all_keys_are_compared_whichever_fits(client, monkeypatch):
    compared = []

    def compare(one, other):
        compared.append(one)
        return hmac.compare_digest(one, other)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(middleware, "hmac", Watched)
    client.get("/v1/models", headers=bearer(KEYS[0]))
    assert compared == [key.encode() for key in KEYS]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_bucket_of_tokens():
    clock = Clock()
    limit = RateLimit(6, clock)
    for _ in range(6):
        limit.take("ada")
    with pytest.raises(RateLimited) as caught:
        limit.take("ada")
    assert caught.value.retry_after == pytest.approx(10)
    limit.take("bruno")
    clock.now = 9.9
    with pytest.raises(RateLimited) as caught:
        limit.take("ada")
    assert caught.value.retry_after == pytest.approx(0.1)
    clock.now = 10.0
    limit.take("ada")
    clock.now = 1e6  # it never holds more than a minute's worth
    for _ in range(6):
        limit.take("ada")
    with pytest.raises(RateLimited):
        limit.take("ada")


def test_buckets_are_bounded(monkeypatch):
    monkeypatch.setattr(middleware, "MAX_BUCKETS", 3)
    limit = RateLimit(1, Clock())
    for client in range(10):
        limit.take(f"address {client}")
    assert len(limit._buckets) == 3


def test_the_rate_is_limited_per_key():
    with client_of(api_keys=KEYS, requests_per_minute=2) as client:
        for _ in range(2):
            assert client.get("/v1/models", headers=bearer(KEYS[0])).status_code == 200
        answer = client.get("/v1/models", headers=bearer(KEYS[0]))
        error_of(answer, 429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert client.get("/v1/models", headers=bearer(KEYS[1])).status_code == 200
        assert client.get("/v2/health/ready").status_code == 200


def test_keys_cannot_be_tried_without_end():
    with client_of(api_keys=KEYS, requests_per_minute=2) as client:
        for _ in range(2):
            error_of(client.get("/v1/models", headers=bearer("no")), 401, "invalid_api_key")
        error_of(client.get("/v1/models", headers=bearer("no")), 429, "rate_limit_exceeded")
        assert client.get("/v1/models", headers=bearer(KEYS[0])).status_code == 200


def test_without_keys_the_rate_is_limited_per_address():
    with client_of(requests_per_minute=1) as client:
        assert ask(client).status_code == 200
        error_of(ask(client), 429, "rate_limit_exceeded")


def test_who_counts_as_one_client():
    assert client_of_address("1.2.3.4") == "1.2.3.4"
    assert client_of_address("::ffff:1.2.3.4") == "1.2.3.4"
    assert client_of_address("2a00:1:2:3:4::5") == client_of_address("2a00:1:2:3::1")
    assert client_of_address("2a00:1:2:3::1") != client_of_address("2a00:1:2:4::1")
    assert client_of_address("fe80::1%eth0") == client_of_address("fe80::2")
    assert client_of_address("a socket's path") == "a socket's path"
