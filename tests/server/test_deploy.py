"""The files of deploy/, each against its schema, and the queue's length against the real database."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from server import serve
from tests.server.conftest import ROOT, Served

DEPLOY = ROOT / "deploy"
COMPOSE_SCHEMA = Path(__file__).with_name("compose-spec.json")
"""compose-spec/compose-spec of June 2026 (Apache-2.0)."""


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def test_the_compose_file_fits_the_specification() -> None:
    (compose,) = documents("compose.yaml")
    jsonschema.validate(compose, json.loads(COMPOSE_SCHEMA.read_text(encoding="utf-8")))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**compose, "servces": {}}, json.loads(COMPOSE_SCHEMA.read_text(encoding="utf-8")))


def test_api_and_worker_of_compose_share_their_files_and_nothing_else() -> None:
    services = documents("compose.yaml")[0]["services"]
    mounts = [dict(volume.split(":")[::-1] for volume in services[name]["volumes"]) for name in ("api", "worker")]
    folder = services["api"]["environment"]["STORAGE_URL"].partition("file://")[2].rstrip("}")
    assert folder in mounts[0]
    assert {path for path in mounts[0] if mounts[0][path] == mounts[1].get(path)} == {folder}


def test_images_of_others_are_pinned_to_a_version() -> None:
    images = [service["image"] for service in documents("compose.yaml")[0]["services"].values()]
    assert [image for image in images if not re.search(r":\d", image)] == ["flux-lora-server", "flux-lora-server"]


def test_no_container_runs_as_root_and_all_that_it_writes_to_is_its_own() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    [user] = [line.split()[1] for line in lines if line.startswith("USER ")]
    own = next(line for line in lines if "useradd" in line)
    assert f"--uid {user}" in own
    services = documents("compose.yaml")[0]["services"].values()
    written = {volume.split(":")[1] for s in services if "build" in s for volume in s["volumes"]}
    for document in documents("kubernetes.yaml"):
        if document["kind"] == "Deployment":
            pod = document["spec"]["template"]["spec"]
            assert pod["securityContext"].items() >= {"runAsUser": int(user), "runAsNonRoot": True}.items()
            written |= {mount["mountPath"] for c in pod["containers"] for mount in c["volumeMounts"]}
    assert written - {"/dev/shm"} == {word for word in own.split() if word.startswith("/")}


@pytest.mark.parametrize("document", documents("kubernetes.yaml"), ids=lambda d: f"{d['kind']}/{d['metadata']['name']}")
def test_the_kubernetes_objects_fit_the_schema(document: dict) -> None:
    kubernetes_validate.validate(document, "1.33", strict=True)


def test_the_commands_in_the_files_are_ones_that_script_serve_knows() -> None:
    containers = [
        container
        for document in documents("kubernetes.yaml")
        if document["kind"] == "Deployment"
        for container in document["spec"]["template"]["spec"]["containers"]
    ]
    commands = [container["args"] for container in containers]
    commands += [
        s["command"] for s in documents("compose.yaml")[0]["services"].values() if s.get("image", "").startswith("flux")
    ]
    for command in commands:
        serve._parser().parse_args(command)


def test_the_autoscaler_counts_open_runs_of_the_deployment_that_there_is(served: Served) -> None:
    _, scaled = documents("keda.yaml")
    names = [d["metadata"]["name"] for d in documents("kubernetes.yaml") if d["kind"] == "Deployment"]
    assert scaled["spec"]["scaleTargetRef"]["name"] in names
    ((number,),) = served.rows(scaled["spec"]["triggers"][0]["metadata"]["query"])
    assert number == served.rows("SELECT count(*) FROM runs WHERE completed_at IS NULL")[0][0]


@pytest.mark.slow
def test_skypilot_takes_its_file(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "sky"], check=True)
    python = tmp_path / "sky" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "skypilot==0.14.1"], check=True)
    code = "import sky; task = sky.Task.from_yaml('deploy/skypilot.yaml'); assert task.run == 'script/worker'"
    subprocess.run([python, "-c", code], cwd=ROOT, check=True)
