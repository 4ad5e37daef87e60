"""Sessions on the simulated GPU: others' device memory in and out, in the order of streams."""

import gc

import numpy as np
import pytest

from fastface_trt import FastFace
from fastface_trt.embedding.host import Host
from fastface_trt.embedding.session import Session
from fastface_trt.engines import dlpack
from fastface_trt.engines.device import DeviceTensor
from fastface_trt.errors import InvalidRequest
from fastface_trt.mini import folders
from fastface_trt.runtime.sampling import INITIAL_LATENTS, standard_noise
from tests.engines.gpu_double import simulated_gpu

pytestmark = pytest.mark.usefixtures("quick_collections")

PROMPT = "photo; person in a garden"
SHAPE = (96, 96, 3)


@pytest.fixture(scope="module")
def cpu():
    with FastFace.load(threads=1) as loaded:
        yield Session(loaded), loaded


@pytest.fixture(scope="module")
def face(cpu):
    return cpu[1].analyze(folders.SAMPLE_FACES / "ada.png")


@pytest.fixture(scope="module")
def request_(cpu):
    return cpu[1].request(PROMPT, preset="am1+dcg", seed=3)


@pytest.fixture(scope="module")
def expected(cpu, face, request_):
    return cpu[0].generate(request_, face).pixels


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with simulated_gpu("tensorrt-rtx") as (cuda, _):
        loaded = FastFace.load(backend="tensorrt-rtx", cache=cache)
        yield Session(loaded), cuda, loaded
        loaded.close()
        gc.collect()
        assert cuda.leaks() == []


class Torch:
    """Another library's device tensor, which its stream writes later than it hands it out."""

    def __init__(self, cuda, values=None, *, size=0, typestr="<f4", shape=None):
        self.cuda, self.values = cuda, values
        self.shape = values.shape if shape is None else shape
        self.typestr = typestr if values is None else values.dtype.str
        self.size = size if values is None else values.nbytes
        self.stream = cuda.external_stream()
        self.address = cuda.allocate(self.size)
        if values is not None:
            cuda.submit(self.stream, self.fill)

    @property
    def __cuda_array_interface__(self):
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.typestr,
            "data": (self.address, False),
            "stream": int(self.stream),
        }

    def fill(self):
        self.cuda.read(self.address, self.size)[:] = self.values.reshape(-1).view(np.uint8)

    def read(self):
        return self.cuda.read(self.address, self.size).copy()

    def free(self):
        self.cuda._cuStreamDestroy(self.stream)
        self.cuda.release(self.address)


def same(ours, theirs):
    """One step of 255 is rounding: two CPU graphs, and sums in another order."""
    assert np.ptp(ours) > 100
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_device_tokens_and_latents_of_others(gpu, cpu, face, request_, expected):
    session, cuda, _ = gpu
    tokens = Torch(cuda, cpu[0].tokens(face))
    shape = session.latent_shape(request_)
    noise = Torch(cuda, standard_noise(3, 0, INITIAL_LATENTS, shape))
    out = np.zeros(SHAPE, np.uint8)
    output = session.generate(request_, tokens, latents=noise, out=out)
    same(out, expected)
    assert output.pixels.ctypes.data == out.ctypes.data
    view = session.tokens(tokens, view=True)
    assert view.address == tokens.address
    same(session.generate(request_, view).pixels, expected)
    del view, output
    gc.collect()
    tokens.free()
    noise.free()


def test_a_picture_goes_into_device_memory(gpu, face, request_, expected):
    session, cuda, _ = gpu
    out = Torch(cuda, size=96 * 96 * 3, typestr="|u1", shape=SHAPE)
    output = session.generate(request_, face, out=out)
    assert output.pixels is None
    same(out.read().reshape(SHAPE), expected)
    small = Torch(cuda, size=96 * 96 * 3 - 1, typestr="|u1", shape=(96 * 96 * 3 - 1,))
    start = len(cuda.calls)
    with pytest.raises(InvalidRequest, match="Pass exactly 27648 bytes"):
        session.generate(request_, face, out=small)
    assert "cuMemcpyDtoHAsync" not in cuda.names(start)
    del output
    for memory in (out, small):
        memory.free()


