"""Interleaved rounds over peers, and ratios with intervals from them.

Every round runs every peer once, so that what slows the machine for a while slows all of them, and
a ratio is taken within a round. Between two peers there is a pause, because a library's threads
spin for a while after its work and would take the next peer's cores.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from typing import Any

from benchmarks.peers.equality import Difference, difference
from benchmarks.peers.work import Made, Peer, Unready, Work
from fastface_trt.measure.statistics import Ratio

PAUSE = 0.1
"""Seconds between two peers."""

WARM_UP = 2


@dataclass(frozen=True)
class PeerResult:
    """One peer on one work.

    seconds: of each round; empty for a peer that was refused or cannot run, and `problem` says why.
    speed: how many times as fast as the reference, per round. set_up_seconds: compiling, exporting.
    does: the preset that it really computes. unet_samples per picture.
    """

    name: str
    label: str
    does: str
    unet_samples: int
    seconds: tuple[float, ...]
    speed: Ratio | None
    set_up_seconds: float | None
    difference: Difference | None
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; seconds with their median, smallest and largest."""
        values: dict[str, Any] = {
            "name": self.name,
            "label": self.label,
            "does": self.does,
            "unet_samples": self.unet_samples,
            "set_up_seconds": self.set_up_seconds,
            "difference": None if self.difference is None else vars(self.difference),
            "problem": self.problem,
            "speed": None if self.speed is None else vars(self.speed),
        }
        if self.seconds:
            values["seconds"] = {
                "median": median(self.seconds),
                "min": min(self.seconds),
                "max": max(self.seconds),
                "rounds": list(self.seconds),
            }
        return values


def run_rounds(
    calls: Mapping[str, Callable[[], object]],
    before: Mapping[str, Callable[[], None]],
    rounds: int,
    pause: float = PAUSE,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round, in the order A, B, C, A, B, C."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        gc.collect()
        for name, call in calls.items():
            before[name]()
            sleep(pause)
            started = perf_counter()
            call()
            seconds[name].append(perf_counter() - started)
            tick()
    return seconds


def compare_peers(
    peers: Sequence[Peer],
    work: Work,
    *,
    rounds: int,
    pause: float = PAUSE,
    warm_up: int = WARM_UP,
    tolerance: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[PeerResult]:
    """Check that all peers make the first one's picture, then time those that do.

    A peer that cannot do all of the work is compared with what the first makes of what it does do.
    `tolerance` of the latents replaces the preset's own.
    """
    reference = peers[0]
    expected: dict[str, Made] = {}
    set_up: dict[str, float | None] = {}
    differences: dict[str, Difference | None] = {}
    problems: dict[str, str | None] = {}
    for peer in peers:
        progress(f"{work.preset}: {peer.name}, set-up and check")
        does = peer.work(work)
        set_up[peer.name] = differences[peer.name] = problems[peer.name] = None
        try:
            set_up[peer.name] = peer.prepare(work)
        except Unready as error:
            problems[peer.name] = str(error)
            continue
        if does.preset not in expected:
            expected[does.preset] = reference.made(does)
        differences[peer.name] = found = difference(peer.made(work), expected[does.preset])
        problem = found.problem(does.preset, tolerance)
        problems[peer.name] = None if problem is None else f"not timed: {problem}"
    alive = [peer for peer in peers if problems[peer.name] is None]
    progress(f"{work.preset}: {rounds} rounds of {len(alive)} peers")
    calls = {peer.name: lambda peer=peer: peer.picture(work) for peer in alive}
    before = {peer.name: peer.before for peer in alive}
    run_rounds(calls, before, warm_up, pause)
    seconds = run_rounds(calls, before, rounds, pause)
    return [
        PeerResult(
            peer.name,
            peer.label,
            peer.work(work).preset,
            peer.unet_samples(work),
            tuple(seconds.get(peer.name, ())),
            Ratio.paired(seconds[reference.name], seconds[peer.name])
            if peer.name in seconds
            else None,
            set_up[peer.name],
            differences[peer.name],
            problems[peer.name],
        )
        for peer in peers
    ]
