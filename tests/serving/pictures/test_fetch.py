import asyncio
import socket
import ssl
import threading
from asyncio.selector_events import BaseSelectorEventLoop
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509

from fastface_trt.errors import BadPicture, InvalidRequest
from fastface_trt.serving.pictures.fetch import MAX_REDIRECTS, Rules, fetch_picture, is_public
from fastface_trt.serving.settings import ServerSettings
from tests.serving.certificates import Authority
from tests.serving.loopback import serving

SETTINGS = ServerSettings(fetch_urls=True, max_body_bytes=100_000)
PICTURE = b"not looked at here"


class Site:
    """Answers by path, and remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.answers = {}

    async def __call__(self, scope, receive, send):
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append((scope["path"], headers))
        status, fields, parts = self.answers.get(scope["path"], (404, {}, [b""]))
        names = [(name.encode(), value.encode()) for name, value in fields.items()]
        await send({"type": "http.response.start", "status": status, "headers": names})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            if part == b"stop here":
                await asyncio.Event().wait()
        await send({"type": "http.response.body"})


@pytest.fixture(scope="module")
def server():
    site = Site()
    with serving(site) as port:
        yield site, port


@pytest.fixture
def site(server):
    server[0].asked.clear()
    server[0].answers = {"/face.png": (200, {"content-type": "image/png"}, [PICTURE])}
    return server[0]


class Resolver:
    """A resolver that answers from a list, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append(host)
        found = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


def rules(port, *answers, **fields):
    """Only 127.0.0.1 is public, and everything else as it is."""
    return Rules(
        ports={"http": port},
        resolve=Resolver(*(answers or (["127.0.0.1"],))),
        allows=lambda address: str(address) == "127.0.0.1" or is_public(address),
        **fields,
    )


def fetch(url, rules, settings=SETTINGS):
    return asyncio.run(fetch_picture(url, settings, rules))


def unreachable(url, rules, settings=SETTINGS):
    with pytest.raises(BadPicture) as caught:
        fetch(url, rules, settings)
    assert caught.value.message == "The picture's address cannot be fetched."


@pytest.fixture
def port(server, site):
    return server[1]


def test_fetches_from_the_address_that_was_checked_under_the_name(site, port, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    used = rules(port)
    assert fetch("http://pictures.example/face.png?size=1#part", used) == PICTURE
    assert used.resolve.asked == ["pictures.example"]
    ((path, headers),) = site.asked
    assert path == "/face.png"
    assert headers["host"] == "pictures.example"
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers


def test_is_off_unless_told():
    with pytest.raises(InvalidRequest, match="does not fetch"):
        fetch("https://pictures.example/", None, ServerSettings())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "face.png",
        "//pictures.example/",
        "http://pictures.example/",  # not https
        "ftp://pictures.example/",
        "file:///etc/passwd",
        "https:///path",
        "https://me@pictures.example/",
        "https://me:word@pictures.example/",
        "https://@pictures.example/",
        "https://pictures.example:80/",
        "https://pictures.example:8443/",
        "https://pictures.example:x/",
        "https://[::1/",
        "https://pictures.example\\@127.0.0.1/",
        "https://pictures.example/\r\nX: y",
        "https://pictures.example/a b",
        "https://pictures.example/ä",
        "https://pictures.example/" + "a" * 2048,
    ],
)
def test_addresses_of_other_kinds_are_refused_without_resolving(url):
    resolver = Resolver(["127.0.0.1"])
    with pytest.raises(InvalidRequest, match="form https://HOST/PATH"):
        fetch(url, Rules(resolve=resolver, tls=ssl.create_default_context()))
    assert resolver.asked == []


@pytest.mark.parametrize(
    "found",
    [
        [],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["127.0.0.1", "10.0.0.1"],  # one good address does not excuse the other
        ["127.0.0.1", "fe80::1%eth0"],
        ["nonsense"],
        OSError("no such host"),
        UnicodeError("label too long"),
    ],
)
def test_every_address_must_be_public(site, port, found):
    unreachable("http://pictures.example/face.png", rules(port, found))
    assert site.asked == []


def test_the_rules_of_production_refuse_loopback_by_any_name(site, port):
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "[::1]"):
        used = Rules(ports={"http": port})
        unreachable(f"http://{host}/face.png", used)
    assert site.asked == []


def test_a_name_that_leads_elsewhere_on_the_second_look_gains_nothing(site, port):
    """DNS rebinding: the connection goes to what was checked, and nobody resolves again."""
    used = rules(port, ["127.0.0.1"], ["10.0.0.1"])
    assert fetch("http://pictures.example/face.png", used) == PICTURE
    assert used.resolve.asked == ["pictures.example"]


@pytest.mark.parametrize(
    ("answers", "reached"),
    [
        ([["93.184.215.14"], ["127.0.0.1"], ["169.254.169.254"]], ["93.184.215.14"]),
        ([["127.0.0.1"], ["93.184.215.14"]], []),
        ([["93.184.215.14", "127.0.0.1"], ["93.184.215.14"]], []),
        ([["2606:4700::1111", "93.184.215.14"], ["::1"]], ["2606:4700::1111", "93.184.215.14"]),
    ],
)
def test_the_system_is_asked_once_and_nothing_else_is_connected_to(answers, reached, monkeypatch):
    """With the rules of production, over a resolver whose answers change from call to call."""
    asked, connected = [], []

    def getaddrinfo(host, port, *args, **options):
        asked.append(host)
        found = answers[len(asked) - 1]
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, 1, 6, "", (one, port))
            for one in found
        ]

    async def sock_connect(_loop, _socket, address):
        connected.append(address[:2])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(BaseSelectorEventLoop, "sock_connect", sock_connect)
    unreachable("https://pictures.example/face.png", None)
    assert asked == ["pictures.example"]
    assert connected == [(one, 443) for one in reached]


