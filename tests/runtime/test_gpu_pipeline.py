"""The whole pipeline on the simulated GPU: the mini model's pictures, and what crosses to the host.

Every line between `FastFace.load` and the picture is what runs on a GPU; the driver and TensorRT's
runtime are doubles that compute with ONNX Runtime (see `tests/engines/fake_cuda.py`). The
simulation runs work only when something waits for it, so the pictures are equal only if every wait
is in its place.
"""

import gc
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from fastface_trt import FastFace
from fastface_trt.engines.kernels import operator_library
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import (
    Cancelled,
    EngineFailed,
    ExportIncomplete,
    InvalidRequest,
    Unavailable,
)
from fastface_trt.mini import folders
from fastface_trt.runtime.export_folder import ModuleSet
from fastface_trt.runtime.timeline import Recorder
from tests.engines.gpu_double import Session, simulated_gpu, simulated_onnxruntime

pytestmark = pytest.mark.usefixtures("quick_collections")

PROMPT = "photo; person in a garden"
FACE = folders.SAMPLE_FACES / "ada.png"
OPTIONS = {"requests": (1, 2), "branches": (1, 2, 3)}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The mini model's export with a guidance step, whatever version wrote it."""
    pytest.importorskip("onnxscript")
    from fastface_trt.export.guidance_step import write_guidance_step

    folder = tmp_path_factory.mktemp("export") / "mini"
    shutil.copytree(folders.EXPORT, folder)
    manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest)
    if "guidance_step" not in manifest.modules:
        step = write_guidance_step(folder, channels=4, latent_size=(24, 24), fixed_size=False)
        modules = {**manifest.modules, "guidance_step": step}
        (folder / EXPORT_MANIFEST).write_text(
            manifest.model_copy(update={"modules": modules}).model_dump_json()
        )
    return folder


@pytest.fixture(scope="module")
def cpu(export):
    with FastFace.load(export, threads=1) as loaded:
        yield loaded


@contextmanager
def loaded(backend, export, cache):
    tensorrt = backend.startswith("tensorrt")
    with simulated_gpu(backend if tensorrt else "tensorrt") as (cuda, trt), ExitStack() as stack:
        if not tensorrt:
            stack.enter_context(simulated_onnxruntime(cuda))
        options = OPTIONS if tensorrt else None
        gpu = FastFace.load(export, backend=backend, cache=cache, engine_options=options)
        yield gpu, cuda, trt
        gpu.close()
        gc.collect()
        assert cuda.leaks() == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An engine cache for what takes its time to build: the attention kernels are compiled."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def simulated(request, export, tmp_path, built):
    cache = built if request.param == "onnxruntime-cuda" else tmp_path / "cache"
    with loaded(request.param, export, cache) as opened:
        yield opened


only_tensorrt = pytest.mark.parametrize("simulated", ["tensorrt", "tensorrt-rtx"], indirect=True)


@pytest.fixture(scope="module")
def face(cpu):
    return cpu.analyze(FACE)


def pixels(result):
    return np.stack([np.asarray(image).astype(np.int16) for image in result.images])


def same(ours, theirs):
    """One step of 255 is rounding: two CPU graphs, and sums in another order."""
    assert ours.max() - ours.min() > 100, "a flat picture would prove nothing"
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("preset", ["plain", "am1+dcg", "am2+dcg"])
def test_the_picture_is_the_cpus(simulated, cpu, face, preset):
    gpu, _, _ = simulated
    for seed in (0, 1):
        ours = gpu(PROMPT, face, preset=preset, seed=seed)
        same(pixels(ours), pixels(cpu(PROMPT, face, preset=preset, seed=seed)))
    assert ours.unet_samples == {"plain": 4, "am1+dcg": 10, "am2+dcg": 12}[preset]
    assert set(ours.seconds) == {"total", "face", "text", "unet", "vae"}


