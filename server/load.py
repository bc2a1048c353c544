"""How the server bears load: clients that poll, and a long queue that several workers share.

    script/python --server -m server.load

100 clients poll for 20 s; then four workers that only pretend to train share 1,000 trainings.

The workers take runs from the real queue, claim them, and end them in the real records; only the training itself is
left out. So what is measured is the API, the queue and PostgreSQL.
"""

import argparse
import asyncio
import os
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import procrastinate
from procrastinate import JobContext
from sqlalchemy import func, select

from server import accounts, catalog, database, jobs, postgres, runs, settings
from server.cog import LEASH
from server.records import Run
from server.settings import ROOT, Settings

CLIENTS, SECONDS, TRAININGS, WORKERS = 100, 20.0, 1000, 4
PAUSE = 0.5
"""Seconds between a client's requests, as Replicate's own clients poll."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="server.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--trainings", type=int, default=TRAININGS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        asyncio.run(pretend(settings.read()))
        return 0
    with tempfile.TemporaryDirectory(prefix="flux-load-", ignore_cleanup_errors=True) as folder:
        try:
            return asyncio.run(measure(Path(folder), arguments))
        finally:
            postgres.stop(Path(folder) / "postgres")


async def measure(folder: Path, arguments: argparse.Namespace) -> int:
    url = postgres.start(folder / "postgres")
    environ = dict(os.environ) | {
        "SERVER_DATA": str(folder),
        "DATABASE_URL": url,
        "OPEN_JOBS": "100000",
        "REQUESTS_A_MINUTE": "1000000",
    }
    own = settings.read(environ)
    database.migrate(own.inside)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    python = [sys.executable, str(LEASH), sys.executable, "-m"]
    api = await asyncio.create_subprocess_exec(
        *python, "server.serve", "api", "--port", port, cwd=ROOT, env=environ, stdin=asyncio.subprocess.PIPE
    )
    workers: list[asyncio.subprocess.Process] = []
    try:
        async with database.connected(own.inside) as sessions, sessions.begin() as session:
            await catalog.seed(session)
            token = await accounts.new_token(session, await accounts.create(session, "you"))
        base = f"http://127.0.0.1:{port}/v1"
        limits = httpx.Limits(max_connections=arguments.clients, max_keepalive_connections=arguments.clients)
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60, limits=limits) as client:
            await healthy(port)
            ids, put_in = await queue(client, arguments.trainings)
            print(f"{len(ids)} trainings queued in {put_in:.1f} s ({len(ids) / put_in:.0f} a second)")
            seconds = await poll(int(port), token, ids, arguments.clients, arguments.seconds)
            show(seconds, arguments)
            begun = time.monotonic()
            for _ in range(WORKERS):
                command = [*python, "server.load", "--worker"]
                pipe = asyncio.subprocess.PIPE
                workers.append(await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environ, stdin=pipe))
            ends = await ended(own, len(ids))
            print(f"{WORKERS} workers ended them in {time.monotonic() - begun:.1f} s: {dict(ends)}")
            once = await started_once(own)
            print(f"begun more than once: {len(ids) - once}")
            return 0 if ends == {"succeeded": len(ids)} and once == len(ids) else 1
    finally:
        for process in [api, *workers]:
            process.terminate()
            await process.wait()


async def healthy(port: str) -> None:
    async with httpx.AsyncClient() as client:
        for _ in range(300):
            try:
                if (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.1)
    raise RuntimeError("the API does not start")


async def queue(client: httpx.AsyncClient, number: int) -> tuple[list[str], float]:
    """Trainings put in by ten at a time: their ids, and the seconds that it took."""
    path = f"/models/replicate/fast-flux-trainer/versions/{64 * '0'}/trainings"
    body = {"destination": "you/load", "input": {"input_images": "https://example.com/a.zip"}}
    at_once, begun = asyncio.Semaphore(10), time.monotonic()

    async def one() -> str:
        async with at_once:
            answer = await client.post(path, json=body)
            answer.raise_for_status()
            return str(answer.json()["id"])

    first = await one()
    rest = await asyncio.gather(*(one() for _ in range(number - 1)))
    return [first, *rest], time.monotonic() - begun


async def poll(port: int, token: str, ids: list[str], clients: int, seconds: float) -> list[float]:
    """Seconds that each request took, of clients that each poll a training twice a second.

    By bare sockets: a hundred clients of httpx would take more of the machine than the server does.
    """
    taken: list[float] = []
    until = time.monotonic() + seconds

    async def one(number: int) -> None:
        await asyncio.sleep(PAUSE * number / clients)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        path = f"/v1/trainings/{ids[number % len(ids)]}"
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n\r\n"
        while time.monotonic() < until:
            begun = time.monotonic()
            writer.write(request.encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            assert length, head
            body = await reader.readexactly(int(length[1]))
            taken.append(time.monotonic() - begun)
            assert head.startswith("HTTP/1.1 200"), (head, body)
            await asyncio.sleep(max(0.0, PAUSE - taken[-1]))
        writer.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return taken


def show(seconds: list[float], arguments: argparse.Namespace) -> None:
    ordered = sorted(seconds)
    share = {name: ordered[int(part * (len(ordered) - 1))] for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1))}
    told = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in share.items())
    print(f"{arguments.clients} clients polling for {arguments.seconds:.0f} s: {len(ordered)} requests, {told}")


async def ended(own: Settings, number: int) -> Counter[str]:
    """How the trainings ended, when all have, or after five minutes."""
    async with database.connected(own.inside) as sessions:
        deadline = time.monotonic() + 300
        while True:
            async with sessions() as session:
                counts = select(Run.status, func.count()).group_by(Run.status)
                found = Counter({status: count for status, count in await session.execute(counts)})
            if found["starting"] + found["processing"] == 0 or time.monotonic() > deadline:
                assert sum(found.values()) == number
                return Counter({status: count for status, count in found.items() if count})
            await asyncio.sleep(0.2)


async def started_once(own: Settings) -> int:
    async with database.connected(own.inside) as sessions, sessions() as session:
        return await session.scalar(select(func.count()).select_from(Run).where(Run.attempts == 1)) or 0


async def pretend(own: Settings) -> None:
    """A worker that claims a run and ends it."""
    async with database.connected(own.inside, 2) as sessions:

        async def perform(context: JobContext, run_id: str) -> None:
            assert context.job.id is not None
            async with sessions.begin() as session:
                run = await runs.claim(session, run_id, context.job.id)
            if run is None or run.claim is None:
                return
            async with sessions.begin() as session:
                await runs.begin(session, await runs.held(session, run_id, run.claim))
            async with sessions.begin() as session:
                await runs.end(session, await runs.held(session, run_id, run.claim), "succeeded", output={})

        def register(app: procrastinate.App) -> None:
            app.task(name=jobs.PERFORM, pass_context=True)(perform)

        await jobs.Taker(own.database_url, register, [jobs.TRAININGS], 1).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
