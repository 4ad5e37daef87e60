"""FastFace-TRT as a model of Triton's python backend; `export-triton` copies this file.

Triton runs it in a process of its own for each instance, where `fastface_trt` must be installed.
"""

from typing import Any

import triton_python_backend_utils as pb_utils

from fastface_trt.errors import FastFaceError
from fastface_trt.serving.triton.opening import complete_config, open_model
from fastface_trt.serving.triton.served import ServedModel


class TritonPythonModel:
    """What Triton looks for in a `model.py`."""

    _served: ServedModel | None = None

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Compare the tensors of `config.pbtxt` with ours; called once, before `initialize`."""
        return complete_config(auto_complete_model_config)

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engines and start the loop; Triton waits for it before it says ready."""
        try:
            self._served = open_model(args, pb_utils)
        except FastFaceError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def is_ready(self) -> bool:
        """Whether the engines are alive; answered at `v2/models/fastface/ready`."""
        return self._served is not None and self._served.ready

    def execute(self, requests: list[Any]) -> None:
        """Take requests; their answers go out through their senders as they are ready."""
        assert self._served is not None, "Triton calls initialize first"
        self._served.execute(requests)

    def finalize(self) -> None:
        """Finish what is in work and free the engines."""
        if self._served is not None:
            self._served.close()