def test_without_the_attention_kernels_the_picture_is_the_same(
    export, cpu, face, tmp_path, monkeypatch
):
    """The UNet has branches then, and is told to be slower."""
    none = operator_library.LibraryStatus(False, "", "")
    monkeypatch.setattr(operator_library, "library_status", lambda: none)
    with loaded("onnxruntime-cuda", export, tmp_path / "cache") as (gpu, _, _):
        with pytest.warns(RuntimeWarning, match="No CUDA graph of unet"):
            ours = gpu(PROMPT, face, preset="am2+dcg")
        same(pixels(ours), pixels(cpu(PROMPT, face, preset="am2+dcg")))


def test_no_tensor_crosses_to_the_host_inside_a_picture(simulated, face):
    """Between the first UNet call and the VAE's end there are only uploads of a few numbers."""
    gpu, cuda, _ = simulated
    gpu(PROMPT, face, preset="am1+dcg")  # encoders have run, what they made is kept
    device = gpu._modules.device
    before, start = device.copies, len(cuda.calls)
    gpu(PROMPT, face, preset="am1+dcg", seed=1)
    after, calls = device.copies, cuda.calls[start:]

    names = [name for _, name, _ in calls]
    downloads = [args[2] for _, name, args in calls if name == "cuMemcpyDtoHAsync"]
    uploads = [args[2] for _, name, args in calls if name == "cuMemcpyHtoDAsync"]
    picture, latents = 96 * 96 * 3, 4 * 24 * 24 * 4
    # The last latents, which show whether all of it was finite, and the picture's bytes.
    assert downloads == [latents, picture]
    assert after.to_host - before.to_host == len(downloads)
    assert after.to_host_bytes - before.to_host_bytes == sum(downloads)
    assert after.to_device - before.to_device == len(uploads)
    assert after.to_device_bytes - before.to_device_bytes == sum(uploads)
    # x and k x at the start; the rest are scalars: at most 3 rows x 3 parts x 8 columns.
    assert sorted(uploads)[-2:] == [latents, latents]
    assert max(sorted(uploads)[:-2]) <= 3 * 3 * 8 * 4
    assert not {"cuMemAlloc", "cuMemFree", "cuMemAllocHost", "cuMemFreeHost"} & set(names)


def test_nothing_is_waited_for_between_two_unet_calls(simulated, face):
    gpu, cuda, _ = simulated
    gpu(PROMPT, face)
    start = len(cuda.calls)
    seen = []
    gpu(PROMPT, face, seed=1, on_step=lambda trace: seen.append(len(cuda.calls)))
    between = [name for _, name, _ in cuda.calls[start:][seen[0] - start : seen[-1] - start]]
    assert len(seen) == 4
    assert not {"cuStreamSynchronize", "cuMemcpyDtoHAsync"} & set(between)


@pytest.mark.parametrize("simulated", ["onnxruntime-cuda"], indirect=True)
def test_a_change_of_rows_launches_and_binds_nothing_anew(simulated, face):
    """Every run of every module is a replay, whatever preset came before."""
    gpu, cuda, _ = simulated
    presets = ("am1+dcg", "plain", "am2+dcg")
    for preset in presets:
        gpu(PROMPT, face, preset=preset)
    assert gpu._modules["unet"].captures
    sessions = [one for one in Session.made if one.records]
    assert {len(one.graphs) for one in sessions} == {1, 3}  # the UNet and its step: 1, 2, 3 rows
    made = [(len(one.runs), len(one.bindings)) for one in sessions]
    start = len(cuda.calls)
    for preset in presets:
        gpu(PROMPT, face, preset=preset, seed=1)
    assert made == [(len(one.runs), len(one.bindings)) for one in sessions]
    names = [name for _, name, _ in cuda.calls[start:]]
    calls = 3 * (4 + 4 + 1)  # UNet, guidance step, VAE
    assert names.count("cuStreamWaitEvent") == 2 * calls
    # The clock of four stages, and the downloads of the picture and of the last latents.
    assert names.count("cuStreamSynchronize") == 3 * (4 + 2)
    assert not {"cuMemAlloc", "cuMemFree", "cuMemAllocHost", "cuMemFreeHost"} & set(names)


