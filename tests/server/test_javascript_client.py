"""Replicate's JavaScript client against the server, unmodified but for address and token."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.conftest import QUICK, ROOT, Served

CLIENT = "replicate@1.4.0"


@pytest.mark.slow
def test_the_javascript_client_makes_trains_draws_and_listens(served: Served, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not here")
    subprocess.run(["npm", "install", "--silent", "--no-fund", "--prefix", str(tmp_path), CLIENT], check=True)
    script = tmp_path / "client.js"
    shutil.copy(Path(__file__).with_name("client.js"), script)
    zip = str(ROOT / "examples" / "subject.zip")
    ran = subprocess.run(
        ["node", str(script), served.url, served.token, zip, json.dumps(QUICK)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("all is well\n")
