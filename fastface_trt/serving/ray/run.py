"""Ray Serve: start it here or join a cluster, deploy, update; and the application that it runs.

`run_on_ray` is `fastface-trt serve --ray`; `build` makes the application: how replicas are placed,
bounded, scaled and looked after.
"""

import importlib.util
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fastface_trt.errors import BackendUnavailable, EngineFailed, MissingDependency, install_hint
from fastface_trt.serving.ray.arguments import Checkpoint, Placement, RayArguments
from fastface_trt.serving.settings import ServerSettings, WorkerSettings
from fastface_trt.serving.storage.distribution import resolve
from fastface_trt.serving.storage.release import is_address

if TYPE_CHECKING:
    from ray.serve import Application


APPLICATION = "fastface"
DEPLOYMENT = "FastFace"
SHUTDOWN_MARGIN_SECONDS = 10
"""What a replica gets beyond its requests' time to close engines before it is killed."""
_POLL_SECONDS = 0.2
_REQUEST_MARGIN_SECONDS = 30
_PROXY_HOOK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def run_on_ray(
    worker: WorkerSettings,
    server: ServerSettings,
    placement: Placement,
    *,
    address: str | None = None,
    say: Callable[[str], None] = print,
    ray_options: Mapping[str, Any] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C on a Ray of this machine; on a cluster deploy and return.

    `address` is a cluster's (`auto` for the one of this machine). Where it serves already and only
    the export or its schedule changed, replicas load the new one beside the old and drop nothing.
    `ray_options` go to `ray.init`. Raises `BackendUnavailable` when Ray is out of reach,
    `EngineFailed` when the replicas do not start, and as `pinned`.
    """
    require_ray()
    import ray
    from ray import serve

    config = deploy_config(worker, server, placement)
    options: dict[str, Any] = {
        "address": address or "local",  # not the one that RAY_ADDRESS may name
        "log_to_driver": False,
        "logging_level": "warning",
    }
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # The proxy is a child of this process and has no other way to be told.
        os.environ.setdefault(_PROXY_HOOK, "fastface_trt.serving.ray.proxy:middlewares")
        # Pictures of faces pass through Ray's object store: they must not be spilled to a disk.
        options |= {
            "include_dashboard": False,
            "_system_config": {"automatic_object_spilling_enabled": False},
        }
    try:
        ray.init(**(options | dict(ray_options or {})))
    except (OSError, RuntimeError) as problem:
        raise BackendUnavailable(
            f"Ray{f' at {address}' if address else ''} cannot be reached: {problem}.",
            "Where the cluster asks for a token, set RAY_AUTH_MODE=token; its log says the rest.",
        ) from problem
    try:
        deploy(config)
        if address is not None:
            say(f"Deployed: {config['applications'][0]['deployments'][0]['user_config']}")
            return
        cluster = ray.get_runtime_context().gcs_address
        say(
            f"Serving on http://{server.host}:{server.port}; update it with --ray-address {cluster}"
        )
        _wait_for_signal()
        say("Draining")
        _drain(server.drain_seconds + 2 * SHUTDOWN_MARGIN_SECONDS)
        serve.shutdown()
    finally:
        ray.shutdown()


def deploy_config(
    worker: WorkerSettings, server: ServerSettings, placement: Placement
) -> dict[str, Any]:
    """What `serve deploy` reads, as a dict: the export is in `user_config`, so that it can change.

    Raises as `pinned`.
    """
    arguments = RayArguments.model_validate(
        worker.model_dump()
        | server.model_dump(exclude={"host", "port"})
        | placement.model_dump()
        | {"allow_anonymous": not server.api_keys}
    )
    checkpoint = pinned(arguments.checkpoint)
    given = arguments.model_dump(
        mode="json", exclude_defaults=True, exclude={"host", "port", "export", "schedule_of"}
    )
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": server.host,
            "port": server.port,
            "request_timeout_s": server.max_deadline + _REQUEST_MARGIN_SECONDS,
        },
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "fastface_trt.serving.ray:app",
                "args": given,
                "deployments": [{"name": DEPLOYMENT, "user_config": checkpoint.model_dump()}],
            }
        ],
    }


def deploy(config: Mapping[str, Any]) -> None:
    """Apply a config to the Ray that this process is connected to, and wait until it is in force.

    Raises `EngineFailed` when it cannot be.
    """
    from ray import serve
    from ray.serve.context import _get_global_client  # what `serve run CONFIG` uses, too
    from ray.serve.schema import ApplicationStatus, ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(schema)
    while True:
        time.sleep(_POLL_SECONDS)
        application = serve.status().applications.get(APPLICATION)
        if application is None or application.status in (
            ApplicationStatus.DEPLOYING,
            ApplicationStatus.NOT_STARTED,
        ):
            continue
        if application.status is ApplicationStatus.RUNNING:
            return
        messages = [application.message, *(one.message for one in application.deployments.values())]
        raise EngineFailed(
            f"Ray Serve could not start the replicas: {_reason(messages)}",
            "Where this was an update, replicas with the export from before go on: deploy that "
            "again, or one that opens.",
        )


def _reason(messages: Iterable[str]) -> str:
    """The last line of the last traceback that Ray Serve passes on, without the error's class."""
    lines = [line.strip() for text in messages for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    ours = [line for line in lines if line.startswith("fastface_trt.errors.")]
    last = (ours or errors or [line for line in lines if line] or ["it says nothing."])[-1]
    return re.sub(r"^[\w.]+: ", "", last)


def _drain(seconds: float) -> None:
    """Take the application out of the proxies and let its replicas end their requests.

    `serve.shutdown` alone would stop the proxies first, and cut off everybody inside.
    """
    from ray import serve

    serve.delete(APPLICATION, _blocking=False)
    give_up = time.monotonic() + seconds
    while APPLICATION in serve.status().applications and time.monotonic() < give_up:
        time.sleep(_POLL_SECONDS)


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def build(arguments: RayArguments) -> "Application":
    """The application of `arguments`, its checkpoint pinned to a hash."""
    require_ray()
    import ray
    from ray import serve
    from ray.serve.config import BackpressureConfig, DeploymentActorConfig

    from fastface_trt.serving.ray.faces import ACTOR, FaceActor
    from fastface_trt.serving.ray.replica import RayReplica

    faces = DeploymentActorConfig(
        name=ACTOR,
        actor_class=ray.remote(FaceActor),
        init_args=(arguments.faces_ttl, arguments.max_faces),
        actor_options={"num_cpus": 0},
    )
    deployment = serve.deployment(
        serve.ingress()(RayReplica),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        user_config=pinned(arguments.checkpoint).model_dump(),
        max_ongoing_requests=arguments.max_ongoing_requests,
        max_queued_requests=arguments.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=arguments.retry_after),
        health_check_period_s=arguments.health_check_period,
        graceful_shutdown_timeout_s=arguments.drain_seconds + SHUTDOWN_MARGIN_SECONDS,
        deployment_actors=[faces],
        # Other code or arguments restart replicas: new ones first, one at a time.
        max_surge_percent=1,
        **_replicas(arguments),
    )
    return deployment.bind(arguments.model_dump(mode="json", exclude={"host", "port"}))


def _replicas(arguments: RayArguments) -> dict[str, Any]:
    if arguments.max_replicas is None or arguments.max_replicas == arguments.min_replicas:
        return {"num_replicas": arguments.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_ongoing_requests,
        }
    }


def pinned(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a tag replaced by the hash that it means now; see `resolve`."""
    if not is_address(checkpoint.export):
        return checkpoint
    return checkpoint.model_copy(update={"export": str(resolve(checkpoint.export))})


def require_ray() -> None:
    """Raise `MissingDependency` without Ray Serve."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("ray.serve") is None:
        raise MissingDependency(
            "Many machines need the package ray[serve].", install_hint("serve", "ray")
        )
