"""How an engine is built: what a user may choose, checked before anything starts."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from fastface_trt.engines.contract import MAX_WINDOWS
from fastface_trt.engines.manifest import Strict, first_problem
from fastface_trt.engines.tensorrt.flavour import Flavour
from fastface_trt.errors import InvalidRequest

Tiling = Literal["none", "fast", "moderate", "full"]
Target = Literal["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]
KernelSpecialization = Literal["lazy", "eager", "none"]
Tactic = Annotated[str, Field(pattern=r"^0x[0-9a-f]{32}=0x[0-9a-f]{1,16}$")]
LatentSize = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]

RUNTIME_OPTIONS: Final = frozenset(("kernel_specialization",))
"""Options of how an engine is run: they are no part of its identity and need no build."""

_SHAPES: Final = frozenset(("requests", "branches", "latent_sizes", "dynamic", "prompt_windows"))


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("at least one is needed")
    return tuple(sorted(set(values)))


Counts = Annotated[
    tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1), AfterValidator(_distinct)
]


Options = TypeVar("Options", bound=Strict)


def _validated(kind: type[Options], values: Mapping[str, Any]) -> Options:
    try:
        return kind(**values)
    except ValidationError as error:
        where, problem = first_problem(error)
        raise InvalidRequest(
            f"The build option {where} is not valid: {problem}.",
            "See `fastface-trt build --help`.",
        ) from None


class DynamicProfile(Strict):
    """One more profile for everything between two ends, slower than a fixed one.

    Latent sizes are (height, width) in latent pixels; requests are counted per UNet call.
    """

    smallest: LatentSize
    largest: LatentSize
    max_requests: int = Field(default=4, ge=1, le=64)

    @classmethod
    def checked(cls, **values: Any) -> "DynamicProfile":
        """A profile of these values; raises `InvalidRequest` with the first thing that is wrong."""
        profile = _validated(cls, values)
        if any(low > high for low, high in zip(profile.smallest, profile.largest, strict=True)):
            raise InvalidRequest(
                "The smallest size of --dynamic is larger than its largest.", "Swap the two."
            )
        return profile


class TensorRTOptions(Strict):
    """What changes a TensorRT engine besides its module.

    requests × branches × latent_sizes give the fixed profiles (min = opt = max) of a module;
    `dynamic` adds one that covers a range. Each is for prompts of one window of 75 tokens; where
    the text's length is dynamic, one more per number of requests and size takes those of 2 to
    `prompt_windows`. Numbers left at
    None are TensorRT's own defaults. workspace_gb is in GB of 2³⁰ bytes. targets are GPU
    generations (TensorRT-RTX only; none given means all that it can build for). weight_streaming
    lets the weights stay on the host when the device is short of memory. tf32 lets float32 products
    round to 10 bits of mantissa; attention manipulation takes its statistics in float32 for a
    reason, so it is off. refittable engines take other weights without a rebuild; strip_weights
    leaves the weights out of the plan file, to be put in on the target machine. attention_plugin
    replaces the decoupled attention's subroutine by the CUDA kernels of
    `fastface_trt.engines.kernels` (TensorRT only).

    hardware_compatible engines run on every GPU from Ampere on, same_compute_capability ones on
    every GPU of the compute capability that built them, both without cuBLAS (TensorRT only).
    max_tactics: how many kernels are timed where there is a choice. l2_limit_mb: L2 cache that
    tiling may count on, in MB of 2²⁰ bytes. max_aux_streams: streams beside the caller's, 0 for
    none. build_route: `-name=value` settings of TensorRT's compiler, those that it lists in
    `IBuilderConfig.all_build_routes` (TensorRT only). editable_timing_cache keeps measurements by
    keys that `fastface-trt cache tactics` lists; `tactics` fixes some of them, as KEY=HASH in
    hexadecimal, and needs no second option (TensorRT only, not run on a GPU).

    kernel_specialization is of the run and not of the build (TensorRT-RTX only): whether kernels
    for a shape of a range are compiled in the background (`lazy`, TensorRT-RTX's default), before
    the first run (`eager`) or never. A fixed profile has one shape and compiles its kernels anyway.
    """

    requests: Counts = (1,)
    branches: Counts = (1, 2, 3)
    latent_sizes: Annotated[tuple[LatentSize, ...], AfterValidator(_distinct)] = ((128, 128),)
    dynamic: DynamicProfile | None = None
    prompt_windows: int = Field(default=MAX_WINDOWS, ge=1, le=MAX_WINDOWS)
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    tiling: Tiling = "none"
    workspace_gb: float | None = Field(default=None, gt=0)
    targets: tuple[Target, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    tf32: bool = False
    refittable: bool = False
    strip_weights: bool = False
    attention_plugin: bool = False
    same_compute_capability: bool = False
    max_tactics: int | None = Field(default=None, ge=1, lt=2**31 - 1)
    l2_limit_mb: float | None = Field(default=None, gt=0)
    max_aux_streams: int | None = Field(default=None, ge=0, lt=2**31)
    build_route: str = ""
    editable_timing_cache: bool = False
    tactics: tuple[Tactic, ...] = ()
    kernel_specialization: KernelSpecialization | None = None

    @classmethod
    def checked(cls, flavour: Flavour, **values: Any) -> "TensorRTOptions":
        """Options for `flavour`; raises `InvalidRequest` with the first thing that is wrong."""
        options = _validated(cls, values)
        options.check_flavour(flavour)
        return options

    def check_flavour(self, flavour: Flavour) -> None:
        """Raise `InvalidRequest` for what `flavour` lacks, or for options that exclude another."""
        for chosen, capability in (
            (self.targets, "compute_capabilities"),
            (self.attention_plugin, "plugins"),
            (self.version_compatible, "version_compatibility"),
            (self.hardware_compatible or self.same_compute_capability, "hardware_compatibility"),
            (self.build_route, "build_routes"),
            (self.editable_timing_cache or self.tactics, "timing_cache"),
            (self.kernel_specialization, "kernel_specialization"),
        ):
            if chosen:
                flavour.require(capability)
        if self.hardware_compatible and self.same_compute_capability:
            raise InvalidRequest(
                "An engine for every GPU from Ampere on is not for one compute capability alone.",
                "Choose one of --hardware-compatible and --same-compute-capability.",
            )
        if self.l2_limit_mb is not None and self.tiling == "none":
            raise InvalidRequest(
                "--l2-limit-mb limits tiling, which is off.", "Add --tiling fast, or leave it out."
            )
        keys = [tactic.partition("=")[0] for tactic in self.tactics]
        if len(set(keys)) < len(keys):
            raise InvalidRequest("A key has more than one --tactic.", "Give one tactic to a key.")

    def engine_options(self) -> dict[str, Any]:
        """The options that are the same for every module, where they differ from the defaults."""
        chosen = self.model_dump(
            mode="json",
            exclude={*_SHAPES, *RUNTIME_OPTIONS},
        )
        defaults = type(self)().model_dump(mode="json")
        return {name: value for name, value in chosen.items() if value != defaults[name]}
