"""One server for all tests of this folder, started as its users start it: script/serve, on an empty folder."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import replicate

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = {
    "training_steps": 2,
    "resolution": "64",
    "preservation": "off",
    "preview_prompts": "a [trigger]",
    "captioning": "disabled",
    "seed": 1,
}
"""A training of a second on the toy base."""
SKETCH = {"prompt": "a TOK", "num_inference_steps": 1, "output_format": "png", "seed": 1, "include_metadata": False}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """A running server."""

    url: str
    """Without /v1."""
    data: Path
    token: str
    """Of the account `you`."""
    output: Path
    process: "subprocess.Popen[bytes]"
    environ: dict[str, str]
    workers: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    """Those that were begun one by one, by what they take."""

    def client(self, token: str | None = None) -> replicate.Client:
        """Replicate's own client, unmodified."""
        return replicate.Client(api_token=token or self.token, base_url=self.url)

    def http(self, token: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return httpx.Client(base_url=f"{self.url}/v1", headers=headers, timeout=90)

    def new_token(self, owner: str) -> str:
        made = subprocess.run(
            [str(ROOT / "script" / "serve"), "token", owner],
            env=self.environ,
            capture_output=True,
            text=True,
            check=True,
        )
        return made.stdout.strip()

    @property
    def database(self) -> str:
        return f"postgresql://postgres:@/postgres?host={self.data}/postgres"

    def begin_worker(self, only: str) -> None:
        """script/worker as on another machine: it shares database and store with the server, and no process."""
        script = str(ROOT / "script" / "worker")
        variables = {
            "DATABASE_URL": self.database,
            "STORAGE_URL": f"file://{self.data}/files",
            "SERVER_DATA": str(self.data / only),
        }
        with (self.data / f"{only}.log").open("ab") as log:
            self.workers[only] = subprocess.Popen(
                [sys.executable, str(ROOT / "server" / "leash.py"), script, "--only", only],
                env=self.environ | variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end_worker(self, only: str, number: signal.Signals) -> None:
        """SIGKILL strikes the worker and its leash; Cog's child dies by the child's own."""
        process = self.workers.pop(only)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.wait(30)

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What the database holds."""
        with psycopg.connect(self.database) as database:
            return database.execute(query, values).fetchall()

    def log(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def serve(folder: Path, *options: str, **variables: str) -> Iterator[Served]:
    """script/serve on `folder`, until the block ends; ended as Ctrl-C ends it."""
    unset = ("FLUX_BASE", "CAPTIONER", "DATABASE_URL", "STORAGE_URL", "PUBLIC_URL")
    environ = {name: value for name, value in os.environ.items() if name not in unset} | {
        "SERVER_DATA": str(folder / "data"),
        "ALLOW_PRIVATE_ADDRESSES": "1",
        # A network with a proxy, which no request on loopback may take.
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        **variables,
    }
    script = str(ROOT / "script" / "serve")
    port, output = free_port(), folder / "serve.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "server" / "leash.py"), script, "--port", str(port), *options],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process, output)
        found = re.search(r"r8_[0-9a-f]{40}", output.read_text())
        assert found, output.read_text()
        yield Served(url, folder / "data", found[0], output, process, environ)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", output: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server is not healthy:\n{output.read_text()}")


def _rules(folder: Path) -> str:
    """A file of guardrails with one rule."""
    path = folder / "rules.toml"
    path.write_text('[[rule]]\nname = "a word of the tests"\nwords = ["forbidden-by-test"]\n', encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    # Two workers, so that neither has to start Cog anew for each change from training to drawing.
    # Not in pytest's own folder: started by root, PostgreSQL runs as another user, whom a second pytest shuts out.
    with (
        tempfile.TemporaryDirectory(prefix="flux-served-", ignore_cleanup_errors=True) as folder,
        serve(Path(folder), "--workers", "0", LOST_SECONDS="8", GUARDRAILS=_rules(Path(folder))) as running,
    ):
        try:
            running.begin_worker("trainings")
            running.begin_worker("predictions")
            yield running
        finally:
            for process in running.workers.values():
                process.send_signal(signal.SIGTERM)
            for process in running.workers.values():
                process.wait(30)


@pytest.fixture(scope="session")
def client(served: Served) -> replicate.Client:
    return served.client()


@pytest.fixture(scope="session")
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http() as opened:
        yield opened


@pytest.fixture(scope="session")
def stranger(served: Served) -> Iterator[httpx.Client]:
    """Another account's client."""
    with served.http(served.new_token("stranger")) as opened:
        yield opened


@pytest.fixture(scope="session")
def trained(client: replicate.Client) -> "replicate.training.Training":
    """A training that has published to you/trained."""
    training = client.trainings.create(
        version="ostris/flux-dev-lora-trainer:" + 64 * "a",
        input={"input_images": (ROOT / "examples" / "subject.zip").open("rb"), "trigger_word": "TOK", **QUICK},
        destination="you/trained",
    )
    assert wait(training) == "succeeded", training.error
    return training


def wait(run: "replicate.training.Training | replicate.prediction.Prediction", seconds: float = 170) -> str:
    deadline = time.monotonic() + seconds
    while run.status not in ("succeeded", "failed", "canceled"):
        assert time.monotonic() < deadline, f"{run.status} after {seconds} s: {run.logs}"
        time.sleep(0.2)
        run.reload()
    return str(run.status)


def wait_for(run: "replicate.training.Training", line: str, seconds: float = 120) -> None:
    """Until the run at work has logged the text."""
    deadline = time.monotonic() + seconds
    while line not in (run.logs or ""):
        assert time.monotonic() < deadline, f"no {line!r} in: {run.logs}"
        assert run.status in ("starting", "processing"), run.error
        time.sleep(0.1)
        run.reload()
