"""Optimisation profiles: for which shapes of a module an engine is built.

A profile with min = opt = max lets the builder choose kernels for exactly one shape, which dynamic
shapes cost about a quarter of (28 % in one SDXL-Turbo measurement, onnxruntime pull request 18627).
The guidance says how many branches a step needs, so there is one profile per number of branches.

Shape legend: R requests, G branches, B = R·G rows, h × w latent size.
"""

import itertools
from collections.abc import Iterator, Mapping

from fastface_trt.engines.contract import TEXT_POSITIONS
from fastface_trt.engines.manifest import Dimension, EngineManifest, ModuleSpec, Strict
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.errors import BuildFailed

Shape = tuple[int, ...]


class Profile(Strict):
    """Shapes of a module's inputs by name: the smallest, the one to optimise for, the largest."""

    smallest: dict[str, Shape]
    best: dict[str, Shape]
    largest: dict[str, Shape]

    @property
    def fixed(self) -> bool:
        """Whether it is for one shape only."""
        return self.smallest == self.largest

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes can run in this profile."""
        return all(
            len(shape) == len(self.smallest[name])
            and all(
                low <= size <= high
                for low, size, high in zip(
                    self.smallest[name], shape, self.largest[name], strict=True
                )
            )
            for name, shape in shapes.items()
        )

    def words(self, name: str | None = None) -> str:
        """The shapes of an input, the first by default, for a message."""
        name = name or next(iter(self.best))
        ends = [" x ".join(map(str, end[name])) for end in (self.smallest, self.largest)]
        return f"{name} {ends[0]}" if self.fixed else f"{name} {ends[0]} to {ends[1]}"


def make_profiles(module: ModuleSpec, options: TensorRTOptions) -> tuple[Profile, ...]:
    """The profiles of one module, without repetitions, fixed ones first.

    Only the sizes that the module has count: a text encoder has one profile whatever the numbers of
    branches. Raises `BuildFailed` for a dynamic size that no option gives.
    """
    profiles: dict[str, Profile] = {}
    for sizes in _sizes(module, options, options.branches):
        shapes = _shapes(module, sizes | {"text": TEXT_POSITIONS})
        profile = Profile(smallest=shapes, best=shapes, largest=shapes)
        profiles.setdefault(profile.model_dump_json(), profile)
    for profile in _long_prompts(module, options):
        profiles.setdefault(profile.model_dump_json(), profile)
    if (options.refittable or options.strip_weights) and module.probe is not None:
        # A refitted engine is compared on the export's probe, which is smaller than any picture.
        shapes = _shapes(module, module.probe.sizes)
        profile = Profile(smallest=shapes, best=shapes, largest=shapes)
        profiles.setdefault(profile.model_dump_json(), profile)
    if options.dynamic is not None:
        profile = _dynamic(module, options)
        if not profile.fixed:
            profiles.setdefault(profile.model_dump_json(), profile)
    return tuple(profiles.values())


def read_profiles(manifest: EngineManifest) -> tuple[Profile, ...]:
    """The profiles that an engine was built with, in the order of their indices in the plan."""
    return tuple(Profile.model_validate(one) for one in manifest.options["profiles"])


def choose_profile(profiles: tuple[Profile, ...], shapes: Mapping[str, Shape]) -> int | None:
    """Index of the profile to run `shapes` in, a fixed one if there is one; None if none fits."""
    fitting = [index for index, profile in enumerate(profiles) if profile.fits(shapes)]
    return min(fitting, key=lambda index: not profiles[index].fixed, default=None)


def request_counts(module: ModuleSpec, profiles: tuple[Profile, ...]) -> tuple[int, ...] | None:
    """Numbers of requests that some profile takes; None for a module that knows no requests."""
    places = [
        (tensor.name, tensor.shape.index("requests"))
        for tensor in module.inputs
        if "requests" in tensor.shape
    ]
    if not places:
        return None
    name, axis = places[0]
    return tuple(
        sorted(
            {
                count
                for profile in profiles
                for count in range(profile.smallest[name][axis], profile.largest[name][axis] + 1)
            }
        )
    )


def _sizes(
    module: ModuleSpec, options: TensorRTOptions, branch_counts: tuple[int, ...]
) -> Iterator[dict[str, int]]:
    per_request = _names(module) & {"requests", "branches"}
    counts = itertools.product(options.requests, branch_counts) if per_request else [(1, 1)]
    for (requests, branches), (height, width) in itertools.product(counts, options.latent_sizes):
        yield {
            "requests": requests,
            "branches": branches,
            "batch": requests * branches,
            "height": height,
            "width": width,
        }


def _long_prompts(module: ModuleSpec, options: TensorRTOptions) -> Iterator[Profile]:
    """Profiles of prompts of 2 to `prompt_windows` windows: few, since each costs gigabytes while a
    full-size UNet is built. One is for all branches and lengths of a size and number of requests;
    another range of requests would promise numbers that the fixed profiles do not take.
    """
    if "text" not in _names(module) or options.prompt_windows < 2:
        return
    fewest, most = ((count(options.branches),) for count in (min, max))
    for low, high in zip(
        _sizes(module, options, fewest), _sizes(module, options, most), strict=True
    ):
        best = _shapes(module, high | {"text": 2 * TEXT_POSITIONS})
        yield Profile(
            smallest=_shapes(module, low | {"text": 2 * TEXT_POSITIONS}),
            best=best,
            largest=_shapes(module, high | {"text": options.prompt_windows * TEXT_POSITIONS}),
        )


def _dynamic(module: ModuleSpec, options: TensorRTOptions) -> Profile:
    dynamic = options.dynamic
    assert dynamic is not None
    requests = dynamic.max_requests if "requests" in _names(module) else 1
    branches = max(options.branches) if "requests" in _names(module) else 1
    (low_h, low_w), (high_h, high_w) = dynamic.smallest, dynamic.largest
    best_h, best_w = options.latent_sizes[-1]
    ends = [
        _shapes(
            module,
            {"requests": r, "branches": g, "batch": b, "height": h, "width": w, "text": text},
        )
        for r, g, b, h, w, text in (
            (1, 1, 1, low_h, low_w, TEXT_POSITIONS),
            (
                1,
                branches,
                branches,
                _between(low_h, best_h, high_h),
                _between(low_w, best_w, high_w),
                TEXT_POSITIONS,
            ),
            (
                requests,
                branches,
                requests * branches,
                high_h,
                high_w,
                options.prompt_windows * TEXT_POSITIONS,
            ),
        )
    ]
    return Profile(smallest=ends[0], best=ends[1], largest=ends[2])


def _between(low: int, value: int, high: int) -> int:
    return min(max(low, value), high)


def _names(module: ModuleSpec) -> set[str]:
    return {size for tensor in module.inputs for size in tensor.shape if isinstance(size, str)}


def _shapes(module: ModuleSpec, sizes: Mapping[str, int]) -> dict[str, Shape]:
    def size(of: Dimension) -> int:
        if isinstance(of, int):
            return of
        if of not in sizes:
            raise BuildFailed(
                f"Module {module.name} has a size called {of}, which no build option gives.",
                "Export it again with this version.",
            )
        return sizes[of]

    return {tensor.name: tuple(size(of) for of in tensor.shape) for tensor in module.inputs}
