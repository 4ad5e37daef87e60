"""Pictures by address, where the operator allows it: a stranger chooses where this server goes.

Only https on its own port, so that no plain service of an inner network is spoken to and nobody on
the way changes the picture. The name is resolved here, every address that it has must be public,
and the connection goes to one of those that were looked at: a name that leads elsewhere the next
moment gains nothing. Redirects are followed by hand through the same door. What went wrong on the
network is not told, or the server would be a scanner of other people's networks.

Sources of what is public: IANA's registries of special-purpose addresses (RFC 6890), which
`ipaddress` knows; NAT64 (RFC 6052); and what it does not know, named below.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

from fastface_trt.errors import (
    BadPicture,
    FastFaceError,
    InvalidRequest,
    MissingDependency,
    install_hint,
)
from fastface_trt.serving.settings import ServerSettings

try:
    import httpcore
except ModuleNotFoundError:
    raise MissingDependency(
        "Pictures by address need httpcore.", f"Run {install_hint('serve')}"
    ) from None


Address: TypeAlias = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Iterable[str]]]
MAX_REDIRECTS = 3
MAX_URL = 2048
RESOLVING_THREADS = 8
MAX_ADDRESSES = 4
"""Addresses of a name that are tried, one after the other, within the time of the whole."""
# A name server that never answers holds a thread for longer than anybody waits: not one of those
# that submit other clients' pictures.
_RESOLVING = ThreadPoolExecutor(RESOLVING_THREADS, thread_name_prefix="fastface-resolving")
_trusted = cache(httpcore.default_ssl_context)  # reading all certificates takes a tenth of a second
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NETWORK_ERRORS = (
    OSError,  # names that do not resolve, certificates that do not fit
    ValueError,  # names that no resolver takes (UnicodeError), broken redirects
    asyncio.TimeoutError,
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
)
_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = (
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them
    IPv6Network("2001:db8::/32"),
    IPv6Network("2002::/16"),  # 6to4, which leads to an IPv4 address of the sender's choice
    IPv6Network("3fff::/20"),  # documentation, unknown to older Pythons
)
_NOT_PUBLIC_4 = (
    IPv4Network("168.63.129.16/32"),  # Azure's host, with the metadata of the machine
    IPv4Network("192.0.0.0/24"),  # protocol assignments, some of which count as global
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, as the system's resolver gives them."""
    found = await asyncio.get_running_loop().run_in_executor(
        _RESOLVING, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )
    return [str(sockaddr[0]) for _, _, _, _, sockaddr in found]


def is_public(address: Address) -> bool:
    """Whether an address is one of the public network's, for one machine.

    Private, loopback, link-local (where clouds have their metadata), shared, multicast, reserved
    and unspecified ones are not; an IPv4 address inside an IPv6 one is judged as itself.
    """
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped
        if address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        return (
            address.scope_id is None
            and address in _GLOBAL_UNICAST
            and not any(address in network for network in _NOT_PUBLIC_6)
        )
    return (
        address.is_global
        and not (address.is_multicast or address.is_reserved or address.is_unspecified)
        and not any(address in network for network in _NOT_PUBLIC_4)
    )


@dataclass(frozen=True, slots=True)
class Rules:
    """Where a fetch may go: the port of each scheme, how names are resolved, and what is allowed.

    tls: None is the certificates of the system and of certifi.
    """

    ports: Mapping[str, int] = field(default_factory=lambda: {"https": 443})
    resolve: Resolve = resolve
    allows: Callable[[Address], bool] = is_public
    tls: ssl.SSLContext | None = None


async def fetch_picture(url: str, settings: ServerSettings, rules: Rules | None = None) -> bytes:
    """The bytes behind the address of a picture; nothing is said about what they hold.

    In total at most `max_body_bytes` and `body_timeout`, redirects included. Proxies of the
    environment are not asked. Raises `InvalidRequest` unless `fetch_urls`, and for an address that
    is of another kind than https://HOST/PATH, `BadPicture` for all else.
    """
    if not settings.fetch_urls:
        raise InvalidRequest(
            "This server does not fetch pictures by address.", "Send the picture itself."
        )
    rules = rules or Rules(tls=await asyncio.to_thread(_trusted))
    try:
        return await asyncio.wait_for(_follow(url, settings, rules), settings.body_timeout)
    except FastFaceError:
        raise
    except _NETWORK_ERRORS:
        raise _unreachable() from None


