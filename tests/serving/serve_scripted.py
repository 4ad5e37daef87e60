"""A server over a scripted worker, as a process; its argument says how the worker behaves."""

import os
import sys
import threading
import time

from fastface_trt.serving.http import server
from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.http.logs import log_json
from fastface_trt.serving.http.server import listen, run_server
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import State
from tests.serving.http.http_parts import mini_manifest
from tests.serving.scripted_worker import ScriptedWorker


class Patient(ScriptedWorker):
    """Pictures are done while it drains, one after the other."""

    def drain(self, seconds):
        threading.Thread(target=self._finish, daemon=True).start()
        return super().drain(seconds)

    def _finish(self):
        for name in list(self.open):
            time.sleep(0.05)
            self.finish(name)


class Deaf(ScriptedWorker):
    """Its tasks end only when it is closed."""


class Dying(ScriptedWorker):
    """It dies with its first task."""

    def submit(self, task, on_event):
        super().submit(task, on_event)
        self.state = State.DEAD


class Stuck(ScriptedWorker):
    """It cannot be closed."""

    def close(self):
        threading.Event().wait()


def main(kind):
    worker = {"patient": Patient, "deaf": Deaf, "dying": Dying, "stuck": Stuck}[kind](eager=False)
    drain = 30 if kind == "patient" else float(os.environ.get("FASTFACE_TEST_DRAIN", "0.2"))
    settings = ServerSettings(port=0, drain_seconds=drain)
    server.CLOSE_SECONDS = float(os.environ.get("FASTFACE_TEST_CLOSE", "15"))
    server.FINISH_SECONDS = 1
    log_json(sys.stderr)
    app = create_app(worker, settings, mini_manifest())
    status = run_server(app, worker, settings, listen(settings))
    print("closed" if worker.closed else "open", flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
