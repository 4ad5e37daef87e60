"""A worker's process as it is, but for its engines, which are arithmetic.

A task whose prompt says so loses the device, as long as FASTFACE_TEST_LOSES_DEVICE is no file.
"""

import os
from pathlib import Path

from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.workers import child
from tests.serving.batching.batching_fakes import ArithmeticFastFace


def open_batcher(settings, **hooks):
    fastface = ArithmeticFastFace()
    fastface.unet.loses_device = Path(os.environ["FASTFACE_TEST_LOSES_DEVICE"])
    batcher = Batcher(fastface, settings, **hooks)
    batcher.start()
    return batcher


if __name__ == "__main__":
    child.open_batcher = open_batcher
    child.main()
