"""`run_on_ray` in a process of its own; the first argument is its arguments as JSON."""

import json
import sys

from fastface_trt.serving.ray.arguments import Placement
from fastface_trt.serving.ray.run import run_on_ray
from fastface_trt.serving.settings import ServerSettings, WorkerSettings


def say(line):
    print(line, flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run_on_ray(
        WorkerSettings(**given["worker"]),
        ServerSettings(**given["server"]),
        Placement(**given["placement"]),
        address=given.get("address"),
        say=say,
        ray_options=given.get("ray_options"),
    )
