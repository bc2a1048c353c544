import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def lines(file: str) -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt", "requirements-server.txt"])
def test_every_requirement_is_pinned_to_one_version(file):
    for line in lines(file):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==\d+(\.\d+)+", line), line


def test_a_machine_without_a_gpu_has_the_containers_packages_but_for_torch():
    container, dev = (dict(line.split("==") for line in lines(f)) for f in ("requirements.txt", "requirements-dev.txt"))
    assert {name: version for name, version in dev.items() if name in container and name != "torch"} == {
        name: version for name, version in container.items() if name != "torch"
    }
    assert "torch" in dev