@only_tensorrt
def test_stages_are_timed_by_events_of_the_threads_own_stream(simulated, face):
    """Timing adds events to the stream and nothing else: no copy, no wait before the end."""
    gpu, cuda, _ = simulated
    for _ in range(3):  # afterwards every graph is recorded, so that runs are alike
        gpu(PROMPT, face, preset="am1+dcg")
    start = len(cuda.calls)
    gpu(PROMPT, face, preset="am1+dcg", seed=1)
    plain = [name for _, name, _ in cuda.calls[start:]]
    start = len(cuda.calls)
    recorder = Recorder()
    gpu(PROMPT, face, preset="am1+dcg", seed=1, timeline=recorder)
    calls = cuda.calls[start:]
    timing = {"cuEventCreate", "cuEventRecord"}
    assert [name for _, name, _ in calls if name not in timing] == plain

    recorded = [args for _, name, args in calls if name == "cuEventRecord"]
    own = gpu._modules.device.stream().handle
    assert all(stream is own for _, stream in recorded)
    spans = recorder.spans()
    on_gpu = [span for span in spans if span.device_seconds is not None]
    # 4 UNet calls, 4 guidance steps, the noise, the VAE and the picture.
    assert len(recorded) == 2 * len(on_gpu) == 2 * 11
    unet = [span for span in on_gpu if span.name == "unet"]
    assert [span.attributes for span in unet] == [
        {"step": step, "branches": branches, "rows": branches}
        for step, branches in enumerate((2, 3, 3, 2))
    ]
    # Each piece of work takes a millisecond there: stages come one after the other.
    ends = [span.device_start + span.device_seconds for span in on_gpu]
    starts = [span.device_start for span in on_gpu]
    assert min(span.device_seconds for span in unet) > 0
    assert all(end <= begin + 1e-9 for end, begin in zip(ends, starts[1:], strict=False))


@only_tensorrt
def test_every_threads_stages_lie_on_its_own_stream(simulated, face):
    gpu, cuda, _ = simulated
    gpu(PROMPT, face)
    recorder, start = Recorder(), len(cuda.calls)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: gpu(PROMPT, face, seed=seed, timeline=recorder), range(4)))
    streams = {}
    for thread, name, arguments in cuda.calls[start:]:
        if name == "cuEventRecord":
            streams.setdefault(thread, set()).add(int(arguments[1]))
    assert all(len(used) == 1 for used in streams.values())
    assert len(set.union(*streams.values())) == len(streams)
    spans = recorder.spans()  # read by a thread that recorded none of them
    assert len([span for span in spans if span.name == "unet"]) == 16
    assert {span.thread for span in spans} == set(streams)


def test_pictures_of_a_batch_equal_single_ones(simulated, cpu, face):
    gpu, _, _ = simulated
    base = gpu.request(PROMPT, seed=4)
    requests = [
        base.with_preset("am1+dcg"),
        replace(base, seed=5, negative_prompt="fog").with_preset("dcg"),
        replace(base, seed=6, ip_adapter_scale=0.3),
    ]
    same(pixels(gpu.generate(requests, [face] * 3)), pixels(cpu.generate(requests, [face] * 3)))


def test_a_stochastic_scheduler(export, tmp_path, face):
    """Fresh noise is uploaded before the first UNet call and used in its own step."""
    folder = tmp_path / "turbo"
    shutil.copytree(export, folder)
    manifest = json.loads((folder / EXPORT_MANIFEST).read_text())
    manifest["scheduler"]["class"] = "EulerAncestralDiscreteScheduler"
    (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest))
    with FastFace.load(folder, threads=1) as loaded:
        expected = pixels(loaded(PROMPT, face, preset="dcg"))
    with (
        simulated_gpu("tensorrt") as (cuda, _),
        FastFace.load(folder, backend="tensorrt", cache=tmp_path / "cache") as gpu,
    ):
        gpu(PROMPT, face)
        start = len(cuda.calls)
        same(pixels(gpu(PROMPT, face, preset="dcg")), expected)
        sizes = [args[2] for _, name, args in cuda.calls[start:] if name == "cuMemcpyHtoDAsync"]
        latents = 4 * 24 * 24 * 4
        assert [size == latents for size in sizes] == [True] * 5 + [False] * (len(sizes) - 5)


