"""Containers and Kubernetes, as far as they can be checked without either.

The fields of kubernetes.yaml are compared with its API's schemas by kubernetes-validate, by hand.
"""

import re
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from fastface_trt.cli.main import cli
from fastface_trt.serving.http import server
from fastface_trt.serving.http.app import about_router
from tests.serving.dockerfile_reader import bases, read_dockerfile

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "fastface_trt" / "serving" / "deploy"
DOCKERFILES = (DEPLOY / "Dockerfile.cpu", DEPLOY / "Dockerfile.gpu")
PATHS = {route.path for route in about_router().routes}


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.suffix[1:])
def dockerfile(request):
    return request.param


@pytest.fixture
def instructions(dockerfile):
    return read_dockerfile(dockerfile)


def last(instructions, name):
    final = max(one.stage for one in instructions)
    return [one for one in instructions if one.name == name and one.stage == final][-1]


def parsed(arguments):
    """The parameters of `fastface-trt ARGUMENTS`; a click.UsageError where there is no such."""
    name, *rest = arguments
    command = cli.commands[name]
    return command.make_context(name, list(rest)).params


def test_base_images_are_pinned_and_stages_known(instructions):
    names = set()
    for image, name in bases(instructions):
        assert image in names or re.search(r":\d+\.\d+\.\d+-[\w.-]+$", image), image
        names.add(name)
    for one in instructions:
        if one.text.startswith("--from="):
            assert one.words[0].removeprefix("--from=") in names


def test_what_is_copied_exists_and_reaches_the_builder(dockerfile, instructions):
    ignore = dockerfile.with_name(dockerfile.name + ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied: set[str] = set()
    for one in instructions:
        if one.name == "COPY" and not one.text.startswith("--from="):
            copied |= set(one.words[:-1])
    assert copied == kept
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_images_are_slim(instructions):
    """Nothing that brings OpenCV is installed, so that its libraries need not be either."""
    text = " ".join(one.text for one in instructions)
    assert "libgl" not in text
    assert "insightface" not in text


def test_extras_that_are_installed_exist(instructions):
    project = (ROOT / "pyproject.toml").read_text()
    for one in instructions:
        for extras in re.findall(r"'\.\[([\w,-]+)\]'", one.text):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_the_package_builds_from_what_is_copied_and_holds_its_files(tmp_path):
    context = tmp_path / "context"
    context.mkdir()
    for one in read_dockerfile(DOCKERFILES[0]):  # both copy what the same list lets through
        if one.name == "COPY" and not one.text.startswith("--from="):
            for source in one.words[:-1]:
                (context / source).symlink_to(ROOT / source)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*wheel, "--wheel-dir", str(tmp_path)], cwd=context, check=True)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        packed = set(archive.namelist())
    for folder in ("deploy", "triton"):
        for path in (ROOT / "fastface_trt" / "serving" / folder).iterdir():
            if path.is_file():
                assert path.relative_to(ROOT).as_posix() in packed


def test_the_process_is_not_root_and_gets_signals_itself(instructions):
    user = last(instructions, "USER").text.split(":")[0]
    assert user.isdigit()
    assert int(user) > 0
    assert any("--uid " + user in one.text for one in instructions if one.name == "RUN")
    for name in ("ENTRYPOINT", "CMD"):
        assert last(instructions, name).text.startswith("[")  # no shell between


def test_the_command_is_one_that_exists(instructions):
    entry, command = last(instructions, "ENTRYPOINT").words, last(instructions, "CMD").words
    assert entry == ["fastface-trt"]
    params = parsed(command)
    assert params["host"] == "0.0.0.0"
    assert str(params["port"]) == last(instructions, "EXPOSE").text


def test_health_is_asked_of_a_route_that_exists(instructions):
    check = last(instructions, "HEALTHCHECK").text
    path = re.search(r"http://127\.0\.0\.1:8000(/[\w/]+)", check)[1]
    assert path in PATHS
    program = re.search(r"CMD (\[.*\])$", check)[1]
    compile(yaml.safe_load(program)[2], "healthcheck", "exec")


def test_no_secret_is_built_in(instructions):
    for one in instructions:
        if one.name in ("ARG", "ENV"):
            assert not re.search(r"KEY|TOKEN|SECRET|PASSW", one.text)


def test_compose_names_files_that_exist_and_needs_keys():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["fastface"]
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).is_file()
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert ":?" in service["environment"]["FASTFACE_API_KEYS"]
    assert service["read_only"]


@pytest.fixture(scope="module")
def objects():
    found = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {one["kind"]: one for one in found}


@pytest.fixture
def pod(objects):
    return objects["Deployment"]["spec"]["template"]["spec"]


def test_the_pods_command_and_probes_exist(pod):
    (container,) = pod["containers"]
    params = parsed(container["args"])
    assert params["port"] == container["ports"][0]["containerPort"]
    assert params["host"] == "0.0.0.0"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in PATHS
    assert container["livenessProbe"]["httpGet"]["path"] != "/v2/health/ready"  # it drains


def test_the_init_containers_command_exists(pod):
    (container,) = pod["initContainers"]
    (script,) = container["args"]
    line = re.search(r"fastface-trt (.*)\)", script)[1]
    parsed(line.replace('"', "").split())


def test_a_pod_has_time_to_drain(pod):
    (container,) = pod["containers"]
    drain = parsed(container["args"])["drain_seconds"]
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = before + drain + server.FINISH_SECONDS + server.CLOSE_SECONDS
    assert pod["terminationGracePeriodSeconds"] > needed


def test_pods_are_restricted_and_keys_come_from_a_secret(pod):
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    for container in pod["initContainers"] + pod["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        for variable in container["env"]:
            assert "KEY" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_labels_ports_and_metrics_fit_together(objects, pod):
    deployment = objects["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    metric = scaler["metrics"][0]["pods"]["metric"]["name"]
    assert f'"{metric}"' in (files("fastface_trt.serving.http") / "metrics.py").read_text()
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] == "/metrics"
