"""Options and profiles: which shapes an engine is built for, and which profile a call runs in."""

import pytest

from fastface_trt.engines.manifest import FileEntry, ModuleSpec, TensorSpec
from fastface_trt.engines.tensorrt.flavour import FLAVOURS, find_flavour
from fastface_trt.engines.tensorrt.options import DynamicProfile, TensorRTOptions
from fastface_trt.engines.tensorrt.profiles import choose_profile, make_profiles, request_counts
from fastface_trt.errors import BuildFailed, InvalidRequest, UnknownName

RTX, TENSORRT = FLAVOURS["tensorrt-rtx"], FLAVOURS["tensorrt"]


def module(**shapes):
    return ModuleSpec(
        name="m",
        inputs=tuple(
            TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()
        ),
        outputs=(),
        files=(FileEntry(path="m.onnx", bytes=1, sha256="0" * 64),),
    )


UNET = module(sample=("batch", 4, "height", "width"), ip_adapter_scale=("requests", 3))
TEXT = module(input_ids=("batch", 77))
VAE = module(latents=("batch", 4, "height", "width"))


def test_one_fixed_profile_per_number_of_branches():
    profiles = make_profiles(UNET, TensorRTOptions(latent_sizes=((16, 24),)))
    assert [p.best["sample"] for p in profiles] == [(n, 4, 16, 24) for n in (1, 2, 3)]
    assert all(p.best["ip_adapter_scale"] == (1, 3) and p.fixed for p in profiles)


TEXT_UNET = module(
    sample=("batch", 4, 8, 8),
    encoder_hidden_states=("batch", "text", 6),
    scale=("requests", 3),
    branch=("branches", 2),
)


def test_longer_prompts_have_one_profile_for_all_branches_of_a_number_of_requests():
    profiles = make_profiles(TEXT_UNET, TensorRTOptions(requests=(1, 4)))
    assert [p.fixed for p in profiles] == [True] * 6 + [False] * 2
    for requests, profile in zip((1, 4), profiles[6:], strict=True):
        assert profile.smallest["encoder_hidden_states"] == (requests, 154, 6)
        assert profile.largest["encoder_hidden_states"] == (3 * requests, 231, 6)
        assert profile.smallest["scale"] == profile.largest["scale"] == (requests, 3)
    # No range of requests: it would promise 2 and 3, which no profile of short prompts takes.
    assert request_counts(TEXT_UNET, profiles) == (1, 4)


def test_lengths_of_longer_prompts():

    def lengths(**options):
        return [
            (p.smallest[name], p.best[name], p.largest[name])
            for p in make_profiles(TEXT_UNET, TensorRTOptions(branches=(2,), **options))
            for name in ("encoder_hidden_states",)
        ]

    assert [[shape[1] for shape in ends] for ends in lengths()] == [[77] * 3, [154, 154, 231]]
    assert [ends[0][1] for ends in lengths(prompt_windows=1)] == [77]
    assert lengths(prompt_windows=2)[1] == ((2, 154, 6),) * 3
    options = TensorRTOptions(
        branches=(2,), dynamic=DynamicProfile(smallest=(8, 8), largest=(8, 8))
    )
    assert make_profiles(TEXT_UNET, options)[-1].largest["encoder_hidden_states"][1] == 231
    with pytest.raises(InvalidRequest, match="prompt_windows"):
        TensorRTOptions.checked(RTX, prompt_windows=4)


def test_requests_times_branches_times_sizes():
    options = TensorRTOptions(
        requests=(2, 1), branches=(3, 1), latent_sizes=((16, 16), (8, 8)), dynamic=None
    )
    rows = [
        (p.best["ip_adapter_scale"][0], *p.best["sample"]) for p in make_profiles(UNET, options)
    ]
    assert sorted(rows) == sorted(
        (r, r * g, 4, side, side) for r in (1, 2) for g in (1, 3) for side in (8, 16)
    )


def test_modules_without_requests_are_built_once_per_size():
    options = TensorRTOptions(requests=(1, 4), latent_sizes=((16, 16), (8, 8)))
    assert [p.best["input_ids"] for p in make_profiles(TEXT, options)] == [(1, 77)]
    assert [p.best["latents"] for p in make_profiles(VAE, options)] == [
        (1, 4, 8, 8),
        (1, 4, 16, 16),
    ]


