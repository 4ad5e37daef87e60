"""The interpreter's lock is free while an engine runs.

No thread gives the lock away on demand here: the interval at which it must is far longer than the
test. Whoever moves while another thread is inside a call does so because that call let go.
"""

import ctypes
import sys
import threading
import time

import pytest

from fastface_trt import FastFace
from fastface_trt.mini import folders


@pytest.fixture
def lock_is_kept():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


class Counter:
    """A Python thread that counts as long as it is let, and always offers the lock itself."""

    def __enter__(self):
        self.count, self.stopped = 0, False
        self.thread = threading.Thread(target=self.run, name="counter", daemon=True)
        self.thread.start()
        return self

    def run(self):
        while not self.stopped:
            self.count += 1
            time.sleep(0)

    def during(self, call):
        """How far it came while `call` ran."""
        before = self.count
        call()
        return self.count - before

    def __exit__(self, *_):
        self.stopped = True
        self.thread.join()


def test_the_measure_tells_calls_that_keep_the_lock_from_those_that_do_not(lock_is_kept):
    keeping, freeing = ctypes.PyDLL(None).usleep, ctypes.CDLL(None).usleep
    with Counter() as counter:
        assert counter.during(lambda: keeping(50_000)) == 0
        assert counter.during(lambda: freeing(50_000)) > 0


class Watched:
    """ONNX Runtime's session, and how far the counter came inside each of its runs."""

    def __init__(self, session, counter):
        self.session, self.counter, self.moved = session, counter, []

    def run(self, *arguments):
        results = []
        call = self.session.run
        self.moved.append(self.counter.during(lambda: results.append(call(*arguments))))
        return results[0]


def test_a_unet_call_frees_the_lock(lock_is_kept, monkeypatch):
    with FastFace.load(threads=1) as fastface, Counter() as counter:
        unet = fastface._modules["unet"]
        face = fastface.analyze(folders.SAMPLE_FACES / "ada.png")
        watched = Watched(unet._session, counter)
        monkeypatch.setattr(unet, "_session", watched)
        # A call may end before the other thread was given a core.
        for seed in range(50):
            fastface("photo; person", face, seed=seed)
            if sum(watched.moved) > 0:
                break
        monkeypatch.undo()
    assert len(watched.moved) == 4 * (seed + 1)
    assert sum(watched.moved) > 0
