"""The real Cog server, on loopback, in a folder of its own; and a place that receives its webhooks."""

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openapi import document
from script import signature

ROOT = Path(__file__).resolve().parent.parent
FINAL = ("succeeded", "failed", "canceled")
Answer = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server. Its temporary files, and those of what it runs, lie in `temporary`."""

    url: str
    temporary: Path
    output: Path
    """What it has written to its terminal."""

    def ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None, asynchronous: bool = False
    ) -> tuple[int, Answer]:
        """One request: the status and the JSON answer, also where the status says no."""
        request = urllib.request.Request(self.url + path, method=method)
        request.add_header("Content-Type", "application/json")
        if asynchronous:
            request.add_header("Prefer", "respond-async")
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, data, timeout=600) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as refusal:
            return refusal.code, json.loads(refusal.read() or b"{}")

    def train(self, **inputs: object) -> Answer:
        """A training, waited for."""
        status, answer = self.ask("POST", "/trainings", {"input": inputs})
        assert status == 200, answer
        return answer

    def leftovers(self) -> list[str]:
        """What lies in the temporary folder, but for what Cog downloaded (Cog never cleans up after itself)."""
        return sorted(path.name for path in self.temporary.iterdir() if not path.name.startswith(("tmp", "coglet")))


@contextlib.contextmanager
def serve(mode: str, folder: Path) -> Iterator[Server]:
    """Starts the server in `mode`, train or predict, waits until it is ready, and ends it and all of its children."""
    predict = signature.read(ROOT / "predict.py", "Predictor")
    train = signature.read(ROOT / "train.py", "train")
    (folder / ".cog").mkdir()
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(document(predict, train)), encoding="utf-8")
    temporary, output = folder / "tmp", folder / "server.log"
    temporary.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        # The worker is started as bare `python`, so the right one has to come first.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PORT": str(port),
        "TMPDIR": str(temporary),
        "COG_PREDICT_TYPE_STUB": f"{ROOT / 'predict.py'}:Predictor",
        "COG_TRAIN_TYPE_STUB": f"{ROOT / 'train.py'}:train",
    }
    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", "--x-mode", mode],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(url=f"http://127.0.0.1:{port}", temporary=temporary, output=output)
    try:
        _wait_until_ready(server, process)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(server: Server, process: "subprocess.Popen[bytes]", seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    health: object = None
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            health = server.ask("GET", "/health-check")[1]["status"]
            if health == "READY":
                return
        time.sleep(0.2)
    raise AssertionError(f"the server is not ready but {health}:\n{server.output.read_text()}")


@dataclass
class Inbox:
    """The webhooks that came, oldest first."""

    url: str
    received: list[Answer] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_line(self, line: str, seconds: float = 120) -> None:
        """Until the logs hold the line. Raises AssertionError where the run ends first."""
        self._wait(lambda: any(line in str(hook.get("logs")) for hook in self.received), seconds, f"the line {line!r}")

    def wait_for_end(self, seconds: float = 120) -> Answer:
        """The last webhook: the run's result."""
        self._wait(lambda: bool(self._ended()), seconds, "the end")
        return self._ended()[0]

    def _ended(self) -> list[Answer]:
        return [hook for hook in self.received if hook["status"] in FINAL]

    def _wait(self, condition: "contextlib.Callable[[], bool]", seconds: float, what: str) -> None:  # type: ignore
        deadline = time.monotonic() + seconds
        with self.arrived:
            while not condition():
                assert not self._ended(), f"it ended before {what}: {self._ended()}"
                assert self.arrived.wait(deadline - time.monotonic()), f"waited in vain for {what}"


@contextlib.contextmanager
def listen(files: Path) -> Iterator[Inbox]:
    """A small server on loopback: it takes webhooks at the inbox's url, and gives the files of a folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(files))  # type: ignore[arg-type]

        def do_POST(self) -> None:
            hook = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with inbox.arrived:
                inbox.received.append(hook)
                inbox.arrived.notify_all()
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        inbox = Inbox(f"http://127.0.0.1:{listener.server_address[1]}")
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        try:
            yield inbox
        finally:
            listener.shutdown()
