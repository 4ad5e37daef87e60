"""Checks that the operator of a server adds: what may be asked for, shown, and handed out.

A check is named `package.module:name`: a class (made without arguments) or an object with one or
more of these methods, plain or `async`:

    check_prompt(request: GenerationRequest)   before anything is done for a request
    check_face(pixels: Pixels)                 the picture that a face is taken from
    check_result(pixels: Pixels)               a finished picture, before anybody sees it

A method that returns lets through, one that raises `Refused` does not. One that fails in any other
way, or takes longer than `SECONDS`, does not either: what was not checked is not let through.
"""

import asyncio
import importlib
import inspect
import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from fastface_trt.errors import InvalidRequest, MissingDependency, Refused
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.work import Pixels

SECONDS = 20.0
"""Time of one check; a classifier on a CPU takes about one second."""

_METHODS = ("check_prompt", "check_face", "check_result")
_log = logging.getLogger(__name__)


class Checks:
    """The checks of a server, asked in the order of their names; none lets everything through."""

    def __init__(self, checks: Sequence[tuple[str, object]] = (), seconds: float = SECONDS) -> None:
        """`checks` are names, for the log, and objects with the methods of the module docstring."""
        self._seconds = seconds
        self._methods = {
            method: [
                (f"{name}.{method}", getattr(check, method))
                for name, check in checks
                if hasattr(check, method)
            ]
            for method in _METHODS
        }

    @classmethod
    def load(cls, names: Sequence[str]) -> "Checks":
        """Import the checks called `package.module:name`.

        Raises `InvalidRequest` for a name that does not lead to a check, and `MissingDependency`
        where the check's module lacks another.
        """
        return cls([(name, _load(name)) for name in names])

    @property
    def looks_at_results(self) -> bool:
        """Whether finished pictures are checked: previews of them must then not be sent."""
        return bool(self._methods["check_result"])

    async def check_prompt(self, request: GenerationRequest) -> None:
        """Raise `Refused` unless every check lets the request through."""
        await self._ask("check_prompt", request)

    async def check_face(self, pixels: Pixels) -> None:
        """Raise `Refused` unless every check lets the picture (RGB, uint8 [H, W, 3]) through."""
        await self._ask("check_face", pixels)

    async def check_result(self, pixels: Pixels) -> None:
        """Raise `Refused` unless every check lets the picture (RGB, uint8 [H, W, 3]) through."""
        await self._ask("check_result", pixels)

    async def _ask(self, method: str, subject: object) -> None:
        for name, check in self._methods[method]:
            try:
                await asyncio.wait_for(_called(check, subject), self._seconds)
            except Refused:
                raise
            except Exception as error:
                # The message may hold the prompt, which does not belong in a log; its place does.
                frames = traceback.extract_tb(error.__traceback__)
                place = f"{frames[-1].filename}:{frames[-1].lineno}"
                _log.error("check %s failed: %s at %s", name, type(error).__name__, place)
                raise Refused(
                    "A check of this server failed, so the request is refused.", "Try again later."
                ) from None


async def _called(check: Callable[[Any], object], subject: object) -> None:
    if inspect.iscoroutinefunction(check):
        await check(subject)
        return
    answer = await asyncio.to_thread(check, subject)
    if inspect.isawaitable(answer):  # a plain function that hands on what another began
        await answer


def _load(name: str) -> object:
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute.isidentifier():
        raise InvalidRequest(
            f"The check {name!r} is not a name of the form package.module:name.",
            "Give the module in which it is, a colon, and its name there.",
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise InvalidRequest(
                f"The check {name!r} cannot be found: there is no module {error.name!r}.",
                "Install its package, or correct the name.",
            ) from None
        raise MissingDependency(
            f"The check {name!r} needs the module {error.name!r}, which is not installed.",
            "Install it.",
        ) from None
    except Exception as error:
        raise InvalidRequest(
            f"The module of the check {name!r} fails: {type(error).__name__}: {error}.",
            "Correct it, or leave the check away.",
        ) from None
    try:
        found = getattr(module, attribute)
    except AttributeError:
        raise InvalidRequest(
            f"The module {module_name!r} has no {attribute!r}.", "Correct the name of the check."
        ) from None
    try:
        check = found() if inspect.isclass(found) else found
    except Exception as error:
        raise InvalidRequest(
            f"The check {name!r} cannot be made: {type(error).__name__}: {error}.",
            "A class is made without arguments.",
        ) from None
    methods = [method for method in _METHODS if hasattr(check, method)]
    if not methods or not all(callable(getattr(check, method)) for method in methods):
        raise InvalidRequest(
            f"{name!r} is no check: it has none of the methods {', '.join(_METHODS)}.",
            "See fastface_trt.serving.pictures.checks.",
        )
    return check


__all__ = ["SECONDS", "Checks", "Refused"]