def test_a_dynamic_profile_covers_its_range_and_fixed_ones_go_first():
    dynamic = DynamicProfile(smallest=(8, 8), largest=(32, 24), max_requests=2)
    profiles = make_profiles(UNET, TensorRTOptions(latent_sizes=((16, 16),), dynamic=dynamic))
    last = profiles[-1]
    assert not last.fixed
    assert last.smallest["sample"] == (1, 4, 8, 8)
    assert last.largest["sample"] == (6, 4, 32, 24)

    def chosen(rows, requests, height, width):
        shapes = {"sample": (rows, 4, height, width), "ip_adapter_scale": (requests, 3)}
        return choose_profile(profiles, shapes)

    assert chosen(2, 1, 16, 16) == 1
    assert chosen(2, 1, 16, 24) == chosen(4, 2, 16, 16) == 3
    assert chosen(2, 1, 16, 32) is None
    assert chosen(9, 3, 16, 16) is None


def test_how_many_requests_an_engine_takes():
    fixed = TensorRTOptions(requests=(4, 1))
    assert request_counts(UNET, make_profiles(UNET, fixed)) == (1, 4)
    dynamic = DynamicProfile(smallest=(64, 64), largest=(128, 128), max_requests=3)
    ranged = TensorRTOptions(requests=(1,), dynamic=dynamic)
    assert request_counts(UNET, make_profiles(UNET, ranged)) == (1, 2, 3)
    assert request_counts(TEXT, make_profiles(TEXT, fixed)) is None


def test_a_size_that_no_option_gives():
    with pytest.raises(BuildFailed, match="a size called length"):
        make_profiles(module(x=("length",)), TensorRTOptions())


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"branches": ()}, "branches"),
        ({"requests": (0,)}, "requests"),
        ({"optimization_level": 9}, "optimization_level"),
        ({"targets": ("sm10",)}, "targets"),
        ({"workspace_gb": -1}, "workspace_gb"),
        ({"colour": "red"}, "colour"),
        ({"max_tactics": 0}, "max_tactics"),
        ({"max_aux_streams": -1}, "max_aux_streams"),
        ({"l2_limit_mb": 4.0}, "l2-limit-mb"),
        ({"tactics": ("0x12=0x5",)}, "tactics"),
        ({"kernel_specialization": "soon"}, "kernel_specialization"),
    ],
)
def test_options_that_are_not_valid_name_the_option(values, where):
    with pytest.raises(InvalidRequest, match=where):
        TensorRTOptions.checked(RTX, **values)


@pytest.mark.parametrize(
    ("flavour", "values", "other"),
    [
        (TENSORRT, {"targets": ("sm89",)}, "TensorRT-RTX"),
        (RTX, {"version_compatible": True}, "TensorRT"),
        (RTX, {"hardware_compatible": True}, "TensorRT"),
        (RTX, {"same_compute_capability": True}, "TensorRT"),
        (RTX, {"build_route": "-a=b"}, "TensorRT"),
        (RTX, {"editable_timing_cache": True}, "TensorRT"),
        (RTX, {"tactics": (f"0x{'1' * 32}=0x5",)}, "TensorRT"),
        (TENSORRT, {"kernel_specialization": "eager"}, "TensorRT-RTX"),
    ],
)
def test_options_of_the_other_flavour_are_refused(flavour, values, other):
    with pytest.raises(InvalidRequest, match="does not offer") as caught:
        TensorRTOptions.checked(flavour, **values)
    assert other in caught.value.hint


def test_only_what_differs_from_the_defaults_is_part_of_the_identity():
    assert TensorRTOptions().engine_options() == {}
    assert TensorRTOptions(branches=(1,)).engine_options() == {}
    assert TensorRTOptions(optimization_level=0, targets=("sm89",)).engine_options() == {
        "optimization_level": 0,
        "targets": ["sm89"],
    }


@pytest.mark.parametrize(
    "values",
    [
        {"hardware_compatible": True, "same_compute_capability": True},
        {"tactics": (f"0x{'1' * 32}=0x5", f"0x{'1' * 32}=0x6")},
    ],
)
def test_options_that_exclude_another_are_refused(values):
    with pytest.raises(InvalidRequest):
        TensorRTOptions.checked(TENSORRT, **values)


def test_what_is_of_the_run_is_no_part_of_the_identity():
    assert TensorRTOptions(kernel_specialization="eager").engine_options() == {}
    build = TensorRTOptions(max_tactics=4, max_aux_streams=0, tiling="fast", l2_limit_mb=4)
    assert build.engine_options() == {
        "max_tactics": 4,
        "max_aux_streams": 0,
        "tiling": "fast",
        "l2_limit_mb": 4,
    }
    for one in ({"build_route": "-a=b"}, {"tactics": (f"0x{'1' * 32}=0x5",)}):
        assert list(TensorRTOptions(**one).engine_options()) == list(one)


def test_unknown_flavour():
    with pytest.raises(UnknownName, match="Did you mean 'tensorrt-rtx'"):
        find_flavour("tensorrt-rx")
