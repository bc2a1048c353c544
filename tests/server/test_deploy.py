"""The files of deploy/, each against its schema, and the queue's length against the real database."""

import json
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
