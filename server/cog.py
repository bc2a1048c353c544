"""Cog's own server with one of the repository's models, as a child process on loopback.

Cog serves one request at a time, and tells of it by webhooks; it has no way to ask. The child is this worker's alone:
nothing but loopback reaches it, and it dies with the worker.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from server import schema
from server.records import Json
from server.settings import ROOT

LEASH = Path(__file__).with_name("leash.py")
PYTHON = ROOT / ".venv" / "bin" / "python"
RUN = ROOT / "script" / "python"
"""Runs it with the variables that a training wants."""
START = (
    "import os, runpy, sys; sys.argv += ['--upload-url', os.environ.pop('UPLOAD_URL')];"
    " runpy.run_module('cog.server.http', run_name='__main__', alter_sys=True)"
)
"""Cog's server. Every user of a machine may read the arguments of its processes, and this address holds a secret."""
SECONDS_TO_START = 1800
"""A base of 33 GB may have to be fetched first."""
SECONDS_TO_CANCEL = 1.2
"""A run that has not ended by then is killed with its process: whoever cancels has the GPU back within two seconds."""
KEPT_FROM_IT = ("DATABASE_URL", "STORAGE_URL", "AWS_", "GOOGLE_", "AZURE_", "SERVER_", "PYTHONPATH")
"""Variables of the server that a model has no business with."""


class ChildLost(Exception):
    """The child has died, or cannot go on."""


@dataclass(frozen=True)
class Kind:
    mode: str
    file: str
    document: str


MODELS = {
    "trainer": Kind("train", "predict.py", "trainer"),
    "echo": Kind("predict", "predict.py", "trainer"),
    "generator": Kind("predict", "generate.py", "generator"),
}
"""By `records.Version.cog`; echo is the trainer's prediction, which Replicate wants of every model."""


class Child:
    """Starts in `folder`, which is emptied. `upload` is where it puts the files that it makes."""

    def __init__(self, kind: str, folder: Path, upload: str, environ: Mapping[str, str]) -> None:
        self.kind = kind
        self.folder = folder
        self._http = httpx.AsyncClient(timeout=30, trust_env=False)
        shutil.rmtree(folder, ignore_errors=True)
        # Apart from its working folder: no name in an input leads to what others left here.
        (folder / "home" / ".cog").mkdir(parents=True)
        (folder / "tmp").mkdir()
        self._states = folder / "states"
        model = MODELS[kind]
        document = json.dumps(schema.read().documents[model.document])
        (folder / "home" / ".cog" / "openapi_schema.json").write_text(document, encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._noun = "trainings" if model.mode == "train" else "predictions"
        # It and this worker talk on loopback: a proxy of the network's leads elsewhere.
        direct = ",".join(filter(None, (environ.get("NO_PROXY"), environ.get("no_proxy"), "127.0.0.1")))
        variables = {name: value for name, value in environ.items() if not name.startswith(KEPT_FROM_IT)} | {
            "NO_PROXY": direct,
            "no_proxy": direct,
            # Cog starts its worker as bare `python`.
            "PATH": f"{PYTHON.parent}:{environ.get('PATH', '')}",
            "PORT": str(self._port),
            "UPLOAD_URL": upload,
            "TMPDIR": str(folder / "tmp"),
            "CHECKPOINTS": str(self._states),
            "COG_PREDICT_TYPE_STUB": f"{ROOT / model.file}:Predictor",
            "COG_TRAIN_TYPE_STUB": f"{ROOT / 'train.py'}:train",
        }
        command = [str(RUN), "-c", START, "--host", "127.0.0.1", "--x-mode", model.mode]
        with (folder / "cog.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(LEASH), *command],
                cwd=folder / "home",
                env=variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process group."""
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    async def ready(self) -> None:
        """Returns when it takes requests. Raises ChildLost with the end of its log where it will not."""
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self.is_alive():
            match await self.health():
                case "READY":
                    return
                case "SETUP_FAILED" | "DEFUNCT" | "UNHEALTHY":
                    break
            await asyncio.sleep(0.1)
        raise ChildLost(f"the {self.kind} does not start: {self.last_words()}")

    async def health(self) -> str:
        """Cog's word for its state; empty where it does not answer."""
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            answer = await self._http.get(f"http://127.0.0.1:{self._port}/health-check")
            return str(answer.json()["status"])
        return ""

    def last_words(self) -> str:
        text = (self.folder / "cog.log").read_text(encoding="utf-8", errors="replace")
        return text[-800:].strip() or "it said nothing"

    def goes_on_in(self, states: Path) -> None:
        """The folder for the state of the next training, which outlives this child."""
        states.mkdir(parents=True, exist_ok=True)
        self._states.unlink(missing_ok=True)
        self._states.symlink_to(states)

    async def begin(self, run: str, values: Json, webhook: str) -> list[Json] | None:
        """Hands over an input. Returns the faults that Cog finds in it, or None where it is at work."""
        # What the runs before said is in their records, and is deleted with them.
        os.truncate(self.folder / "cog.log", 0)
        body = {"input": values, "webhook": webhook, "webhook_events_filter": ["start", "output", "logs", "completed"]}
        address = f"http://127.0.0.1:{self._port}/{self._noun}/{run}"
        for _ in range(100):
            try:
                answer = await self._http.put(address, json=body, headers={"Prefer": "respond-async"})
            except httpx.HTTPError as error:
                raise ChildLost(f"the {self.kind} does not answer: {type(error).__name__}") from error
            if answer.status_code == 422:
                return list(answer.json()["detail"])
            if answer.status_code == 202:
                return None
            await asyncio.sleep(0.1)  # it has answered the one before and not yet put it away
        raise ChildLost(f"the {self.kind} answers {answer.status_code}: {answer.text[:200]}")

    async def cancel(self, run: str) -> None:
        """Has the run end, and kills the process where it does not soon."""
        deadline = time.monotonic() + SECONDS_TO_CANCEL
        with contextlib.suppress(httpx.HTTPError):
            address = f"http://127.0.0.1:{self._port}/{self._noun}/{run}/cancel"
            await self._http.post(address, timeout=SECONDS_TO_CANCEL)
            while time.monotonic() < deadline:
                if await self.health() == "READY":
                    return
                await asyncio.sleep(0.05)
        await self.kill()

    async def kill(self) -> None:
        """Ends it and all of its processes now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._http.aclose()
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
