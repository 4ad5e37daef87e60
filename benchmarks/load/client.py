"""An open-loop HTTP client: requests leave when they are due, however slow the answers are.

A closed loop would wait for a slow server, and so measure it at a load that it can take. The client
speaks just enough HTTP/1.1 for that, because on a small machine it shares the server's cores.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its seconds since the request was due; status 0 where no whole one came."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


async def ask(
    address: Address,
    method: str,
    path: str,
    body: object = None,
    *,
    key: str = "",
    timeout: float = 300,
) -> Answer:
    """One request on a connection of its own, with an API key if there is one."""
    started = perf_counter()
    try:
        exchange = _exchange(address, method, path, body, key)
        status, headers, answer = await asyncio.wait_for(exchange, timeout)
    except (OSError, EOFError, ValueError, asyncio.TimeoutError) as error:
        status, headers, answer = 0, {}, repr(error).encode()
    return Answer(status, headers, answer, perf_counter() - started)


async def ask_when_due(
    address: Address, path: str, bodies: Sequence[object], due: Sequence[float]
) -> list[Answer]:
    """POST `bodies[i]` to the path `due[i]` seconds from now; answers in the same order."""
    started = perf_counter()

    async def one(body: object, at: float) -> Answer:
        await asyncio.sleep(max(0.0, started + at - perf_counter()))
        return await ask(address, "POST", path, body)

    return await asyncio.gather(*(one(*pair) for pair in zip(bodies, due, strict=True)))


async def _exchange(
    address: Address, method: str, path: str, body: object, key: str
) -> tuple[int, Mapping[str, str], bytes]:
    content = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(*address, limit=2**24)
    try:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\n"
            + (f"Authorization: Bearer {key}\r\n" if key else "")
            + f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, found, value in (line.partition(":") for line in lines)
            if found
        }
        length = headers.get("content-length")
        answer = await (reader.readexactly(int(length)) if length else reader.read())
        return int(first.split(" ")[1]), headers, answer
    finally:
        writer.close()
