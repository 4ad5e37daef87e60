"""The Ray Serve application: how replicas are placed, bounded, scaled and looked after."""

import importlib.util
from typing import TYPE_CHECKING, Any

from fastface_trt.errors import MissingDependency
from fastface_trt.serving.distribution import resolve
from fastface_trt.serving.ray.arguments import Checkpoint, RayArguments
from fastface_trt.serving.release import is_address

if TYPE_CHECKING:
    from ray.serve import Application

DEPLOYMENT = "FastFace"
SHUTDOWN_MARGIN_SECONDS = 10
"""What a replica gets beyond its requests' time to close engines before it is killed."""


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


def pinned(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a tag replaced by the hash that it means now; see `resolve`."""
    if not is_address(checkpoint.export):
        return checkpoint
    return checkpoint.model_copy(update={"export": str(resolve(checkpoint.export))})


def require_ray() -> None:
    """Raise `MissingDependency` without Ray Serve."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("ray.serve") is None:
        raise MissingDependency(
            "Many machines need the package ray[serve].", "pip install 'fastface-trt[serve,ray]'"
        )


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
