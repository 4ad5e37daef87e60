"""What a benchmark asks of the pipeline, and which ways of calling it are measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastface_trt.bench.report import BranchPlan, Features, Work
from fastface_trt.pipeline import FastFace
from fastface_trt.runtime.guidance import BRANCH_PLANS
from fastface_trt.runtime.guidance import BranchPlan as PlanName
from fastface_trt.runtime.presets import PRESETS
from fastface_trt.runtime.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to call the pipeline; see `report.Case`."""

    preset: str
    features: Features
    requests: int = 1
    concurrency: int = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """The options of a benchmark; sizes in pixels, None for the export's own."""

    presets: tuple[str, ...]
    face: Path
    prompt: str
    steps: int | None = None
    size: tuple[int, int] | None = None
    plan: PlanName = "exact"
    requests: tuple[int, ...] = (1,)
    concurrency: tuple[int, ...] = (1,)
    runs: int = 20
    warm_up: int = 3
    cold_starts: int = 3

    def groups(self) -> Iterator[list[Setting]]:
        """Settings that are measured in turns, so that what disturbs one disturbs all of them.

        First fresh and kept features of every preset, then more requests, then more threads, both
        with kept features.
        """
        first, *more = self.requests
        yield [
            Setting(preset, features, first)
            for preset in self.presets
            for features in ("fresh", "cached")
        ]
        for requests in more:
            yield [Setting(preset, "cached", requests) for preset in self.presets]
        for threads in self.concurrency:
            if threads > 1:
                for preset in self.presets:
                    yield [Setting(preset, "cached", first, threads)]

    def request(self, fastface: FastFace, preset: str, **fields: object) -> GenerationRequest:
        """A request of this workload; raises `UnknownName` or `InvalidRequest`."""
        sizes = {} if self.size is None else {"width": self.size[0], "height": self.size[1]}
        plan = {"plan": self.plan}
        return fastface.request(
            self.prompt, preset=preset, steps=self.steps, **(sizes | plan | fields)
        )

    def work(self, fastface: FastFace) -> Work:
        """What is done, without how often; raises `InvalidRequest` for what cannot be done."""
        manifest = fastface.manifest
        request = self.request(fastface, self.presets[0])
        fastface.stages.check_size(request)
        return Work(
            checkpoint=manifest.checkpoint,
            adapter=manifest.adapter,
            precision=manifest.precision,
            random_weights=manifest.random_weights,
            scheduler=manifest.scheduler["class"],
            width=request.width,
            height=request.height,
            steps=request.steps,
            plan=request.plan,
            presets=self.presets,
        )

    def branch_plans(self, fastface: FastFace) -> list[BranchPlan]:
        """Branches per step of every preset there is, under every branch plan."""
        plans = []
        for preset in PRESETS:
            for plan in BRANCH_PLANS:
                request = self.request(fastface, preset, plan=plan)
                plans.append(
                    BranchPlan(
                        preset=preset,
                        plan=plan,
                        branches=tuple(step.branches for step in request.guidance_steps()),
                        unet_samples=request.unet_samples,
                    )
                )
        return plans
