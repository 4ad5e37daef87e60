"""A client that attacks: how its bytes go out, over how many connections, until its time is over.

It comes from addresses of its own (127.0.0.66 and up), since the server counts by key and address,
runs at a lower priority than the server, and makes its payload before it begins: what it costs the
machine beside the server is little.
"""

import asyncio
import json
import os
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from socket import SO_LINGER, SOL_SOCKET
from typing import Literal

from benchmarks.load.client import Address

FIRST_ADDRESS = 66

Delivery = Literal["whole", "hold", "unread", "trickle", "drop", "open"]
"""How a payload is sent. whole: at once, the answer is read, and again. hold: at once, and then
nothing. unread: at once, and the answer is not read. trickle: its last 200 bytes one by one, ten a
second. drop: at once, and the connection is reset before there is an answer. open: connected,
nothing is sent, and closed."""


@dataclass(frozen=True)
class Me:
    """The attacker: its key, and the id of a face that it has registered."""

    key: str
    face: str


@dataclass(frozen=True)
class Attack:
    """`point` groups attacks of a kind; `payload` makes the bytes that are sent, or several to be
    sent in turn; `addresses` is how many it comes from.
    """

    name: str
    point: str
    payload: Callable[[Me], bytes | Sequence[bytes]]
    connections: int = 4
    delivery: Delivery = "whole"
    addresses: int = 1
    seconds: float = 3.0


async def run_attack(attack: Attack, address: Address, me: Me, seconds: float) -> Counter[str]:
    """Attack for so long; how many answers of which status came, and connections without one."""
    payload = attack.payload(me)
    payloads = [payload] if isinstance(payload, bytes) else payload
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def connection(number: int) -> None:
        source = f"127.0.0.{FIRST_ADDRESS + number % attack.addresses}"
        turn = number
        while time.monotonic() < end:
            try:
                reader, writer = await asyncio.open_connection(*address, local_addr=(source, 0))
            except OSError:
                seen["refused"] += 1
                await asyncio.sleep(0.02)
                continue
            sent = payloads[turn % len(payloads)]
            turn += attack.connections
            try:
                seen[await _deliver(attack.delivery, reader, writer, sent, end)] += 1
            except (OSError, EOFError, ValueError, IndexError):
                seen["dropped"] += 1
                await asyncio.sleep(0.02)
            finally:
                writer.transport.abort()

    tasks = [asyncio.create_task(connection(number)) for number in range(attack.connections)]
    await asyncio.wait(tasks, timeout=seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen


async def _deliver(
    delivery: Delivery,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    payload: bytes,
    end: float,
) -> str:
    if delivery == "open":
        await asyncio.sleep(random.uniform(0, 0.02))
        return "opened"
    if delivery == "trickle":
        writer.write(payload[:-200])
        for byte in payload[-200:]:
            await asyncio.sleep(0.1)
            writer.write(bytes([byte]))
            await writer.drain()
        return await _status(reader)
    writer.write(payload)
    if delivery == "unread":
        writer.transport.pause_reading()
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        return "unread"
    if delivery == "drop":
        await asyncio.sleep(random.uniform(0.02, 0.2))
        writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        return "left"
    # A server that refuses need not read all of it: the answer is looked for while it is sent.
    draining = asyncio.ensure_future(writer.drain())
    try:
        if delivery == "whole":
            return await _status(reader)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(draining, max(0.0, end - time.monotonic()))
        return await _status(reader)
    finally:
        draining.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await draining


async def _status(reader: asyncio.StreamReader) -> str:
    """The status of an answer, all of which is read."""
    first = await reader.readline()
    if not first:
        return "dropped"
    while await reader.read(2**16):
        pass
    return first.split()[1].decode()


def main(name: str, port: str, key: str, face: str, seconds: str) -> None:
    """Run one attack by its name; what it saw goes to standard output."""
    from benchmarks.attack.attacks import ATTACKS

    os.nice(10)
    attack = next(one for one in ATTACKS if one.name == name)
    seen = asyncio.run(run_attack(attack, ("127.0.0.1", int(port)), Me(key, face), float(seconds)))
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