def test_names_that_never_resolve_hold_no_thread_of_anybody_else(monkeypatch):
    let_go = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: let_go.wait(60))
    settings = SETTINGS.model_copy(update={"body_timeout": 0.3})

    async def crowd():
        url = "https://pictures.example/"
        asking = [asyncio.ensure_future(fetch_picture(url, settings)) for _ in range(100)]
        await asyncio.wait(asking, timeout=30)
        assert all(isinstance(one.exception(), BadPicture) for one in asking)
        return await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 20)

    try:
        with ThreadPoolExecutor(1) as loop:
            assert loop.submit(asyncio.run, crowd()).result(60) == "done"
    finally:
        let_go.set()


def test_redirects_pass_through_the_same_door(site, port):
    def to(location, status=302):
        return status, {"location": location}, [b""]

    site.answers |= {
        "/relative": to("face.png"),
        "/other": to("http://other.example/face.png", 308),
        "/metadata": to("http://metadata.example/latest"),
        "/file": to("file:///etc/passwd"),
        "/user": to("http://me@pictures.example/"),
        "/loop": to("/loop"),
        "/0": to("/1"),
        "/1": to("/2"),
        "/2": to("/face.png"),
    }
    base = "http://pictures.example"
    assert fetch(f"{base}/relative", rules(port)) == PICTURE
    assert fetch(f"{base}/0", rules(port)) == PICTURE
    used = rules(port)
    assert fetch(f"{base}/other", used) == PICTURE
    assert used.resolve.asked == ["pictures.example", "other.example"]
    unreachable(f"{base}/metadata", rules(port, ["127.0.0.1"], ["169.254.169.254"]))
    for path in ("/file", "/user"):
        with pytest.raises(InvalidRequest):
            fetch(base + path, rules(port))
    site.asked.clear()
    with pytest.raises(BadPicture, match="more than 3 times"):
        fetch(f"{base}/loop", rules(port))
    assert len(site.asked) == 1 + MAX_REDIRECTS


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (200, {"content-type": "text/html"}),
        (200, {}),
        (200, {"content-type": "image/png", "content-encoding": "gzip"}),
        (404, {"content-type": "image/png"}),
        (302, {"content-type": "image/png"}),
        (206, {"content-type": "image/png"}),
    ],
)
def test_what_is_no_picture_is_refused(site, port, status, fields):
    site.answers["/x"] = (status, fields, [PICTURE])
    with pytest.raises(BadPicture, match="does not lead to a picture"):
        fetch("http://pictures.example/x", rules(port))


def test_size_is_bounded_while_it_streams(site, port):
    kind = {"content-type": "image/png"}
    site.answers["/fits"] = (200, kind, [b"x" * 50_000] * 2)
    site.answers["/large"] = (200, kind, [b"x" * 50_000] * 2 + [b"x"])
    site.answers["/endless"] = (200, kind, [b"x" * 60_000, b"x" * 60_000, b"stop here"])
    assert len(fetch("http://pictures.example/fits", rules(port))) == 100_000
    for path in ("/large", "/endless"):
        with pytest.raises(BadPicture, match="more than 100,000 bytes"):
            fetch(f"http://pictures.example{path}", rules(port))


def test_time_is_bounded_in_total(site, port):
    settings = SETTINGS.model_copy(update={"body_timeout": 0.3})
    site.answers["/slow"] = (200, {"content-type": "image/png"}, [b"x", b"stop here"])
    unreachable("http://pictures.example/slow", rules(port), settings)

    async def never(_host, _port):
        await asyncio.Event().wait()

    unreachable("http://x.example/", Rules(ports={"http": port}, resolve=never), settings)


def test_nobody_there(port):
    unreachable("http://pictures.example/face.png", rules(1))


def test_tls_is_checked_against_the_name_and_not_the_address(tmp_path, site):
    authority = Authority()
    certificate, key = authority.issue(
        "pictures.example", x509.SubjectAlternativeName([x509.DNSName("pictures.example")])
    )
    (tmp_path / "certificate.pem").write_bytes(certificate)
    (tmp_path / "key.pem").write_bytes(key)
    trusting = ssl.create_default_context(cadata=authority.pem.decode())
    with serving(
        site, ssl_certfile=tmp_path / "certificate.pem", ssl_keyfile=tmp_path / "key.pem"
    ) as port:

        def over_tls(tls):
            return Rules({"https": port}, Resolver(["127.0.0.1"]), lambda _address: True, tls)

        assert fetch("https://pictures.example/face.png", over_tls(trusting)) == PICTURE
        unreachable("https://other.example/face.png", over_tls(trusting))
        unreachable("https://pictures.example/face.png", over_tls(ssl.create_default_context()))
