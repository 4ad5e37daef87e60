"""Errors cross from a worker's process to the server's as they are."""

import pickle

from fastface_trt.errors import Busy, NoFaceFound, UnknownName


def test_errors_survive_pickling():
    for error in (
        NoFaceFound("No face.", "Take another."),
        UnknownName("preset", "am3", ("am1", "am2")),
        Busy("Full.", "Come back.", retry_after=2.5),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.message, copy.hint, str(copy), vars(copy)) == (
            error.message,
            error.hint,
            str(error),
            vars(error),
        )
