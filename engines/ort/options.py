"""Options of ONNX Runtime's CUDA provider: which there are, which users may set, and our defaults.

ONNX Runtime finds an unknown option when a session is made, after the graph has been read, so they
are checked here, before anything is built. The names are those that its releases from 1.20 to 1.31
share.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fastface_trt.errors import InvalidRequest, UnknownName

ProviderOptions = dict[str, str]

_SWITCH: Final = ("0", "1")
_NUMBER: Final = ()
_VALUES: Final[Mapping[str, tuple[str, ...]]] = {
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
    "cudnn_conv1d_pad_to_nc1d": _SWITCH,
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "cudnn_conv_use_max_workspace": _SWITCH,
    "do_copy_in_default_stream": _SWITCH,
    "enable_cuda_graph": _SWITCH,
    "enable_skip_layer_norm_strict_mode": _SWITCH,
    "fuse_conv_bias": _SWITCH,
    "gpu_mem_limit": _NUMBER,
    "prefer_nhwc": _SWITCH,
    "sdpa_kernel": _NUMBER,
    "tunable_op_enable": _SWITCH,
    "tunable_op_max_tuning_duration_ms": _NUMBER,
    "tunable_op_tuning_enable": _SWITCH,
    "use_tf32": _SWITCH,
}
"""Option to its values; () stands for a whole number."""

_OURS: Final = frozenset(
    {
        "device_id",
        "gpu_external_alloc",
        "gpu_external_empty_cache",
        "gpu_external_free",
        "has_user_compute_stream",
        "use_ep_level_unified_stream",  # a stream of the user's implies it
        "user_compute_stream",
    }
)

DEFAULTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        # A search that times every algorithm costs about a second after every change of rows, and
        # its workspaces took 26 GB of device memory; what it finds was no faster.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The arena holds activations only, which a larger run extends: doubling it keeps up to as
        # much again for nothing.
        "arena_extend_strategy": "kSameAsRequested",
        # A float32 export is asked for because of its digits, and the float32 products of others
        # are too small to matter.
        "use_tf32": "0",
    }
)
"""Of opening. `cudnn_conv_use_max_workspace` stays on, as ONNX Runtime has it: with the heuristic
it is the workspace of one algorithm, which goes back to the arena."""

_BUILDS: Final = frozenset({"prefer_nhwc"})
"""Options that change the saved graph; the others change how it runs."""


def checked_options(options: Mapping[str, object]) -> ProviderOptions:
    """Options of the CUDA provider as strings; True and False are 1 and 0.

    Raises `UnknownName` for an option that there is not, `InvalidRequest` for one that the engine
    sets itself, and for a value that it does not take.
    """
    checked: ProviderOptions = {}
    for name, value in options.items():
        if name in _OURS:
            raise InvalidRequest(
                f"The provider option {name} is set by the engine itself.", "Leave it out."
            )
        if name not in _VALUES:
            raise UnknownName("provider option", name, _VALUES)
        text = str(int(value)) if isinstance(value, bool) else str(value)
        text = {"true": "1", "false": "0"}.get(text.lower(), text)
        known = _VALUES[name]
        if text not in known if known else not text.isdecimal():
            raise InvalidRequest(
                f"The provider option {name} is {text!r}.",
                f"It takes {', '.join(known) or 'a whole number'}.",
            )
        checked[name] = text
    return checked


def build_options(options: ProviderOptions) -> ProviderOptions:
    """Those of the given options that change what is built: they are part of its identity."""
    return {name: value for name, value in sorted(options.items()) if name in _BUILDS}
