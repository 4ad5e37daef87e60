"""A FastFace made of arithmetic: real requests, samples and guidance, engines that obey a test.

What a UNet call does is said by words in the prompts of its rows:

- "engine raises": the whole call fails, as when a kernel crashes;
- "engine nan": the rows of that request are not numbers;
- "preparation raises": encoding the prompt fails;
- "engine loses its device": as after an illegal access, nothing works any more. It happens unless
  `fastface.unet.loses_device` is a file, which it makes.

`fastface.unet.hold()` stops calls at their start until `release()`; `fastface.unet.broken` makes
all fail, `fastface.decoder.broken` every decoding, and `fastface.unet.memory_rows` is how many rows
there is memory for. Nothing here waits by the clock, but for
`fastface.unet.seconds_per_row`.
"""

import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np

from fastface_trt import FastFace
from fastface_trt.engines import contract
from fastface_trt.engines.device import DeviceLost, HostDevice
from fastface_trt.errors import NoFaceFound, OutOfMemory
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.sampling import Condition
from fastface_trt.runtime.stages import Stages
from fastface_trt.serving.batching.loop import blank_face
from fastface_trt.serving.work import PictureDone, StepDone, Task, TaskFailed

ENGINE_RAISES, ENGINE_NAN, PREPARATION_RAISES = (
    "engine raises",
    "engine nan",
    "preparation raises",
)
ENGINE_LOST = "engine loses its device"
_MARKS = {ENGINE_RAISES: 1000.0, ENGINE_NAN: 2000.0, ENGINE_LOST: 3000.0}
WAIT = 60
"""Seconds that a test waits for what must happen; it decides nothing but when to give up."""


class FragileDevice(HostDevice):
    """The host, until it is lost: then waiting for it tells so, as a GPU's driver does."""

    lost = False

    def synchronize(self):
        if self.lost:
            raise DeviceLost("The GPU stopped with CUDA_ERROR_ILLEGAL_ADDRESS.")
        super().synchronize()


class ArithmeticUNet:
    """A function of every input of its row, and of its request's parameters, like the real one.

    `calls` holds per call the rows and how many requests they are.
    """

    def __init__(self, request_counts=None):
        self.device = FragileDevice()
        self.loses_device = None
        self.request_counts = request_counts
        self.calls = []
        self.broken = False
        self.seconds_per_row = 0.0
        self.memory_rows = None
        self._changed = threading.Condition()
        self._held = self._at_gate = False

    def hold(self):
        """From now on every call stops at its start."""
        with self._changed:
            self._held = True

    def wait_until_held(self):
        """Until a call has stopped at its start."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._at_gate, WAIT), "no UNet call came"

    def step_once(self):
        """Let the call that is held go, and wait until the next one is held."""
        with self._changed:
            self._at_gate = False
            self._changed.notify_all()
        self.wait_until_held()

    def release(self):
        """Hold no more calls."""
        with self._changed:
            self._held = self._at_gate = False
            self._changed.notify_all()

    def _pass_gate(self):
        with self._changed:
            if self._held:
                self._at_gate = True
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: not self._at_gate, WAIT), "never released"

    def __call__(self, **inputs):
        rows, requests = len(inputs[contract.SAMPLE]), len(inputs[contract.IP_ADAPTER_SCALE])
        self.calls.append((rows, requests))
        self._pass_gate()
        if self.seconds_per_row:
            time.sleep(self.seconds_per_row * rows)
        marks = inputs[contract.POOLED_TEXT][:, 0]
        if (marks == _MARKS[ENGINE_LOST]).any() and not self.loses_device.exists():
            self.loses_device.write_text("lost")
            self.device.lost = True
        if self.device.lost:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
        if self.broken or (marks == _MARKS[ENGINE_RAISES]).any():
            raise RuntimeError("a secret of the engine: kernel 17 at 0xdeadbeef")
        if self.memory_rows is not None and rows > self.memory_rows:
            raise OutOfMemory(f"There is no memory for {rows} rows.")
        if self.request_counts is not None:
            assert requests in self.request_counts, f"no profile for {requests} requests"
        owner = np.arange(rows) // (rows // requests)
        signal = (
            inputs[contract.TEXT].mean((1, 2))
            + 2 * inputs[contract.POOLED_TEXT][:, 1:].mean(1)
            + 3
            * inputs[contract.IMAGE_TOKENS].mean((1, 2))
            * inputs[contract.IP_ADAPTER_SCALE][owner, 0]
            + inputs[contract.TIMESTEP] / 1000
            + inputs[contract.MANIPULATION].mean((1, 2))[owner]
        )
        wave = np.sin(inputs[contract.SAMPLE] * (1 + signal[:, None, None, None]))
        wave[marks == _MARKS[ENGINE_NAN]] = np.nan
        return {contract.NOISE_PREDICTION: wave.astype(np.float32)}


class ArithmeticDecoder:
    """Latents [1,C,h,w] to a picture of `scale` times their size."""

    def __init__(self, scale):
        self.scale = scale
        self.broken = False
        self.pictures = 0

    def __call__(self, latents):
        if self.broken:
            raise RuntimeError("a secret of the decoder")
        self.pictures += 1
        picture = 1 / (1 + np.exp(-latents[:, :3]))
        return {"picture": picture.repeat(self.scale, 2).repeat(self.scale, 3)}


class ArithmeticConditioner:
    """Text and image tokens from a checksum of the prompt and from the face's embedding."""

    def image_tokens(self, face, channel_order="bgr", timeline=None):
        values = np.zeros(24, np.float32) if face is None else face.embedding[:24]
        return values.reshape(4, 6) * (1 if channel_order == "bgr" else -1)

    def conditions(self, request, face_tokens, timeline=None):
        if PREPARATION_RAISES in request.prompt:
            raise RuntimeError("a secret of the encoder")
        windows = self.windows(request)
        texts = [self._encode(text, windows) for text in (request.negative_prompt, request.prompt)]
        faces = [self.image_tokens(None), face_tokens]
        return {
            branch: Condition(*texts["t" in branch], faces["i" in branch])
            for branch in ("u", "t", "i", "ti")
        }

    def windows(self, request):
        return 2 if "long" in request.prompt else 1

    def _encode(self, text, windows):
        generator = np.random.default_rng(zlib.crc32(text.encode()))
        hidden, pooled = (
            generator.standard_normal(shape).astype(np.float32)
            for shape in ((77 * windows, 6), (5,))
        )
        pooled[0] = next((mark for words, mark in _MARKS.items() if words in text), 0.0)
        return hidden, pooled

    def cut_from(self, prompt, syntax):
        return ""

    def forget(self):
        pass


