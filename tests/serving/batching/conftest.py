"""A batcher over engines that only count: what tests of this folder start."""

import pytest

from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.settings import WorkerSettings
from tests.serving.batching.batching_fakes import ArithmeticFastFace


@pytest.fixture
def fastface():
    return ArithmeticFastFace()


@pytest.fixture
def start(fastface):
    """Start a batcher with these settings; it is closed after the test."""
    started = []

    def start(preview=None, clock=None, **settings):
        clocks = {} if clock is None else {"clock": clock}
        batcher = Batcher(fastface, WorkerSettings(**settings), preview=preview, **clocks)
        started.append(batcher)
        batcher.start()
        fastface.unet.calls.clear()
        return batcher

    yield start
    fastface.unet.release()
    for batcher in started:
        batcher.close()
