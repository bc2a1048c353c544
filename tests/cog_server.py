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

from script import signature
from script.openapi import document

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

    def ask_when_free(
        self, method: str, path: str, body: Mapping[str, object], asynchronous: bool = False
    ) -> tuple[int, Answer]:
        """One request; again where the server has answered the one before and not yet put it away."""
        deadline = time.monotonic() + 10
        while True:
            status, answer = self.ask(method, path, body, asynchronous)
            if status != 409 or time.monotonic() > deadline:
                return status, answer
            time.sleep(0.05)

    def train(self, **inputs: object) -> Answer:
        """A training, waited for."""
        status, answer = self.ask_when_free("POST", "/trainings", {"input": inputs})
        assert status == 200, answer
        return answer

    def wait_for_line(self, run: str, line: str, seconds: float = 300) -> None:
        """Until the run logs a line that starts so: at once, where webhooks may come half a second late."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for text in self.output.read_text(encoding="utf-8").splitlines():
                fields = json.loads(text)["fields"] if text.startswith("{") else {}
                if fields.get("prediction_id") == run and str(fields.get("message")).startswith(line):
                    return
            time.sleep(0.02)
        raise AssertionError(f"waited in vain for {line!r}")

    def leftovers(self) -> list[str]:
        """Every file in the temporary folder."""
        return sorted(str(p.relative_to(self.temporary)) for p in self.temporary.rglob("*") if p.is_file())


def left_by_cog(run: str) -> list[Path]:
    """What Cog keeps of a run's inputs and outputs, in the one place that it has for them on a machine."""
    return [path for path in Path("/tmp/coglet/predictions", run).rglob("*") if path.is_file()]


@contextlib.contextmanager
def serve(
    mode: str,
    folder: Path,
    model: str = "predict.py",
    variables: Mapping[str, str] = {},
    seconds: float = 600,
) -> Iterator[Server]:
    """Starts the server in `mode`, train or predict, waits until it is ready, and ends it and all of its children.

    `model` is the file with the Predictor; `variables` are set for the server, such as COG_WEIGHTS.
    """
    predict = signature.read(ROOT / model, "Predictor")
    train = signature.read(ROOT / "train.py", "train")
    (folder / ".cog").mkdir()
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(document(predict, train)), encoding="utf-8")
    temporary, output = folder / "tmp", folder / "server.log"
    temporary.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Unless told otherwise the toy base and the template's captions, whatever the one who runs the tests trains on.
    environment = {name: value for name, value in os.environ.items() if name not in ("FLUX_BASE", "CAPTIONER")} | {
        # The worker is started as bare `python`, so the right one has to come first.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PORT": str(port),
        "TMPDIR": str(temporary),
        "COG_PREDICT_TYPE_STUB": f"{ROOT / model}:Predictor",
        "COG_TRAIN_TYPE_STUB": f"{ROOT / 'train.py'}:train",
        **variables,
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
        _wait_until_ready(server, process, seconds)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(server: Server, process: "subprocess.Popen[bytes]", seconds: float) -> None:
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

    def wait_for_end(self, seconds: float = 300) -> Answer:
        """The webhook with the run's result."""
        deadline = time.monotonic() + seconds
        with self.arrived:
            while not (ends := [hook for hook in self.received if hook["status"] in FINAL]):
                last = self.received[-1].get("logs") if self.received else "no webhook at all"
                assert self.arrived.wait(deadline - time.monotonic()), f"no end yet: {last}"
        return ends[0]


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

    # One thread: webhooks stand in the order in which they came, however long each is.
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listener:
        inbox = Inbox(f"http://127.0.0.1:{listener.server_address[1]}")
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        try:
            yield inbox
        finally:
            listener.shutdown()
