import asyncio
import logging
import sys
import types

import numpy as np
import pytest

from fastface_trt.errors import InvalidRequest, MissingDependency, NoFaceFound, Refused
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.pictures.checks import Checks

REQUEST = GenerationRequest("a secret prompt")
PIXELS = np.zeros((16, 16, 3), np.uint8)


class NoHats:
    def check_prompt(self, request):
        if "hat" in request.prompt:
            raise Refused("No hats.")


class Async:
    async def check_face(self, pixels):
        await asyncio.sleep(0)
        if pixels.max() > 0:
            raise Refused("Too bright.")


class Crashing:
    def check_result(self, _pixels):
        raise ValueError("a secret prompt")

    def check_prompt(self, _request):
        raise NoFaceFound("Not mine to say.")


class Slow:
    async def check_prompt(self, _request):
        await asyncio.Event().wait()


class NeedsArguments(NoHats):
    def __init__(self, argument):
        self.argument = argument


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    module = types.ModuleType("operators_checks")
    module.NoHats, module.instance, module.Async = NoHats, NoHats(), Async
    module.Crashing, module.NeedsArguments, module.number = Crashing, NeedsArguments, 5
    monkeypatch.setitem(sys.modules, "operators_checks", module)


def load(*names):
    return Checks.load([f"operators_checks:{name}" for name in names])


@pytest.mark.parametrize("name", ["NoHats", "instance"])
def test_a_plain_check_lets_through_or_refuses(name):
    checks = load(name)
    asyncio.run(checks.check_prompt(REQUEST))
    with pytest.raises(Refused, match=r"^No hats\.$"):
        asyncio.run(checks.check_prompt(GenerationRequest("a hat")))
    asyncio.run(checks.check_face(PIXELS))  # has nothing to say to that
    assert not checks.looks_at_results


def test_an_async_check_lets_through_or_refuses():
    checks = load("NoHats", "Async")
    asyncio.run(checks.check_face(PIXELS))
    with pytest.raises(Refused, match="Too bright"):
        asyncio.run(checks.check_face(PIXELS + 1))


@pytest.mark.parametrize("method", ["check_prompt", "check_result"])
def test_a_check_that_fails_refuses_and_tells_nothing(method, caplog):
    checks = load("Crashing")
    assert checks.looks_at_results
    with caplog.at_level(logging.ERROR), pytest.raises(Refused) as caught:
        asyncio.run(getattr(checks, method)(REQUEST))
    assert caught.value.code == "refused"
    assert caught.value.message == "A check of this server failed, so the request is refused."
    (record,) = caplog.records
    assert "operators_checks:Crashing" in record.getMessage()
    assert "test_checks.py" in record.getMessage()
    assert "secret" not in caplog.text


def test_a_check_that_takes_too_long_refuses():
    checks = Checks([("slow", Slow())], seconds=0.05)
    with pytest.raises(Refused, match="failed"):
        asyncio.run(checks.check_prompt(REQUEST))


def test_a_plain_check_does_not_stop_the_server():
    class Waits:
        def check_prompt(self, _request):
            assert released.wait(20)

    async def both():
        checking = asyncio.create_task(Checks([("waits", Waits())]).check_prompt(REQUEST))
        await asyncio.sleep(0)
        released.set()  # never reached if the check had the loop's thread
        await checking

    import threading

    released = threading.Event()
    asyncio.run(both())


def test_no_checks_let_everything_through():
    assert asyncio.run(Checks.load(()).check_prompt(REQUEST)) is None


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("no_colon", InvalidRequest, "form package.module:name"),
        (":name", InvalidRequest, "form package.module:name"),
        ("operators_checks:", InvalidRequest, "form package.module:name"),
        ("operators_checks:a b", InvalidRequest, "form package.module:name"),
        ("..x:name", InvalidRequest, "fails"),
        ("no_such_package.checks:name", InvalidRequest, "no module 'no_such_package'"),
        ("json.nothing:name", InvalidRequest, "no module 'json.nothing'"),
        ("operators_checks:nothing", InvalidRequest, "has no 'nothing'"),
        ("operators_checks:number", InvalidRequest, "is no check"),
        ("operators_checks:NeedsArguments", InvalidRequest, "cannot be made"),
        ("needs_another:name", MissingDependency, "needs the module 'not_installed_here'"),
        ("does_not_compile:name", InvalidRequest, "SyntaxError"),
    ],
)
def test_wrong_names_are_errors_of_the_operator(name, error, words, tmp_path, monkeypatch):
    (tmp_path / "needs_another.py").write_text("import not_installed_here")
    (tmp_path / "does_not_compile.py").write_text("def")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=words):
        Checks.load([name])
