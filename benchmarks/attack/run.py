"""What an attack does to others: the server, those who are beside it, and what is measured of them.

A window begins with the attack and ends when the honest client's requests that began in it are
served and the prober had an answer after it. A round that ends badly is made again, and what two
rounds say counts: the machine has other programs.
"""

import base64
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import psutil

from benchmarks.attack.attacker import Attack
from benchmarks.attack.attacks import FAIRNESS
from benchmarks.attack.bystanders import PROBE_EVERY, Bystander, Seen, ask_as, longest_gap
from benchmarks.load.requests import face_file
from benchmarks.load.server import Server
from fastface_trt.measure.statistics import percentile

HONEST_KEY, ATTACKERS_KEY = "honest-0123456789abcdef", "attacker-0123456789abcdef"
MOST_GAP = 0.25
MOST_SLOWER = 2.0
MOST_MEMORY = 1.10
PATIENCE = 60.0
"""Seconds for the server to be itself again after an attack, its memory too."""
PAYLOAD_PATIENCE = 60.0


@dataclass(frozen=True)
class Round:
    """What one attack did. Seconds and bytes; `problems` says what was too much, if anything.

    gap: the longest time between two answers to the prober. witness_gap: the same of a program that
    has nothing to do with the server. honest_p99: of the honest client's requests until served,
    refusals included; honest_p99_without: of those in quiet times. memory: of server and workers,
    before any attack; memory_seconds: until it was within 10 % of that. answers: what the attacker
    got.
    """

    attack: str
    point: str
    gap: float
    witness_gap: float
    honest_p99: float
    honest_p99_without: float
    honest_requests: int
    memory_before: int
    memory_peak: int
    memory_after: int
    memory_seconds: float
    answers: dict[str, int]
    problems: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One word."""
        return "bad" if self.problems else "good"


class Arena:
    """A server with the bystanders beside it; `options` are those of `fastface-trt serve`."""

    def __init__(self, options: Sequence[str] = (), warm_up: float = 6.0) -> None:
        self._options, self._warm_up = options, warm_up
        self._held = ExitStack()
        self._quiet: list[float] = []

    def __enter__(self) -> "Arena":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    @property
    def port(self) -> int:
        """Of the server."""
        return self.server.address[1]

    def start(self) -> None:
        """Start the server anew, and the bystanders."""
        self._held.close()
        folder = Path(self._held.enter_context(TemporaryDirectory(prefix="attack-")))
        keys = folder / "keys"
        keys.write_text(f"{HONEST_KEY}\n{ATTACKERS_KEY}\n")
        self.server = Server(("--api-keys-file", str(keys), *self._options))
        self._held.callback(self.server.close)
        address = self.server.wait_until_ready()
        picture = {"image": base64.b64encode(face_file()).decode()}
        status, body = ask_as(ATTACKERS_KEY, self.port, "POST", "/v1/faces", picture)
        if status != 201:
            raise RuntimeError(f"registering a face: {status} {body[:500]!r}")
        self.face = str(json.loads(body)["id"])
        self._bystanders = {
            role: Bystander(role, address, HONEST_KEY, folder)
            for role in ("witness", "prober", "honest")
        }
        for one in self._bystanders.values():
            self._held.callback(one.close)
        # Once all that it keeps is kept, as of a server that is up for a while.
        with self._attacker(FAIRNESS[0], self._warm_up) as load:
            load.communicate("go\n")
        self._quiet.clear()
        self.wait_quietly(self._warm_up)
        self._memory = self.memory()

    def seen(self, role: str) -> list[Seen]:
        """What a bystander has seen up to now."""
        return self._bystanders[role].seen()

    def wait_quietly(self, seconds: float) -> None:
        """Let the honest client be alone for so long: what others are compared with."""
        begun = time.monotonic()
        while time.monotonic() < begun + seconds or not self._quiet:
            time.sleep(0.1)
            if self.server.process.poll() is not None or time.monotonic() > begun + PATIENCE:
                raise RuntimeError("the server serves nobody:\n" + "".join(self.server.log))
            answers = [one for one in self.seen("honest") if one.due >= begun and one.good]
            if time.monotonic() >= begun + seconds:
                self._quiet += [one.seconds for one in answers]

    def memory(self) -> int:
        """Resident bytes of the server and its workers."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.server.process.pid)
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += one.memory_info().rss
        return total

    def attack(
        self, attack: Attack, seconds: float | None = None, memory_patience: float = PATIENCE
    ) -> Round:
        """One round. Where the server does not survive it, or keeps memory, another is started."""
        seconds = seconds or attack.seconds
        before = self._memory
        peak = self.memory()
        with self._attacker(attack, seconds) as attacker:
            assert attacker.stdin is not None
            assert attacker.stdout is not None
            attacker.stdout.readline()  # its payload is made
            attacker.stdin.write("go\n")
            attacker.stdin.flush()
            start = time.monotonic()
            end = start + seconds
            while time.monotonic() < end:
                peak = max(peak, self.memory())
                time.sleep(0.2)
            problems, window_end = self._wait_until_served(start, end)
            served = not problems
            with suppress(subprocess.TimeoutExpired):
                attacker.wait(timeout=5)
            attacker.kill()
            answers = json.loads(attacker.stdout.readline() or "{}")
        gap = longest_gap(self.seen("prober"), start, window_end)
        witness = longest_gap(self.seen("witness"), start, window_end)
        noise = max(0.0, witness - 2 * PROBE_EVERY)
        during = [one for one in self.seen("honest") if one.done > start and one.due < end]
        p99, without = percentile([d.seconds for d in during], 99), percentile(self._quiet, 99)
        if gap > MOST_GAP + noise:
            problems.append(f"the server answered nobody for {gap:.2f} s")
        if p99 > MOST_SLOWER * without + noise:
            problems.append(f"honest p99 {p99:.2f} s, and {without:.2f} s without the attack")
        if unserved := sorted({d.status for d in during if not d.good}):
            problems.append(f"honest requests ended with {', '.join(map(str, unserved))}")
        after = self._memory_again(before, window_end + memory_patience)
        back = time.monotonic() - window_end
        if after > MOST_MEMORY * before:
            problems.append(f"memory {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")
        result = Round(
            attack.name,
            attack.point,
            gap=gap,
            witness_gap=witness,
            honest_p99=p99,
            honest_p99_without=without,
            honest_requests=len(during),
            memory_before=before,
            memory_peak=peak,
            memory_after=after,
            memory_seconds=back,
            answers=answers,
            problems=problems,
        )
        self._recover(served)
        return result

    def _attacker(self, attack: Attack, seconds: float) -> "subprocess.Popen[str]":
        module = "benchmarks.attack.attacker"
        arguments = (attack.name, str(self.port), ATTACKERS_KEY, self.face, str(seconds))
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _wait_until_served(self, start: float, end: float) -> tuple[list[str], float]:
        """Until prober and honest client had what they asked for during the attack."""
        while (now := time.monotonic()) < end + PATIENCE:
            if (status := self.server.process.poll()) is not None:
                return [f"the server left with status {status}"], now
            probed = self.seen("prober")
            asked = self.seen("honest")
            if probed[-1].done > end and probed[-1].good and asked[-1].due >= end:
                return [], probed[-1].done
            time.sleep(0.05)
        return [f"not everybody was served {PATIENCE:g} s after the attack"], now

    def _memory_again(self, before: int, until: float) -> int:
        while True:
            memory = self.memory()
            if memory <= MOST_MEMORY * before or time.monotonic() > until:
                return memory
            time.sleep(0.25)

    def _recover(self, served: bool) -> None:
        """Undo what would make the next attack's numbers this one's."""
        if not served or self.memory() > MOST_MEMORY * self._memory:
            self.start()
            return
        status, body = ask_as(ATTACKERS_KEY, self.port, "GET", "/v1/faces")
        for face in json.loads(body)["data"] if status == 200 else ():
            if face["id"] != self.face:
                ask_as(ATTACKERS_KEY, self.port, "DELETE", f"/v1/faces/{face['id']}")

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.server.process.send_signal(signal.SIGTERM)
        return self.server.process.wait(timeout=PATIENCE)


def rounds_of(arena: Arena, attack: Attack, most: int, seconds: float | None = None) -> Round:
    """Attack until two rounds agree, or one is good, or there were `most`; the last of them."""
    bad = 0
    while True:
        result = arena.attack(attack, seconds)
        bad += bool(result.problems)
        if not result.problems or bad == min(2, most):
            return result
