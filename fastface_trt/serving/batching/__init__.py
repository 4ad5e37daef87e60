"""A worker inside one process, whose UNet calls hold rows of strangers: continuous batching.

`policy` chooses who goes into a UNet call and `cost` knows what it takes: both without threads or
engines. `loop` is the engine thread over them, which calls `measured_stages`, and `batcher` is the
`Worker` that clients see; an `entry` is a task in between.
"""

from fastface_trt.serving.batching.batcher import Batcher

__all__ = ["Batcher"]
