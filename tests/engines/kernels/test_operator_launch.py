"""The operator's CUDA version on a stand-in driver: launches, scratch, captures, threads."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

from fastface_trt.engines.contract import MASKED
from fastface_trt.engines.kernels.operator_library import code_name
from tests.engines.kernels.emulated import COMPILER, build
from tests.engines.kernels.operator_model import expected, feeds, session
from tests.export.test_attention import SETTINGS, relative, row, tensors

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++) on this machine")

SIZE = 16
FAILURES = (onnxruntime.capi.onnxruntime_pybind11_state.Fail,)
REFUSALS = (onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,)


class StandIn:
    def __init__(self, folder, dtype, tokens=4):
        self.dtype = np.dtype(dtype)
        self.code = folder / code_name(SIZE, self.dtype.name, "sm_90", tokens)
        self.code.write_text("code of sm_90")
        self.library = build(folder, SIZE, dtype, True, "stand_in.cpp", tokens)
        self.path = self.library._name
        self.library.images.restype = ctypes.c_char_p
        for name in ("blocks", "modules", "launches"):
            getattr(self.library, name).restype = ctypes.c_size_t
        self.reset()

    def reset(self):
        self.on()
        self.set()
        self.launches()

    def on(self, context=0x10, stream=0x100, stream_context=0x10):
        self.library.on(*map(ctypes.c_uint64, (context, stream, stream_context)))

    def set(self, capturing=False, full=False, pause=0, minor=0, driver=True):
        self.library.set(*map(int, (capturing, full, pause, minor, driver)))

    def launches(self):
        """Context, stream, grid x and y, scratch address of every launch since the last look."""
        buffer = np.zeros((4096, 5), np.uint64)
        count = self.library.launches(ctypes.c_void_p(buffer.ctypes.data), ctypes.c_size_t(4096))
        return buffer[:count].tolist()

    def session(self, **keywords):
        return session(self.path, self.dtype, **keywords)

    def inputs(self, seed=0, rows=3, positions=40, settings=SETTINGS[2:3], base=False):
        drawn = tensors(seed, rows, 2, positions, SIZE)
        q, k, v = (x.astype(self.dtype) for x in drawn)
        scales = [0.8 - 0.1 * i for i in range(len(settings))]
        addend = tensors(seed + 1, rows, 2, positions, SIZE)[0].astype(self.dtype) if base else None
        given = feeds(q, k, v, [row(**one) for one in settings], scales, addend)
        return given, expected(q, k, v, settings, scales, addend)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_in")
    return {dtype: StandIn(folder, dtype) for dtype in (np.float16, np.float32)}


@pytest.fixture(scope="module")
def of_16_tokens(tmp_path_factory):
    return StandIn(tmp_path_factory.mktemp("of_16_tokens"), np.float32, tokens=16)


@pytest.fixture
def half(built):
    yield built[np.float16]
    built[np.float16].reset()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("settings", [[one] for one in SETTINGS] + [SETTINGS[:3], SETTINGS[2:4]])
def test_every_kind_equals_float64(built, dtype, base, settings):
    stand_in = built[dtype]
    rows = 2 * len(settings)
    given, wanted = stand_in.inputs(rows=rows, positions=600, settings=settings, base=base)
    ours = stand_in.session(base=base).run(None, given)[0]
    assert ours.dtype == dtype
    assert relative(ours, wanted) < (1e-3 if dtype == np.float16 else 1e-5)
    assert [launch[2:4] for launch in stand_in.launches()] == [[2 * rows, 1], [2, 2 * rows]]


@pytest.mark.parametrize("settings", SETTINGS[:4])
@pytest.mark.parametrize("base", [False, True])
def test_many_tokens_are_launched_with_their_mask(of_16_tokens, settings, base):
    q, k, v = tensors(5, 2, 2, 40, SIZE, 16)
    addend = tensors(6, 2, 2, 40, SIZE)[0] if base else None
    mask = np.zeros((2, 16), np.float32)
    mask[:, 9:] = MASKED
    run = of_16_tokens.session(base=base, mask=True)
    ours = run.run(None, feeds(q, k, v, [row(**settings)], [0.8], addend, mask))[0]
    wanted = expected(q, k[:, :, :9], v[:, :, :9], [settings], [0.8], addend)
    assert relative(ours, wanted) < 1e-5
    others = feeds(*tensors(5, 2, 2, 40, SIZE, 18), [row(**settings)], [0.8])
    other = of_16_tokens.session()
    with pytest.raises(FAILURES, match=f"no code for heads of {SIZE}-float32-18tokens"):
        other.run(None, others)


def test_scratch_is_one_block_per_stream_and_grows(half):
    run = half.session()
    for stream, positions in ((0x100, 40), (0x100, 20), (0x200, 40), (0x100, 30000), (0x200, 40)):
        half.on(stream=stream)
        given, _ = half.inputs(rows=3, positions=positions, settings=SETTINGS[:1])
        run.run(None, given)
    launches = half.launches()
    assert [one[1] for one in launches[::2]] == [0x100, 0x100, 0x200, 0x100, 0x200]
    first, again, other, grown, last = (one[4] for one in launches[::2])
    assert first == again
    assert other == last
    assert len({first, other, grown}) == 3
    assert half.library.blocks() == 3  # the small one stays: a captured graph may hold its address


def test_sessions_share_and_the_last_one_gives_back(half):
    first, second = half.session(), half.session()
    given, _ = half.inputs()
    first.run(None, given), second.run(None, given)
    assert len({one[4] for one in half.launches()}) == 1
    assert (half.library.blocks(), half.library.modules()) == (1, 1)
    half.on(context=0)  # sessions are closed by threads that have no context, too
    del first
    assert (half.library.blocks(), half.library.modules()) == (1, 1)
    del second
    assert (half.library.blocks(), half.library.modules()) == (0, 0)


def test_two_devices_have_code_and_scratch_of_their_own(half):
    run = half.session()
    given, wanted = half.inputs()
    for context in (0x10, 0x20):
        half.on(context=context, stream=context << 4, stream_context=context)
        assert relative(run.run(None, given)[0], wanted) < 1e-3
    assert (half.library.blocks(), half.library.modules()) == (2, 2)


def test_a_new_thread_takes_the_context_of_the_stream(half):
    run = half.session()
    given, wanted = half.inputs()
    half.on(context=0, stream=0x100, stream_context=0x30)
    assert relative(run.run(None, given)[0], wanted) < 1e-3
    assert {one[0] for one in half.launches()} == {0x30}
    half.on(context=0, stream=0)
    with pytest.raises(FAILURES, match="no CUDA context is current"):
        run.run(None, given)


def test_nothing_is_allocated_or_loaded_during_a_capture(half):
    run = half.session()
    given, wanted = half.inputs()
    half.set(capturing=True)
    with pytest.raises(FAILURES, match="a capture wants a run of the same size"):
        run.run(None, given)
    half.set()
    run.run(None, given)
    half.set(capturing=True)
    assert relative(run.run(None, given)[0], wanted) < 1e-3
    larger, _ = half.inputs(positions=30000, settings=SETTINGS[:1])
    with pytest.raises(FAILURES, match="a capture wants a run of the same size"):
        run.run(None, larger)


def test_threads_on_one_stream_do_not_come_between_two_launches(half):
    runs = [half.session(), half.session()]
    given = [half.inputs(seed)[0] for seed in range(4)]
    alone = [runs[0].run(None, one)[0] for one in given]
    half.set(pause=2000)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: runs[i % 2].run(None, given[i % 4])[0], range(24)))
    for index, ours in enumerate(together):
        assert np.array_equal(ours, alone[index % 4])


def test_mixed_requests_are_single_requests(half):
    run, settings = half.session(base=True), [SETTINGS[3], SETTINGS[1], SETTINGS[2]]
    given, _ = half.inputs(rows=6, settings=settings, base=True)
    together = run.run(None, given)[0]
    for i in range(3):
        at, one = slice(2 * i, 2 * i + 2), slice(i, i + 1)
        single = {
            n: x[one] if n in ("manipulation", "ip_scale") else x[at] for n, x in given.items()
        }
        assert np.array_equal(run.run(None, single)[0], together[at])


def test_code_is_looked_for_from_the_own_architecture_to_ptx(half):
    ptx = half.code.with_name(f"decoupled_attention-{SIZE}-float16.ptx")
    given, wanted = half.inputs()
    half.set(minor=3)  # an older minor version's machine code runs
    assert relative(half.session().run(None, given)[0], wanted) < 1e-3
    original = half.code.read_text()
    try:
        half.code.write_text("refused")
        with pytest.raises(FAILURES, match=r"sm_90\.cubin is refused with CUDA_ERROR_INVALID_IM"):
            half.session().run(None, given)
        ptx.write_text("code of PTX")
        assert relative(half.session().run(None, given)[0], wanted) < 1e-3
        assert half.library.images().decode().splitlines()[-1] == "code of PTX"
        ptx.unlink()
        half.code.unlink()
        with pytest.raises(FAILURES, match=r"no code for heads of 16-float16 on .* 9\.3 in /"):
            half.session().run(None, given)
    finally:
        half.code.write_text(original)
        ptx.unlink(missing_ok=True)


def test_what_one_launch_cannot_take_is_refused(half):
    run = half.session(heads=8200)
    many = np.zeros((8, 1, 8200 * SIZE), np.float16)
    tokens = np.zeros((8, 4, 8200 * SIZE), np.float16)
    parameters = {"manipulation": np.float32([row()]), "ip_scale": np.ones(1, np.float32)}
    with pytest.raises(REFUSALS, match="more than one launch takes"):
        run.run(None, {"q": many, "k": tokens, "v": tokens, **parameters})


def test_a_full_gpu_is_said(half):
    given, _ = half.inputs()
    half.set(full=True)
    with pytest.raises(FAILURES, match="scratch memory failed with CUDA_ERROR_OUT_OF_MEMORY"):
        half.session().run(None, given)
    half.set()
    assert half.library.blocks() == 0


def test_without_a_driver_it_says_so(tmp_path):
    stand_in = StandIn(tmp_path, np.float16)  # a library of its own: it looks once
    stand_in.set(driver=False)
    with pytest.raises(FAILURES, match=r"there is no CUDA driver .*libcuda\.so\.1"):
        stand_in.session().run(None, stand_in.inputs()[0])
