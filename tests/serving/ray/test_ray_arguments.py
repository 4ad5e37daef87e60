"""What `serve run` and a config may say, and what is made of it; no cluster is started."""

import pytest
from pydantic import ValidationError

from fastface_trt.serving.ray import RayArguments, app
from fastface_trt.serving.ray.arguments import Checkpoint, Placement
from fastface_trt.serving.settings import ServerSettings, WorkerSettings
from tests.docs.pages import ROOT, blocks


def test_arguments_come_as_text():
    arguments = RayArguments.model_validate(
        {
            "export": "s3://bucket/models#production",
            "threads": "2",
            "api_keys": "first-key,second-key",
            "max_replicas": "4",
            "num_gpus": "0.5",
            "latency_budget": "2.5",
            "engine_options": '{"optimization": "basic"}',
            "ai_mark": "false",
        }
    )
    assert arguments.worker == WorkerSettings(
        export="s3://bucket/models#production",
        threads=2,
        latency_budget=2.5,
        engine_options={"optimization": "basic"},
    )
    assert arguments.server == ServerSettings(api_keys=("first-key", "second-key"), ai_mark=False)
    assert (arguments.max_replicas, arguments.num_gpus) == (4, 0.5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"colour": "red"}, "colour"),
        ({"host": "0.0.0.0"}, "--http-host"),
        ({"port": "9000"}, "--http-host"),
        ({"min_replicas": "0"}, "min_replicas"),
        ({"min_replicas": "3", "max_replicas": "2"}, "less than min_replicas"),
        ({"allow_anonymous": "false"}, "no api_keys"),
        ({"threads": "many"}, "threads"),
        ({"api_keys": " , "}, "no key in it"),
        ({"api_keys": ","}, "no key in it"),
        ({"metrics_keys": ""}, "no key in it"),
    ],
)
def test_what_makes_no_sense_is_refused(given, says):
    with pytest.raises(ValidationError, match=says):
        RayArguments.model_validate({"allow_anonymous": True} | given)


def test_what_does_not_restart_replicas_is_apart():
    pytest.importorskip("ray.serve")
    from fastface_trt.serving.ray.run import deploy_config

    def config(export):
        return deploy_config(
            WorkerSettings(export=export, threads=1), ServerSettings(port=8123), Placement()
        )

    one, other = config("one"), config("other")
    assert one["http_options"]["port"] == 8123
    (changed,) = one["applications"][0].pop("deployments")
    (new,) = other["applications"][0].pop("deployments")
    assert one == other
    assert (changed["user_config"]["export"], new["user_config"]["export"]) == ("one", "other")
    (application,) = one["applications"]
    assert application["args"] == {"threads": 1, "allow_anonymous": True}
    RayArguments.model_validate(application["args"])


def test_the_config_of_the_page_is_one():
    schema = pytest.importorskip("ray.serve.schema")
    import yaml

    (block,) = (one for one in blocks(ROOT / "docs" / "ray.md") if one.language == "yaml")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(block.text))
    (application,) = config.applications
    assert RayArguments.model_validate(application.args).backend == "tensorrt"
    (deployment,) = application.deployments
    Checkpoint.model_validate(deployment.user_config)


def test_the_builder_pins_a_tag(tmp_path):
    pytest.importorskip("ray.serve")
    from fastface_trt.serving.storage.distribution import publish
    from tests.serving.small_export import write_small_export

    address = publish(
        write_small_export(tmp_path / "export"), str(tmp_path / "storage"), tag="production"
    )
    built = app(
        RayArguments(
            export=f"{tmp_path}/storage#production",
            allow_anonymous=True,
            min_replicas=2,
            max_replicas=5,
            num_gpus=1,
            max_queued_requests=7,
            retry_after=3,
        )
    )
    deployment = built._bound_deployment
    assert deployment.user_config == {"export": str(address), "schedule_of": None}
    options = deployment.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (1, 1)
    assert deployment.max_queued_requests == 7
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert deployment._deployment_config.backpressure_config.retry_after_s == 3