def test_work_waits_for_the_callers_stream_and_the_callers_stream_for_it(gpu, face, request_, cpu):
    """Tokens as a bare address say nothing of their stream: the order is the caller's to give."""
    session, cuda, _ = gpu
    theirs = Torch(cuda, cpu[0].tokens(face))
    bare = DeviceTensor(theirs.address, theirs.shape, "float32", theirs)
    stream, done = int(theirs.stream), cuda.external_event()
    output = session.generate(request_, bare, decode=False, stream=stream, done=int(done))
    later = []
    borrowed = dlpack.take(output.latents.__dlpack__(stream=-1, max_version=(1, 0)))
    address, size = borrowed.address, 4 * int(np.prod(borrowed.shape))
    other = cuda.external_stream()
    cuda._cuStreamWaitEvent(other, done, 0)
    for consumer in (other, theirs.stream):  # draining theirs first would fill the tokens
        cuda.submit(consumer, lambda: later.append(cuda.read(address, size).copy()))
        cuda._drain(consumer)
    expected = cpu[0].generate(request_, face, decode=False).latents
    for seen in later:
        latents = seen.view(np.float32).reshape(expected.shape)
        np.testing.assert_allclose(latents, expected, rtol=1e-3, atol=1e-3)
    del output, borrowed, bare
    gc.collect()
    cuda._cuStreamDestroy(other)
    cuda._cuEventDestroy(done)
    theirs.free()


def test_latents_on_the_device_are_decoded(gpu, face, request_, expected):
    session, _, _ = gpu
    latents = session.generate(request_, face, decode=False).latents
    same(session.decode(latents), expected)


def test_a_result_outlives_its_engines(gpu, face, request_, cpu):
    session, cuda, loaded = gpu
    borrowed = dlpack.take(
        session.generate(request_, face, decode=False).latents.__dlpack__(max_version=(1, 0))
    )
    session.device.synchronize()
    loaded.close()
    gc.collect()
    size = 4 * int(np.prod(borrowed.shape))
    latents = cuda.read(borrowed.address, size).view(np.float32).reshape(borrowed.shape)
    expected = cpu[0].generate(request_, face, decode=False).latents
    np.testing.assert_allclose(latents, expected, rtol=1e-3, atol=1e-3)
    assert cuda.leaks().count("context") == 1
    del borrowed, latents
    assert cuda.leaks() == []


def test_tensors_that_do_not_fit_are_refused(gpu, cpu, face, request_):
    session, cuda, _ = gpu
    tokens = cpu[0].tokens(face)
    half = Torch(cuda, tokens.astype(np.float16))
    with pytest.raises(InvalidRequest, match="is float16 and the engine takes float32"):
        session.generate(request_, half)
    with pytest.raises(InvalidRequest, match=r"lies on the host.*Pass it without view"):
        session.tokens(tokens, view=True)
    half.free()


def test_what_a_c_program_says_of_its_gpu_memory(cpu, face, request_, expected, tmp_path):
    """`Host` is what the C library calls: a pixel address, tokens by DLPack, streams by number."""
    with simulated_gpu("tensorrt-rtx") as (cuda, _):
        host = Host({"backend": "tensorrt-rtx", "cache": tmp_path})
        assert host.describe() == (96, 96, 4, 4, 96)
        tokens = Torch(cuda, cpu[0].tokens(face))
        place = (dlpack.CUDA, 0)
        capsule = dlpack.lend(
            tokens.address, tokens.shape, "float32", place, tokens, versioned=True
        )
        out, done = cuda.allocate(96 * 96 * 3), cuda.external_event()
        fields = {"prompt": PROMPT, "preset": "am1+dcg", "seed": 3}
        order = (int(tokens.stream), None, int(done))
        made = host.generate(
            fields, None, None, None, capsule, None, (out, 96 * 96 * 3), order, None
        )
        assert made == (None, out, 96, 96)
        same(cuda.read(out, 96 * 96 * 3).reshape(SHAPE), expected)
        host.close()
        del capsule
        gc.collect()
        cuda._cuEventDestroy(done)
        cuda.release(out)
        tokens.free()
        assert cuda.leaks() == []
