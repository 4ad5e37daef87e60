"""What the calls of a machine cost: measured here, or assumed and said to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from fastface_trt import FastFace
from fastface_trt.serving.batching.cost import CostModel
from fastface_trt.serving.batching.loop import blank_face

AREA = 1
"""Simulated pictures all have one size."""

REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Of the calls that are measured, up to as many as may run."""


@dataclass(frozen=True)
class Machine:
    """Seconds of a UNet call by number of rows, of a decoding, and of a preparation.

    `source` says where the numbers are from.
    """

    name: str
    source: str
    calls: Mapping[int, float]
    decoding: float
    preparation: float

    def cost_model(self) -> CostModel:
        """The numbers as the batcher would have measured them."""
        cost = CostModel()
        for rows, seconds in self.calls.items():
            cost.observe_call(AREA, rows, seconds)
        cost.observe_decoding(AREA, self.decoding)
        cost.observe_preparation(self.preparation)
        return cost


def assumed_accelerator(fixed_rows: float = 2.0, row_seconds: float = 0.02) -> Machine:
    """A machine on which a call costs as much as `fixed_rows` rows before its first row.

    Nothing of it was measured. It stands for accelerators that a few rows do not fill: weights are
    read, kernels are launched and the last wave is waited for whatever the number of rows.
    """
    return Machine(
        "assumed accelerator",
        f"assumed, not measured: a UNet call takes {1000 * row_seconds:g} ms a row and as long as "
        f"{fixed_rows:g} more rows; a decoding 60 ms, a preparation 10 ms",
        {rows: row_seconds * (fixed_rows + rows) for rows in (1, 24)},
        decoding=0.06,
        preparation=0.01,
    )


def measured_machine(fastface: FastFace, rounds: int, max_running: int) -> Machine:
    """The machine at hand: medians over interleaved rounds of calls, decodings, preparations."""
    stages = fastface.stages
    seconds: dict[int, list[float]] = {}
    decodings, preparations = [], []
    for measuring in range(rounds + 1):  # the first one pays for allocations
        for requests in (count for count in REQUESTS if count <= max_running):
            for preset in ("plain", "am1+dcg"):
                request = fastface.request("photo; a person", preset=preset, steps=4)
                stages.forget()
                started = perf_counter()
                tokens = stages.image_tokens(blank_face(measuring))
                samples = [stages.sample(request, tokens)]
                preparation = perf_counter() - started
                samples += [stages.sample(request, tokens) for _ in range(requests - 1)]
                times: dict[int, float] = {}
                while not samples[0].finished:
                    rows = requests * len(samples[0].guidance.branches)
                    started = perf_counter()
                    stages.step(samples)
                    stages.device.synchronize()
                    times[rows] = perf_counter() - started
                started = perf_counter()
                stages.decode(samples[0].latents)
                decoding = perf_counter() - started
                if measuring:
                    for rows, taken in times.items():
                        seconds.setdefault(rows, []).append(taken)
                    decodings.append(decoding)
                    preparations.append(preparation)
    return Machine(
        "this machine, mini model",
        f"measured: medians of {rounds} interleaved rounds; every preparation encodes its prompt "
        "and face anew",
        {rows: median(times) for rows, times in sorted(seconds.items())},
        median(decodings),
        median(preparations),
    )