async def _follow(url: str, settings: ServerSettings, rules: Rules) -> bytes:
    for _ in range(1 + MAX_REDIRECTS):
        answer = await _get(checked_url(url, rules), settings, rules)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer.location)
    raise BadPicture(
        f"The picture's address redirects more than {MAX_REDIRECTS} times.", "Give the last one."
    )


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


def checked_url(url: str, rules: Rules) -> SplitResult:
    """The parts of an address of the kind that is fetched; `InvalidRequest` for others."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = len(url) <= MAX_URL and all("!" <= one <= "~" and one != "\\" for one in url)
    allowed = rules.ports.get(parts.scheme)
    if (
        not plain
        or allowed is None
        or not parts.hostname
        or "@" in parts.netloc
        or port not in (None, allowed)
    ):
        raise InvalidRequest(
            "The picture's address is not of the form https://HOST/PATH.",
            "No user, password or port; other characters than ASCII in percent-encoding.",
        )
    return parts


def request_target(parts: SplitResult) -> bytes:
    """What the request asks the host for: path and query."""
    return ((parts.path or "/") + (f"?{parts.query}" if parts.query else "")).encode()


async def _get(parts: SplitResult, settings: ServerSettings, rules: Rules) -> bytes | _Redirect:
    host = parts.hostname or ""
    url = httpcore.URL(
        scheme=parts.scheme.encode(),
        host=host.encode(),
        port=rules.ports[parts.scheme],
        target=request_target(parts),
    )
    headers = [
        ("Host", f"[{host}]" if ":" in host else host),
        ("Accept", "image/png, image/jpeg, image/webp"),
        ("Accept-Encoding", "identity"),  # or the answer's size would not be that of the picture
        ("User-Agent", "FastFace-TRT"),
        ("Connection", "close"),
    ]
    limit = settings.max_body_bytes
    timeout = dict.fromkeys(("connect", "read", "write", "pool"), settings.body_timeout)
    async with (
        httpcore.AsyncConnectionPool(
            ssl_context=rules.tls, network_backend=_CheckedNetwork(rules)
        ) as pool,
        pool.stream("GET", url, headers=headers, extensions={"timeout": timeout}) as answer,
    ):
        fields = {name.lower().decode("latin-1"): value for name, value in answer.headers}
        location = fields.get("location")
        if answer.status in _REDIRECTS and location is not None:
            return _Redirect(location.decode("latin-1"))
        kind = fields.get("content-type", b"").strip().lower()
        coding = fields.get("content-encoding", b"identity").strip().lower()
        if answer.status != 200 or not kind.startswith(b"image/") or coding != b"identity":
            raise BadPicture(
                "The picture's address does not lead to a picture.", "Give that of the file itself."
            )
        data = bytearray()
        async for part in answer.aiter_stream():
            data += part
            if len(data) > limit:
                raise BadPicture(
                    f"The picture has more than {limit:,} bytes.", "Scale it down first."
                )
        return bytes(data)


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were looked at; the host's name remains that of TLS and HTTP."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = list(dict.fromkeys(await self._rules.resolve(host, port)))
        addresses = [parse_address(text) for text in found]
        # One that is not public among others is an attack, or a mistake; neither is served.
        if not addresses or not all(
            address is not None and self._rules.allows(address) for address in addresses
        ):
            raise _unreachable()
        for address in addresses[:MAX_ADDRESSES]:
            with contextlib.suppress(httpcore.ConnectError):
                return await self._network.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
        raise _unreachable()


def parse_address(text: str) -> Address | None:
    """The address that a resolver returned as text; None where it is none."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def _unreachable() -> BadPicture:
    return BadPicture(
        "The picture's address cannot be fetched.", "Check it, or send the picture itself."
    )
