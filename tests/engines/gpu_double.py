"""Puts the simulated GPU in place of the real driver and bindings, for one test."""

import sys
from contextlib import contextmanager

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT, write_stand_in

from fastface_trt.engines import hardware
from fastface_trt.engines.tensorrt.builder import TensorRTBuilder


@contextmanager
def simulated_gpu(flavour="tensorrt-rtx", **properties):
    """The simulated driver and the simulated binding of `flavour`; builds write stand-in plans.

    Everything else, from backends to buffers, is the code that runs on a GPU.
    """
    cuda = FakeCuda(**properties)
    trt = FakeTensorRT(cuda, flavour)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.driver", cuda)
        patch.setitem(sys.modules, flavour.replace("-", "_"), trt)
        patch.setattr(
            TensorRTBuilder,
            "build",
            lambda self, module, source, target, progress: write_stand_in(
                self.options, module, source, target
            ),
        )
        _forget_hardware()
        try:
            yield cuda, trt
        finally:
            _forget_hardware()


def _forget_hardware():
    for remembered in (
        hardware.cuda_hardware,
        hardware.cuda_driver,
        hardware.cuda_device_count,
    ):
        remembered.cache_clear()
