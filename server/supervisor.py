"""Keeps one machine's processes running: the API, the workers, and the embedded PostgreSQL."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from server import postgres
from server.cog import LEASH

SECONDS_TO_STOP = 20
log = logging.getLogger("server")


def run(
    commands: Mapping[str, list[str]],
    environ: Mapping[str, str],
    variables: Mapping[str, Mapping[str, str]],
    database: Path | None,
) -> int:
    """Runs each command, and begins it again where it ends, until SIGTERM or SIGINT; then ends all in good order.

    `variables` are a command's own, besides `environ`; `database` is the embedded PostgreSQL's folder, if it is ours
    to look after. A command dies with this process, however that dies.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    running: dict[str, subprocess.Popen[bytes]] = {}
    begun: dict[str, float] = {}
    while not stopping.wait(0.5):
        if database is not None and not postgres.is_running(database):
            log.warning("PostgreSQL ended: begun again")
            try:
                postgres.start(database)
            except RuntimeError as error:
                log.error("%s", error)
        for name, command in commands.items():
            process = running.get(name)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                log.warning("%s ended with %d: begun again", name, process.returncode)
            if time.monotonic() - begun.get(name, -10.0) < 2:
                continue  # one that ends at once is not begun more than once in two seconds
            begun[name] = time.monotonic()
            running[name] = subprocess.Popen(
                [sys.executable, str(LEASH), *command],
                env={**environ, **variables.get(name, {})},
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
    for process in running.values():
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for process in running.values():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the leash alone would leave its command behind
            process.wait()
    if database is not None:
        postgres.stop(database)
    return 0
