"""What `serve --ray` asks of Ray; no cluster is started."""

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi")

from fastface_trt.cli.main import cli
from fastface_trt.serving.ray import run
from fastface_trt.serving.ray.arguments import Placement


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(run, "run_on_ray", lambda *given, **named: calls.append((given, named)))
    return calls


def serve(*options):
    return CliRunner().invoke(cli, ["serve", "--ray", *options])


def test_options_become_a_placement(asked):
    answer = serve(
        *("--export", "s3://bucket/x#production", "--workers", "2", "--max-replicas", "8"),
        *("--replica-gpus", "1", "--replica-cpus", "4", "--ray-address", "auto", "--port", "9"),
    )
    assert answer.exit_code == 0, answer.output
    ((worker, server, placement), named) = asked[0]
    assert placement == Placement(min_replicas=2, max_replicas=8, num_gpus=1, num_cpus=4)
    assert worker.export == "s3://bucket/x#production"
    assert server.port == 9
    assert named["address"] == "auto"
    assert serve().exit_code == 0
    assert asked[1][0][2] == Placement()


def test_everybody_is_let_in_only_when_asked(asked):
    answer = serve("--host", "0.0.0.0")
    assert answer.exit_code == 2
    assert "--allow-anonymous" in answer.stderr
    assert asked == []