def test_a_trace_is_downloaded_when_it_is_read_and_stays_valid(simulated, cpu, face):
    gpu, _, _ = simulated
    ours, theirs = [], []
    gpu(PROMPT, face, preset="dcg", on_step=ours.append)
    cpu(PROMPT, face, preset="dcg", on_step=theirs.append)
    for mine, reference in zip(ours, theirs, strict=True):
        for name in ("model_input", "guided", "latents"):
            mine_now, expected = getattr(mine, name), getattr(reference, name)
            np.testing.assert_allclose(mine_now, expected, rtol=1e-3, atol=1e-3)
        assert mine.predictions.keys() == reference.predictions.keys()
        for branch, prediction in mine.predictions.items():
            np.testing.assert_allclose(
                prediction, reference.predictions[branch], rtol=1e-3, atol=1e-3
            )
    with pytest.raises(Cancelled):
        gpu(PROMPT, face, on_step=lambda trace: False)


def test_threads_make_their_own_pictures_from_shared_encodings(simulated, cpu, face):
    gpu, _, _ = simulated
    prompts = [PROMPT, "oil painting; person at the sea"] * 3
    expected = [pixels(cpu(prompt, face, seed=n)) for n, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(3) as pool:
        ours = list(pool.map(lambda n: pixels(gpu(prompts[n], face, seed=n)), range(6)))
    for mine, theirs in zip(ours, expected, strict=True):
        same(mine, theirs)


@pytest.mark.parametrize("what", ["text", "image_tokens"])
def test_an_encoding_is_finished_before_another_thread_gets_it(simulated, cpu, what):
    gpu, _, _ = simulated

    def encode(conditioner):
        return conditioner.text(PROMPT).text if what == "text" else conditioner.image_tokens(None)

    with ThreadPoolExecutor(1) as other:  # a thread that waits for nothing afterwards
        shared = other.submit(encode, gpu.stages._conditioner).result()
        ours = gpu._modules.device.download(shared)
        np.testing.assert_allclose(ours, encode(cpu.stages._conditioner), rtol=1e-4, atol=1e-4)
        del shared


def test_closed_it_leaves_nothing_and_its_builder_opens_the_engines_again(simulated, face):
    gpu, cuda, _ = simulated
    first = pixels(gpu(PROMPT, face))
    modules, faces = gpu._modules, gpu._faces
    for _ in range(3):
        gpu.close()
        gc.collect()
        assert cuda.leaks() == []
        with pytest.raises(Unavailable):
            gpu(PROMPT, face)
        gpu = FastFace(ModuleSet(modules.export, modules.builder, modules._cache), faces)
        np.testing.assert_array_equal(pixels(gpu(PROMPT, face)), first)
    gpu.close()


def test_latents_that_are_not_finite_are_noticed_in_the_end(simulated, face):
    gpu, _, _ = simulated
    request = gpu.request(PROMPT, alpha=1e38, beta=1e38, plan="full")
    with pytest.raises(EngineFailed, match="not finite"):
        gpu.generate([request], [face])


def test_an_export_without_a_guidance_step_says_so(tmp_path, face):
    folder = tmp_path / "old"
    shutil.copytree(folders.EXPORT, folder)
    manifest = json.loads((folder / EXPORT_MANIFEST).read_text())
    manifest["modules"].pop("guidance_step", None)
    (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest))
    with (
        simulated_gpu() as _,
        FastFace.load(folder, backend="tensorrt-rtx", cache=tmp_path / "cache") as gpu,
        pytest.raises(ExportIncomplete, match="no module guidance_step") as caught,
    ):
        gpu(PROMPT, face)
    assert "export the model again" in caught.value.hint


@only_tensorrt
def test_a_size_that_was_not_built_is_refused_with_the_command(simulated, face):
    gpu, _, _ = simulated
    with pytest.raises(InvalidRequest, match="does not run sample") as caught:
        gpu(PROMPT, face, height=128, width=96)
    assert "fastface-trt build --backend" in caught.value.hint
