"""Reports that were not measured, for what reads reports."""

from functools import lru_cache

import numpy as np

from fastface_trt.bench.measure import paired_ratios
from fastface_trt.bench.report import (
    BenchReport,
    BranchPlan,
    Case,
    ColdStart,
    Distribution,
    EngineFacts,
    Memory,
    Stage,
    Throughput,
    Work,
)
from fastface_trt.measure.machine import Environment, GpuState, MachineState

MACHINE = {"processor": "Test CPU", "cores": 2, "memory_gb": 8.0, "system": "Test"}
STAGES = (("unet", 0, 2, 2), ("unet", 1, 3, 3), ("guidance", 0, None, None), ("png", *[None] * 3))


def noise(n, seed, spread=0.05):
    return np.random.default_rng(seed).lognormal(0, spread, n)


@lru_cache
def make_case(
    preset="plain", features="fresh", requests=1, concurrency=1, *, n=24, slow=1.0, seed=0
):
    parts = [
        (key, slow * 0.01 * (at + 1) * noise(n, 10 * seed + at)) for at, key in enumerate(STAGES)
    ]
    whole = sum(values for _, values in parts)
    return Case(
        preset=preset,
        features=features,
        requests=requests,
        concurrency=concurrency,
        warm_up=1,
        unet_samples=5 * requests,
        seconds=Distribution.of(whole),
        stages=tuple(
            Stage(
                name=name,
                step=step,
                branches=branches,
                rows=rows,
                calls=1,
                seconds=Distribution.of(values),
            )
            for (name, step, branches, rows), values in parts
        ),
        throughput=Throughput(
            pictures=n * requests,
            wall_seconds=float(whole.sum()),
            pictures_per_second=n * requests / float(whole.sum()),
        ),
    )


def state(**changes):
    fields = {"load_average": 0.1, "cpu_megahertz": None, "gpu": None}
    return MachineState(**(fields | changes))


def gpu(**changes):
    fields = {
        "name": "Test GPU",
        "driver": "999",
        "sm_megahertz": 1000,
        "memory_megahertz": 2000,
        "celsius": 60,
        "watts": 300.0,
    }
    return GpuState(**(fields | changes))


def make_environment(**changes):
    fields = {
        "machine": MACHINE,
        "backend": "onnxruntime",
        "threads": 2,
        "versions": {"numpy": "2"},
        "engine_keys": ("a" * 64,),
        "start": state(),
        "end": state(),
    }
    return Environment(**(fields | changes))


def make_report(presets=("plain",), *, slow=1.0, seed=0, machine=None, **work):
    cases = [
        make_case(preset, features, slow=slow, seed=seed + at)
        for preset in presets
        for at, features in enumerate(("fresh", "cached"))
    ]
    cases += [make_case(presets[0], "cached", 2, slow=slow, seed=seed + 5)]
    cases += [make_case(presets[0], "cached", 1, 2, slow=slow, seed=seed + 6)]
    fields = {
        "checkpoint": "test",
        "adapter": "adapter",
        "precision": "fp32",
        "random_weights": False,
        "scheduler": "DDIMScheduler",
        "width": 64,
        "height": 64,
        "steps": 2,
        "plan": "exact",
        "presets": presets,
    }
    some = Distribution.of([0.1, 0.2, 0.3])
    return BenchReport(
        date="2026-01-01",
        work=Work(**(fields | work)),
        environment=make_environment(machine=machine or MACHINE),
        cold_start=ColdStart(
            to_first_picture=some,
            imports=some,
            load=some,
            picture=some,
            write=some,
            peak_host_bytes=2**20,
        ),
        cases=tuple(cases),
        ratios=tuple(paired_ratios(cases)),
        branch_plans=tuple(
            BranchPlan(
                preset=preset, plan=plan, branches=(("i", "ti"), ("u", "i", "ti")), unet_samples=5
            )
            for preset in presets
            for plan in ("exact", "full", "lean")
        ),
        engines=(EngineFacts(module="unet", key="a" * 64, bytes=1000, build_seconds=1.5),),
        memory=Memory(host_peak_bytes=2**28, device_bytes=None),
        notes=("Something is doubtful.",),
    )
