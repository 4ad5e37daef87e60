"""What `serve run fastface_trt.serving.ray:app NAME=VALUE …` and a config's `args` may say."""

import json
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fastface_trt.serving.settings import Count, Seconds, ServerSettings, Settings, WorkerSettings


class Placement(Settings):
    """Replicas, what each gets of a machine, and how much may wait for it; names are Ray's."""

    min_replicas: Count = 1
    max_replicas: Count | None = None
    """More than `min_replicas` scales between them; None keeps `min_replicas`."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 4
    """Requests per replica that scaling aims at."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    num_cpus: Annotated[float, Field(ge=0)] = 1
    max_ongoing_requests: Count = 32
    """Requests in work per replica. Beyond what the worker has room for (`max_waiting` and
    `max_running`) the replica itself answers 429."""
    max_queued_requests: Count = 64
    """Requests per proxy that wait for any replica; beyond it they get 503 at once."""
    retry_after: Seconds = 2
    """What a 503 of the proxy tells a client to wait."""
    health_check_period: Seconds = 5


class Checkpoint(Settings):
    """What a running deployment can change without a restart: `user_config` in a Serve config."""

    export: str = "mini"
    schedule_of: str | None = None


class RayArguments(WorkerSettings, ServerSettings, Placement):
    """Everything, in one flat list, since `serve run` passes NAME=VALUE as text.

    Lists are separated by commas and `engine_options` is JSON there. Address and port belong to
    Ray's proxies (`serve start --http-host`, `http_options` in a config), so they are refused here.
    """

    allow_anonymous: bool = False
    """Let everybody in who reaches the proxies: needed where there are no `api_keys`, since a
    replica cannot know on which addresses they listen."""

    @field_validator(
        *("api_keys", "metrics_keys", "allow_origins", "model_names", "checks"), mode="before"
    )
    @classmethod
    def _split(cls, value: Any, field: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        parts = tuple(filter(None, map(str.strip, value.split(","))))
        if not parts and str(field.field_name).endswith("_keys"):
            raise ValueError("has no key in it: give some, or leave it out")
        return parts

    @field_validator("engine_options", mode="before")
    @classmethod
    def _read_json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("host", "port")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise ValueError("belongs to Ray's proxies: serve start --http-host HOST --http-port PORT")

    @model_validator(mode="after")
    def _check(self) -> "RayArguments":
        if not self.api_keys and not self.allow_anonymous:
            raise ValueError(
                "there are no api_keys: give some, or say allow_anonymous=true where only people "
                "who may ask reach the proxies"
            )
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is less than min_replicas")
        return self

    @property
    def worker(self) -> WorkerSettings:
        """The worker's part."""
        return WorkerSettings.model_validate(
            self.model_dump(include=set(WorkerSettings.model_fields))
        )

    @property
    def server(self) -> ServerSettings:
        """The HTTP surface's part."""
        names = set(ServerSettings.model_fields) - {"host", "port"}
        return ServerSettings.model_validate(self.model_dump(include=names))

    @property
    def checkpoint(self) -> Checkpoint:
        """What may change while it runs."""
        return Checkpoint(export=self.export, schedule_of=self.schedule_of)
