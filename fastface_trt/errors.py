"""One family of errors: each has a stable code, one sentence, and the hint.

The command line prints `message` and `hint` and exits with 2; a server maps `code` to a status.
Library code raises these for everything a user can cause, and lets programming errors through.
"""

import importlib.metadata
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

_SOURCES = Path(__file__).resolve().parent.parent


def install_hint(*extras: str) -> str:
    """The command that installs extras of this package, wherever the package came from.

    From a clone, installed or not, it installs the clone. Elsewhere there may be neither the wheel
    nor an index that has it, so the command names what the extras ask for.
    """
    project = _SOURCES / "pyproject.toml"
    if project.is_file() and 'name = "fastface-trt"' in project.read_text("utf-8"):
        return "pip install -e " + shlex.quote(f"{_SOURCES}[{','.join(extras)}]")
    wanted = [text for extra in extras for text in _requirements(extra)]
    return f"pip install {' '.join(map(shlex.quote, dict.fromkeys(wanted)))}"


def _requirements(extra: str) -> Iterator[str]:
    """What an extra of the installed package asks for, as pip takes it."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires("fastface-trt") or ():
            requirement, _, marker = text.partition(";")
            rest, of_extra = re.subn(rf"""(\band\b)?\s*extra == ['"]{extra}['"]""", "", marker)
            if of_extra:
                yield "; ".join(filter(None, (requirement.strip(), rest.strip())))


class FastFaceError(Exception):
    """Base of every error that a user can cause.

    `message` is one sentence saying what is wrong, `hint` says what to do about it; `param` is the
    field of a request that it is about, where it is about one.
    """

    code = "error"
    param: str | None = None

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint

    def spell_param(self, param: str) -> None:
        """Say which field it is about, or spell the one that it names as `param`."""
        known = self.param or param
        if self.message.startswith(known):
            self.message = param + self.message.removeprefix(known)
        elif known not in self.message:
            self.message = f"{param}: {self.message}"
        self.param = param
        self.args = (f"{self.message} {self.hint}".strip(),)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are pickled by their one `args`, which is not what these are made of.
        return _unpickled, (type(self), self.message, self.hint, self.__dict__)


def _unpickled(
    kind: type[FastFaceError], message: str, hint: str, state: dict[str, object]
) -> FastFaceError:
    error = kind.__new__(kind)
    FastFaceError.__init__(error, message, hint)
    error.__dict__.update(state)
    return error


@contextmanager
def naming(param: str) -> Iterator[None]:
    """Errors inside are about the field `param` of a request."""
    try:
        yield
    except FastFaceError as error:
        if error.param is None:
            error.spell_param(param)
        raise


class InvalidRequest(FastFaceError):
    """A parameter of a request is out of its range, or two of them do not fit together."""

    code = "invalid_request"


class UnknownName(FastFaceError):
    """A name (checkpoint, preset, schedule, backend, …) that is not in its registry."""

    code = "unknown_name"

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        super().__init__(f"Unknown {kind} {name!r}.", f"{hint}Known: {', '.join(names)}.")


class BadPicture(FastFaceError):
    """A picture that cannot be read, is too large, or is not a picture."""

    code = "bad_picture"


class NoFaceFound(FastFaceError):
    """The detector found no face at any of its input sizes."""

    code = "no_face_found"


class FaceIndexOutOfRange(FastFaceError):
    """A face was asked for by index, and the picture has fewer faces."""

    code = "face_index_out_of_range"


class WeightsError(FastFaceError):
    """A checkpoint, adapter or LoRA file is missing, truncated, or does not fit."""

    code = "weights"


class ExportIncomplete(FastFaceError):
    """An export folder without a manifest, or whose files do not match it."""

    code = "export_incomplete"


class ManifestError(FastFaceError):
    """A manifest that cannot be read: bad JSON, unknown fields, other schema version, bad path."""

    code = "manifest"


class EngineMismatch(FastFaceError):
    """An engine that was built for something else than what is asked of it."""

    code = "engine_mismatch"


class BackendUnavailable(FastFaceError):
    """A backend or execution provider that this machine cannot run."""

    code = "backend_unavailable"


class BuildFailed(FastFaceError):
    """The builder of a backend refused an ONNX module, or could not write its engine."""

    code = "build_failed"


class EngineFailed(FastFaceError):
    """An engine failed while running, or returned something that is not finite."""

    code = "engine_failed"


class OutOfMemory(FastFaceError):
    """The GPU has less free memory than an engine needs."""

    code = "out_of_memory"


class StorageError(FastFaceError):
    """A disk is full or not writable; nothing half-written was left behind."""

    code = "storage"


class MissingDependency(FastFaceError):
    """An optional package that the asked-for feature needs is not installed."""

    code = "missing_dependency"


class LicenceNotAcknowledged(FastFaceError):
    """Weights whose licence must be acknowledged before first use."""

    code = "licence_not_acknowledged"


class Cancelled(FastFaceError):
    """The per-step callback asked the run to stop."""

    code = "cancelled"


class Refused(FastFaceError):
    """A check of the server's operator does not allow a prompt or a picture; see its sentence."""

    code = "refused"


class DeadlinePassed(FastFaceError):
    """A task was not done by its deadline."""

    code = "deadline_passed"


class Busy(FastFaceError):
    """A worker has as much waiting as it may have; `retry_after` is in seconds."""

    code = "busy"

    def __init__(self, message: str, hint: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class Unavailable(FastFaceError):
    """A worker that is starting, draining or dead, or a `FastFace` that was closed."""

    code = "unavailable"
