"""The queue: Procrastinate, on the database that holds the records.

A job is put in by the transaction that writes what it is about (`put`), so neither exists without the other. A job only
says which run or webhook to look at; what is true of it stands in its record.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import LiteralString

import procrastinate
import psycopg
import psycopg_pool
from procrastinate import exceptions
from procrastinate.worker import Worker
from psycopg import AsyncConnection
from sqlalchemy.ext.asyncio import AsyncSession

TRAININGS, PREDICTIONS, WEBHOOKS = "trainings", "predictions", "webhooks"
"""Queues. A worker takes from the first two, every API process from the third."""
PERFORM, DELIVER = "perform", "deliver"
"""Tasks: `worker.Worker.perform` and `webhooks.deliver`."""

BEAT_SECONDS = 2.0
BEAT: LiteralString = """
    INSERT INTO procrastinate_workers (id) OVERRIDING SYSTEM VALUE VALUES (%(worker)s)
    ON CONFLICT (id) DO UPDATE SET last_heartbeat = now()
"""

_putting = procrastinate.App(connector=procrastinate.PsycopgConnector())


class Taker:
    """Takes jobs from some queues, and goes on where the database was away for a while."""

    def __init__(
        self, url: str, register: Callable[[procrastinate.App], None], queues: list[str], at_once: int
    ) -> None:
        """`register` adds the tasks to the queue's application."""
        self._url = url
        self._register = register
        self._queues = queues
        self._at_once = at_once
        self._worker: Worker | None = None
        self._stopped = False

    def stop(self) -> None:
        """No further job is begun; `run` returns when those that run have ended."""
        self._stopped = True
        if self._worker is not None:
            self._worker.stop()

    async def run(self) -> None:
        log = logging.getLogger("server.jobs")
        while not self._stopped:
            try:
                app = procrastinate.App(
                    connector=procrastinate.PsycopgConnector(conninfo=self._url, min_size=1, max_size=6)
                )
                self._register(app)
                async with app.open_async():
                    await self._take(app)
            except (exceptions.ConnectorException, psycopg.Error, psycopg_pool.PoolTimeout, OSError) as error:
                log.warning("the queue is away: %s", str(error).partition("\n")[0])
                await asyncio.sleep(0.5)
            except Exception:  # or this process would live on, report that it is well, and take nothing
                log.exception("the queue's worker ended: begun again")
                await asyncio.sleep(0.5)

    async def _take(self, app: procrastinate.App) -> None:
        self._worker = Worker(
            app,
            queues=self._queues,
            concurrency=self._at_once,
            fetch_job_polling_interval=1.0,
            abort_job_polling_interval=1.0,
            # Procrastinate's own report ends for good when the database is away once (3.10, worker.py).
            update_heartbeat_interval=10**9,
            install_signal_handlers=False,
        )
        beating = asyncio.create_task(self._beat(app, self._worker))
        try:
            if not self._stopped:
                await self._worker.run()
        finally:
            beating.cancel()
            self._worker = None

    async def _beat(self, app: procrastinate.App, worker: Worker) -> None:
        """Reports that the worker lives. After the database was away the worker is begun anew, for it hears of new
        jobs by a connection that is gone."""
        away = False
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if worker.worker_id is None:
                continue
            try:
                await app.connector.execute_query_async(BEAT, worker=worker.worker_id)
            except (exceptions.ConnectorException, psycopg.Error, psycopg_pool.PoolTimeout, OSError):
                away = True
                continue
            if away:
                worker.stop()


async def put(
    session: AsyncSession,
    task: str,
    queue: str,
    *,
    priority: int = 0,
    lock: str | None = None,
    only_one: str | None = None,
    seconds: int = 0,
    **values: str | int,
) -> int | None:
    """Puts a job into the session's transaction and returns its id, to be begun after so many `seconds`.

    Jobs of one `lock` are done one after the other, in order. Where one of the same `only_one` waits, none is put in.
    """
    deferrer = _putting.configure_task(
        task,
        queue=queue,
        priority=priority,
        lock=lock,
        queueing_lock=only_one,
        schedule_in={"seconds": seconds} if seconds else None,
        connection=await _driver(session),
    )
    async with session.begin_nested() if only_one else contextlib.nullcontext():
        with contextlib.suppress(exceptions.AlreadyEnqueued):
            return await deferrer.defer_async(**values)
    return None


async def withdraw(session: AsyncSession, job: int) -> None:
    """A waiting job is not begun; whoever does a running one is told to stop."""
    await _putting.job_manager.cancel_job_by_id_async(job, abort=True, connection=await _driver(session))


async def _driver(session: AsyncSession) -> AsyncConnection:
    connection = await (await session.connection()).get_raw_connection()
    driver = connection.driver_connection
    assert isinstance(driver, AsyncConnection)
    return driver
