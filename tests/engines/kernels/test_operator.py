"""The shipped operator: its CPU version against float64, refusals, and where it comes from."""

import sys
import tarfile

import numpy as np
import onnxruntime
import pytest

from fastface_trt.engines.contract import MASKED
from fastface_trt.engines.kernels import compile as compiling
from fastface_trt.engines.kernels import operator_library
from fastface_trt.engines.kernels.compile import ARCHITECTURES
from fastface_trt.engines.kernels.operator_library import (
    LIBRARY_VERSION,
    code_name,
    library_in,
    library_status,
    place_library,
    supports,
)
from fastface_trt.errors import BuildFailed, InvalidRequest, MissingDependency
from tests.engines.kernels.operator_model import expected, feeds, model, session
from tests.export.reference import decoupled_attention as reference
from tests.export.test_attention import SETTINGS, relative, row, tensors

REFUSAL = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument
SETTINGS = [*SETTINGS, {"kind": "softmask", "quantile": 0.0}, {"kind": "softmask", "quantile": 1.0}]

if not library_status().available:
    pytest.skip(library_status().detail, allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("engine")
    place_library(made, [16], ["float16"], "sm_90")
    return made


@pytest.fixture(scope="module")
def library(folder):
    return library_in(folder)


# The CPU version


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("settings", [[one] for one in SETTINGS] + [SETTINGS[:2], SETTINGS[1:4]])
def test_every_kind_equals_float64(library, dtype, base, settings):
    rows = 2 * len(settings)
    q, k, v = (x.astype(dtype) for x in tensors(3, rows, 3, 101, 16))
    addend = tensors(4, rows, 3, 101, 16)[0].astype(dtype) if base else None
    scales = [0.8 - 0.2 * i for i in range(len(settings))]
    given = feeds(q, k, v, [row(**one) for one in settings], scales, addend)
    run = session(library, dtype, base, heads=3)
    ours = run.run(None, given)[0]
    wanted = expected(q, k, v, settings, scales, addend)
    assert ours.dtype == dtype
    assert relative(ours, wanted) < (1e-3 if dtype == "float16" else 1e-5)
    # Rounded once: half a unit in the last place, and beside it only the parameters' float32.
    unit = 2.0**-11 if dtype == "float16" else 2.0**-24
    assert (np.abs(ours - wanted) <= unit * np.abs(wanted) + 2e-6 * np.abs(wanted).max()).all()
    for i in range(len(settings)):  # mixed requests are single requests
        at, one = slice(2 * i, 2 * i + 2), slice(i, i + 1)
        single = {
            n: x[one] if n in ("manipulation", "ip_scale") else x[at] for n, x in given.items()
        }
        assert np.array_equal(run.run(None, single)[0], ours[at])


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tokens", [16, 80])
def test_masked_tokens_are_as_if_they_were_not_there(library, settings, base, tokens):
    there = tokens // 2
    q, k, v = tensors(tokens, 2, 3, 33, 16, tokens)
    addend = tensors(4, 2, 3, 33, 16)[0] if base else None
    mask = np.zeros((2, tokens), np.float32)
    mask[:, there:] = MASKED
    run = session(library, "float32", base, heads=3, mask=True)
    ours = run.run(None, feeds(q, k, v, [row(**settings)], [0.8], addend, mask))[0]
    wanted = expected(q, k[:, :, :there], v[:, :, :there], [settings], [0.8], addend)
    assert relative(ours, wanted) < 1e-5


def test_every_fp16_number_comes_through(library):
    """λ = 0 leaves the base alone: all bit patterns, and where numbers of all sizes are rounded."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    base = np.resize(every, (1, 2, 2048, 16)).astype(np.float16)
    q, k, v = (x.astype(np.float16) for x in tensors(0, 1, 2, 2048, 16))
    run = session(library, "float16", True)
    given = feeds(q, k, v, [row()], [0.0], base)
    assert np.array_equal(run.run(None, given)[0], given["base"])
    # All tokens alike: A V' is v exactly, and λ v is rounded as numpy rounds it.
    v[...] = v[:, :, :1] = np.resize([0.25, -0.5, 1, 2, -4, 3, 0.75, -1.5], (1, 2, 1, 16))
    scale = np.float32(3.1e-8) * 2.0 ** np.arange(0, 45, 3)
    for one in scale.astype(np.float32):
        ours = run.run(None, feeds(0 * q, k, v, [row()], [one], 0 * base))[0]
        with np.errstate(over="ignore"):
            wanted = (np.float64(one) * v[0, 0, 0].astype(np.float64)).astype(np.float16)
        assert np.array_equal(ours[0, 0, :16], wanted), one


def test_flat_maps_are_finite(library):
    q, k, v = tensors(0, size=8)
    settings = SETTINGS[3]
    ours = session(library, "float32").run(None, feeds(0 * q, k, v, [row(**settings)], [1.0]))[0]
    np.testing.assert_allclose(ours, expected(0 * q, k, v, [settings], [1.0]), atol=1e-5)
    assert np.isfinite(reference(0 * q, k, v, **settings)).all()


def test_no_rows_and_no_positions_are_nothing_to_do(library):
    run = session(library, "float16")
    for shape in ((0, 5, 32), (2, 0, 32)):
        tokens = np.zeros((shape[0], 4, 32), np.float16)
        given = {"q": np.zeros(shape, np.float16), "k": tokens, "v": tokens}
        given |= {"manipulation": np.zeros((1, 8), np.float32), "ip_scale": np.ones(1, np.float32)}
        assert run.run(None, given)[0].shape == shape


def test_shapes_are_inferred_and_what_is_unknown_stays_open(library):
    assert session(library).get_outputs()[0].shape == ["rows", "positions", "width"]
    assert session(library, width=64).get_outputs()[0].shape == ["rows", "positions", 64]
    nameless = model()
    nameless.graph.input[0].type.tensor_type.shape.dim[1].Clear()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    run = onnxruntime.InferenceSession(nameless.SerializeToString(), options)
    assert -1 not in run.get_outputs()[0].shape
    assert run.get_outputs()[0].type == "tensor(float16)"


BAD = [
    ({"q": (3, 40)}, "Invalid rank|q is"),
    ({"q": (3, 40, 33)}, r"q is \[3, 40, 33\] and has to be \[B, N, H \* D\] with H = 2"),
    ({"k": (3, 5, 32)}, r"v is \[3, 4, 32\] and has to be \[3, 5, 32\], as many image tokens"),
    ({"k": (3, 1, 32)}, r"k is \[3, 1, 32\]; 2 to 256 image tokens are taken"),
    ({"v": (2, 4, 32)}, r"v is \[2, 4, 32\]"),
    ({"ip_scale": (2,), "manipulation": (2, 8)}, "3 rows do not divide into 2 requests"),
    ({"ip_scale": (0,)}, "3 rows do not divide into 0 requests"),
    ({"manipulation": (1, 7)}, r"manipulation is \[1, 7\] and has to be \[1, 8\]"),
    ({"manipulation": (3, 8)}, r"manipulation is \[3, 8\]"),
    ({"base": (3, 40, 16)}, r"base is \[3, 40, 16\] and has to be \[3, 40, 32\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_does_not_fit_is_refused_in_a_sentence(library, change, message):
    shapes = {"q": (3, 40, 32), "k": (3, 4, 32), "v": (3, 4, 32), "manipulation": (1, 8)}
    shapes |= {"ip_scale": (1,), "base": (3, 40, 32)} | change
    single = ("manipulation", "ip_scale")
    given = {n: np.ones(s, np.float32 if n in single else np.float16) for n, s in shapes.items()}
    with pytest.raises(REFUSAL, match=message):
        session(library, base=True).run(None, given)


def test_a_node_without_heads_is_refused(library):
    # ONNX Runtime wraps it in an error of its own kind while a session is made.
    with pytest.raises(Exception, match="attribute num_heads is missing or not positive"):
        session(library, other=1)


# Where library and code come from


def test_the_shipped_archive_was_made_from_these_sources():
    """`make operator-library` after every change of a source."""
    with tarfile.open(operator_library._HERE / operator_library._ARCHIVE) as archive:
        assert archive.extractfile("sources").read().decode() == LIBRARY_VERSION
        library = archive.extractfile(operator_library.LIBRARY_NAME).read()
        names = set(archive.getnames())
        size = sum(one.size for one in archive.getmembers())
    assert f"fastface kernels {LIBRARY_VERSION}".encode() in library
    kinds = [(d, t) for d in operator_library.SHIPPED_HEAD_SIZES for t in ("float16", "float32")]
    code = {code_name(*kind, one) for kind in kinds for one in (*ARCHITECTURES, None)}
    assert names == code | {"sources", operator_library.LIBRARY_NAME}
    assert (operator_library._HERE / operator_library._ARCHIVE).stat().st_size < 1_000_000 < size


def test_shipped_code_is_for_drivers_of_cuda_12_and_13():
    """PTX of version 8.x, which every driver from 12.x on takes; NVRTC 13 writes 9.x."""
    for name, content in operator_library._shipped().items():
        if name.endswith(".ptx"):
            text = content.decode()
            assert "\n.version 8." in text
            assert "\n.target sm_80" in text
        elif name.endswith(".cubin"):
            assert content[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("sm_80", "sm_80"),
        ("sm_87", "sm_86"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_110", None),
    ],
)
def test_an_engine_gets_the_code_of_its_gpu(tmp_path, architecture, nearest):
    made = place_library(tmp_path, [64, 64], ["float16"], architecture)
    names = {code_name(64, "float16", one) for one in (nearest, None)}
    assert {path.name for path in made} == names | {operator_library.LIBRARY_NAME}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in made}
    assert library_in(tmp_path) == tmp_path / operator_library.LIBRARY_NAME


def test_without_a_gpu_an_engine_gets_all_code(tmp_path, monkeypatch):
    unknown = {"gpu": "unknown", "compute_capability": "unknown"}
    monkeypatch.setattr(operator_library, "cuda_hardware", lambda: unknown)
    made = place_library(tmp_path, [16], ["float32"])
    assert len(made) == len(ARCHITECTURES) + 2
    assert library_in(tmp_path / "elsewhere") is None
    here = {"gpu": "H100", "compute_capability": "9.0"}
    monkeypatch.setattr(operator_library, "cuda_hardware", lambda: here)
    assert "for sm_90 (machine code)" in library_status().detail
    assert "for sm_110 (PTX)" in library_status("sm_110").detail


def test_other_head_sizes_are_compiled(tmp_path, monkeypatch):
    made = place_library(tmp_path, [24], ["float16"], "sm_90")
    names = {path.name for path in made}
    assert {code_name(24, "float16", "sm_90"), code_name(24, "float16")} < names
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependency, match=r"heads of 40 .* not shipped, .*kernels"):
        place_library(tmp_path / "no", [40], ["float16"], "sm_90")
    with pytest.raises(InvalidRequest, match="63 elements"):
        place_library(tmp_path, [63], ["float16"], "sm_90")
    with pytest.raises(InvalidRequest, match="is not a GPU architecture"):
        place_library(tmp_path, [64], ["float16"], "9.0")


def test_supports():
    assert supports(4, 64, "float16")
    assert supports(4, 16, "float32")
    assert supports(16, 64, "float16")
    assert supports(80, 64, "float16")
    assert not supports(1, 64, "float16")
    assert not supports(257, 64, "float16")
    assert not supports(4, 63, "float16")
    assert not supports(4, 64, "bfloat16")


@pytest.fixture
def nothing_shipped(monkeypatch):
    for cached in (operator_library._shipped, operator_library._built):
        cached.cache_clear()
    monkeypatch.setattr(operator_library, "_ARCHIVE", "none.tar.xz")
    yield monkeypatch
    for cached in (operator_library._shipped, operator_library._built):
        cached.cache_clear()


def test_where_nothing_is_shipped_it_is_built(nothing_shipped, tmp_path):
    if operator_library._compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    status = library_status("sm_90")
    assert status.available
    assert "built by" in status.detail
    made = place_library(tmp_path, [8], ["float32"], "sm_90")
    assert len(made) == 3
    q, k, v = tensors(0, size=8)
    ours = session(library_in(tmp_path), "float32").run(None, feeds(q, k, v, [row()], [1.0]))[0]
    assert relative(ours, expected(q, k, v, [{"kind": "off"}], [1.0])) < 1e-6
    nothing_shipped.setattr(operator_library, "_OPTIONS", ("-std=c++1",))
    operator_library._built.cache_clear()
    with pytest.raises(BuildFailed, match=r"cannot compile ort_operator\.cpp: .*std=c\+\+1"):
        place_library(tmp_path, [8], ["float32"], "sm_90")


def test_without_a_compiler_the_status_says_what_to_do(nothing_shipped, tmp_path):
    nothing_shipped.setenv("PATH", str(tmp_path))
    status = library_status("sm_90")
    assert not status.available
    assert "no C++ compiler" in status.detail
    assert "apt install g++" in status.hint
    with pytest.raises(MissingDependency, match="apt install"):
        place_library(tmp_path, [64], ["float16"], "sm_90")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_of_other_sources_is_not_taken(nothing_shipped):
    nothing_shipped.undo()
    nothing_shipped.setattr(operator_library, "LIBRARY_VERSION", "0" * 16)
    operator_library._shipped.cache_clear()
    assert operator_library._shipped() == {}


def test_other_systems_and_older_gpus_are_told(monkeypatch):
    assert "sm_80 or newer, and this GPU is sm_75" in library_status("sm_75").detail
    monkeypatch.setattr(operator_library.platform, "machine", lambda: "aarch64")
    operator_library._shipped.cache_clear()
    assert "its GPU code is shipped" in library_status("sm_90").detail
    operator_library._shipped.cache_clear()
    monkeypatch.setattr(sys, "platform", "win32")
    assert "not for win32" in library_status().detail


def test_the_compilers_options_are_the_layout_of_the_operator():
    assert compiling.compile_kernels("sm_90", 16, "float16", heads_last=True).code.count(
        b"decoupled_attention_param_12"
    )
    assert not compiling.compile_kernels("sm_90", 16, "float16").code.count(
        b"decoupled_attention_param_12"
    )
