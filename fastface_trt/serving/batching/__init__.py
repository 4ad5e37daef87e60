"""A worker inside one process, whose UNet calls hold rows of strangers: continuous batching.

`policy` chooses who goes into a UNet call and `cost` knows what it takes: both without threads or
engines. `loop` is the engine thread over them, `analysis` finds faces beside it, and `batcher` is
the `Worker` that clients see.
"""

from fastface_trt.serving.batching.batcher import Batcher

__all__ = ["Batcher"]
