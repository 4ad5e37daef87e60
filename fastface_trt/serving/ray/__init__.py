"""Many machines: replicas of one worker behind Ray Serve's proxies.

    serve run fastface_trt.serving.ray:app export=mini min_replicas=2

`app` builds the application from typed arguments. Each replica is a `Batcher` with the same HTTP
app as on one machine; Ray Serve places replicas, bounds queues, scales, and replaces what dies.
"""

from typing import TYPE_CHECKING

from fastface_trt.serving.ray.arguments import RayArguments

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["RayArguments", "app"]


def app(arguments: RayArguments) -> "Application":
    """The application that `serve run` and `serve deploy` start; see `RayArguments`.

    A tag in `export` is resolved here, so that all replicas have the same engines. Raises as
    `storage.distribution.resolve`, and `MissingDependency` without Ray Serve.
    """
    from fastface_trt.serving.ray.run import build

    return build(arguments)