class ArithmeticStages(Stages):
    """The real stages over arithmetic engines."""

    def __init__(self, modules):
        self._modules = modules
        self._conditioner = ArithmeticConditioner()


class ArithmeticModules(dict):
    """What `Stages` and `FastFace` ask of a `ModuleSet`; the manifest is that of the mini model."""

    def __init__(self, request_counts):
        self.export = Export.open()
        self.manifest = self.export.manifest
        self.builder = SimpleNamespace(backend="arithmetic")
        super().__init__(
            unet=ArithmeticUNet(request_counts),
            vae_decoder=ArithmeticDecoder(self.manifest.vae_scale_factor),
        )
        self.device = self["unet"].device

    def close(self):
        pass


class ArithmeticFastFace(FastFace):
    """A FastFace over arithmetic engines. `analyze` finds a face wherever a pixel is not black."""

    def __init__(self, request_counts=None):
        self.forgotten = 0
        self._modules = ArithmeticModules(request_counts)
        self.stages = ArithmeticStages(self._modules)
        self.unet, self.decoder = self._modules["unet"], self._modules["vae_decoder"]
        self.closed = False

    def warm_up(self):
        pass

    def analyze(self, picture, *, index=None, timeline=None):
        if not picture.any():
            raise NoFaceFound("No face was found.", "Use another picture.")
        return blank_face(int(picture[0, 0, 0]))

    def forget(self):
        self.forgotten += 1

    def close(self):
        self.closed = True


def picture_alone(request, face, channel_order="bgr"):
    """What a request gives by itself, with nobody beside it."""
    stages = ArithmeticFastFace().stages
    sample = stages.sample(request, stages.image_tokens(face, channel_order))
    while not sample.finished:
        stages.step([sample])
    return stages.decode(sample.latents)


class Events:
    """Collects events of many tasks, checks their order, and waits for endings."""

    def __init__(self):
        self._changed = threading.Condition()
        self.of = {}
        self.order = []

    def __call__(self, event):
        with self._changed:
            self.of.setdefault(event.id, []).append(event)
            self.order.append(event)
            self._changed.notify_all()

    def wait(self, condition):
        """Wait until `condition()` holds; it is asked again after every event."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT), "it never came"

    def steps(self, task_id):
        return [e.step for e in self.of.get(task_id, []) if isinstance(e, StepDone)]

    def ending(self, task_id):
        """The last event of a task, waited for."""
        self.wait(lambda: self._ends(task_id))
        return self._ends(task_id)[0]

    def check(self, task_ids):
        """Every one of these tasks ended exactly once, nothing came afterwards, nobody else."""
        assert set(self.of) == set(task_ids)
        for events in self.of.values():
            *before, last = events
            assert isinstance(last, PictureDone | TaskFailed)
            assert all(isinstance(event, StepDone) for event in before)
            assert [event.step for event in before] == list(range(1, len(before) + 1))

    def _ends(self, task_id):
        return [e for e in self.of.get(task_id, []) if not isinstance(e, StepDone)]


def task(fastface, task_id, prompt="photo; a person", *, preset="plain", face=None, **fields):
    """A task of a preset; `deadline` and `previews` go to the task, other fields to the request."""
    own = {name: fields.pop(name) for name in ("deadline", "previews") if name in fields}
    request = fastface.request(prompt, preset=preset, **fields)
    return Task(task_id, request, face or blank_face(), **own)
