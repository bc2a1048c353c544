"""The worker: takes a run, has Cog do it on this machine's GPU, and writes down how it ends.

Trainer and generator take turns: one Cog child runs at a time and has the GPU to itself, so neither has to know how
much memory the other left. A worker that is told to stop hands its run back, and the next one begins it again: where
that is on the same machine, a training goes on from its last saved state.
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import procrastinate
import psycopg
from procrastinate import JobContext
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession

from server import files, jobs, runs
from server.cog import Child, ChildLost
from server.context import Context
from server.intake import Intake
from server.loopback import Loopback
from server.outside import Outside
from server.records import OPEN, File, Json, Run, Worker

log = logging.getLogger("server.worker")
T = TypeVar("T")
AWAY = (OperationalError, InterfaceError, PoolTimeout, psycopg.OperationalError)
REPORT_SECONDS = 0.5
"""Between two writings of a run's logs."""
IDLE_LOOKS = 20
"""How often in a row the child may be found without work before its run counts as lost: its last word may be late."""
TRIES_SECONDS = 600.0
"""How long a finished run's result is held for a database that is away."""
FINAL = ("succeeded", "failed", "canceled")


@dataclass
class Attempt:
    """What is known of the run that the child is at."""

    run: Run
    word: str
    begun: float
    """Seconds of the monotonic clock."""
    told: Json
    """Cog's newest webhook."""
    news: asyncio.Event


class GpuWorker:
    """One for each GPU, or group of them."""

    def __init__(
        self, context: Context, outside: Outside, name: str, hardware: str, environ: Mapping[str, str]
    ) -> None:
        self.context = context
        self.name = name
        self.hardware = hardware
        self.folder = context.settings.data / "workers" / re.sub(r"[^\w.-]", "_", name)
        self.environ = environ
        self.unfinished = context.settings.data / "unfinished"
        """States of trainings that have not ended, a folder for each run; of all workers of this machine."""
        self.child: Child | None = None
        self.attempt: Attempt | None = None
        self.stopping = asyncio.Event()
        self.loopback = Loopback(self.folder, self._hear)
        self.intake = Intake(context, outside, self.loopback, self.folder)

    async def run(self, queues: list[str]) -> None:
        """Until `stop`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        await self._clear_unfinished()  # of runs that others have ended while this machine was away
        taker = jobs.Taker(self.context.settings.database_url, self._register, queues, 1)
        reporting = asyncio.create_task(self._report_for_ever())
        try:
            async with self.loopback.serving():
                taking = asyncio.create_task(taker.run())
                await self.stopping.wait()
                taker.stop()
                await taking
        finally:
            reporting.cancel()
            if self.child is not None:
                await self.child.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """Hands back what runs and takes nothing more."""
        self.stopping.set()
        if self.attempt is not None:
            self.attempt.news.set()

    def _register(self, app: procrastinate.App) -> None:
        app.task(name=jobs.PERFORM, pass_context=True)(self.perform)

    async def perform(self, context: JobContext, run_id: str) -> None:
        """The task: one attempt at a run, which ends it, or gives it back."""
        assert context.job.id is not None
        job = context.job.id
        run = await self._surely(lambda session: runs.claim(session, run_id, job))
        if run is None or run.claim is None:
            return
        self.attempt = attempt = Attempt(run, run.claim, time.monotonic(), {}, asyncio.Event())
        log.info("%s %s: begun, attempt %d", run.kind, run.id, run.attempts)
        try:
            await self._do(attempt)
        except runs.Lost:
            log.info("%s %s: no longer ours", run.kind, run.id)
            await _to_its_end(self._let_go(attempt))
        except asyncio.CancelledError:  # Procrastinate's way of telling that its caller cancelled it
            await self._let_go(attempt)
            await self._give_back(attempt, "it was interrupted")
        except ChildLost as error:
            log.warning("%s %s: %s", run.kind, run.id, error)
            await self._kill_child()
            await self._give_back(attempt, str(error))
        except Exception as error:
            log.exception("%s %s", run.kind, run.id)
            await self._kill_child()
            await self._give_back(attempt, f"the worker met an error: {type(error).__name__}")
        finally:
            self.attempt = None
            self.intake.clear(attempt.word)
            await self._clear_unfinished()

    async def _do(self, attempt: Attempt) -> None:
        run = attempt.run
        preparing = asyncio.create_task(self.intake.prepare(run, attempt.word))
        try:
            child = await self._child(run.cog, attempt)
            while not preparing.done():
                await asyncio.wait({preparing}, timeout=1.0)
                await self._check(attempt)
            values = preparing.result()
        except ValueError as error:
            await self._end(attempt, "failed", error=str(error))
            return
        finally:
            preparing.cancel()
        attempt.begun = time.monotonic()
        child.goes_on_in(self.unfinished / run.id)
        wrong = await child.begin(run.id, values, f"{self.loopback.url}/told/{attempt.word}")
        if wrong is not None:
            faults = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in wrong)
            await self._end(attempt, "failed", error=faults)
            return
        await self._write(attempt, runs.begin)
        await self._watch(attempt, child)
        told = attempt.told
        if told["status"] == "succeeded":
            await self._succeed(attempt, told)
        elif told["status"] == "failed":
            if await child.health() not in ("READY", "BUSY"):
                raise ChildLost(f"the {child.kind} died: {_plain(told.get('error'))}")
            await self._end(attempt, "failed", error=_plain(told.get("error")))
        else:
            raise ChildLost("the run was canceled from outside")

    async def _watch(self, attempt: Attempt, child: Child) -> None:
        """Writes down what the run tells, until it ends. Raises ChildLost and Lost."""
        written, idle = 0.0, 0
        while attempt.told.get("status") not in FINAL:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(attempt.news.wait(), 0.5)
            attempt.news.clear()
            if attempt.told.get("status") in FINAL:
                return
            idle = idle + 1 if await child.health() != "BUSY" else 0
            if not child.is_alive() or idle > IDLE_LOOKS:
                raise ChildLost(f"the {child.kind} died, or lost the run")
            pause = written + REPORT_SECONDS - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            written = time.monotonic()
            await self._check(attempt)

    async def _check(self, attempt: Attempt) -> None:
        """Writes the newest logs; raises Lost where the run is no longer ours or this worker is to stop.

        A database that is away stops no training.
        """
        if self.stopping.is_set():
            await self._let_go(attempt)
            await self._give_back(attempt, "", counted=False)
            raise runs.Lost(attempt.run.id)
        try:
            async with self.context.sessions.begin() as session:
                run = await runs.held(session, attempt.run.id, attempt.word)
                await self._note(session, run, attempt)
        except AWAY as error:
            log.warning("the database is away: %s", str(error).partition("\n")[0])

    async def _note(self, session: AsyncSession, run: Run, attempt: Attempt) -> None:
        told = attempt.told
        logs = told.get("logs") or ""
        if logs and not run.logs.endswith(logs):
            run.logs = attempt.run.logs + logs
            await runs.announce(session, run, "logs")
        if measured := told.get("metrics"):
            run.metrics = {**run.metrics, **measured}

    async def _succeed(self, attempt: Attempt, told: Json) -> None:
        """Stores the files, then ends the run and publishes its version, both or neither."""
        run = attempt.run
        output = await self._kept(attempt, told.get("output"))
        weights: File | None = None
        if run.cog == "trainer":
            weights = next(iter(_files(output)), None)

        async def finish(session: AsyncSession, run: Run) -> None:
            await self._note(session, run, attempt)
            shown: Any = _references(output)
            if run.kind == "training":
                assert weights is not None
                shown = {"version": await runs.publish(session, run, weights), "weights": {"$file": weights.id}}
            elif weights is not None:
                shown = run.id  # flux-pro-trainer's finetune_id
            await runs.end(session, run, "succeeded", output=shown, seconds=time.monotonic() - attempt.begun)

        await self._write(attempt, finish)
        log.info("%s %s: succeeded", run.kind, run.id)

    async def _kept(self, attempt: Attempt, output: Any) -> Any:
        """The output with each of its files stored, as a record of it."""
        if isinstance(output, list):
            return [await self._kept(attempt, entry) for entry in output]
        if isinstance(output, dict):
            return {name: await self._kept(attempt, entry) for name, entry in output.items()}
        path = self.intake.made(output, attempt.word) if isinstance(output, str) else None
        if path is None:
            return output

        async def keep(session: AsyncSession) -> File:
            run = attempt.run
            return await files.keep(session, self.context.store, run.account_id, path, name=path.name, run=run.id)

        return await self._surely(keep)

    async def _end(self, attempt: Attempt, status: str, *, error: str) -> None:
        async def finish(session: AsyncSession, run: Run) -> None:
            await self._note(session, run, attempt)
            await runs.end(session, run, status, error=error, seconds=time.monotonic() - attempt.begun)

        await self._write(attempt, finish)
        log.info("%s %s: %s", attempt.run.kind, attempt.run.id, status)

    async def _give_back(self, attempt: Attempt, reason: str, counted: bool = True) -> None:
        async def again(session: AsyncSession, run: Run) -> None:
            if not counted:
                run.attempts -= 1
            await runs.begin_again(session, run, reason, self.context.settings.attempts)

        with contextlib.suppress(runs.Lost):
            await self._write(attempt, again)

    async def _write(self, attempt: Attempt, change: Callable[[AsyncSession, Run], Awaitable[None]]) -> None:
        """Changes the run's record while it is ours. Raises Lost where it is not."""

        async def write(session: AsyncSession) -> None:
            await change(session, await runs.held(session, attempt.run.id, attempt.word))

        await self._surely(write)

    async def _clear_unfinished(self) -> None:
        """Deletes the states of runs that have ended."""
        there = [folder.name for folder in self.unfinished.glob("*")]
        with contextlib.suppress(*AWAY):  # the next run's end will do it
            async with self.context.sessions() as session:
                found = await session.scalars(select(Run.id).where(Run.id.in_(there), Run.status.in_(OPEN)))
                for run in {*there}.difference(found):
                    shutil.rmtree(self.unfinished / run, ignore_errors=True)

    async def _surely(self, action: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """A transaction, tried again while the database is away."""
        deadline = time.monotonic() + TRIES_SECONDS
        while True:
            try:
                async with self.context.sessions.begin() as session:
                    return await action(session)
            except AWAY as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("the database is away: %s", str(error).partition("\n")[0])
                await asyncio.sleep(0.5)

    async def _child(self, kind: str, attempt: Attempt) -> Child:
        """The Cog child of this kind, ready; the other kind's ends first."""
        if self.child is not None and (self.child.kind != kind or await self.child.health() != "READY"):
            await self._kill_child()
        if self.child is None:
            self.child = await asyncio.to_thread(
                Child, kind, self.folder / kind, f"{self.loopback.url}/outputs", self.environ
            )
        starting = asyncio.create_task(self.child.ready())
        try:
            while not starting.done():
                await asyncio.wait({starting}, timeout=1.0)
                await self._check(attempt)
            starting.result()
        finally:
            starting.cancel()
        return self.child

    async def _let_go(self, attempt: Attempt) -> None:
        """The GPU is free when this returns."""
        if self.child is not None and await self.child.health() == "BUSY":
            await self.child.cancel(attempt.run.id)
        if self.child is not None and not self.child.is_alive():
            await self._kill_child()

    async def _kill_child(self) -> None:
        if self.child is not None:
            child, self.child = self.child, None
            await child.kill()

    def _hear(self, word: str, told: Json) -> None:
        # Cog sends each webhook by itself: one of a run at work may come after that of its end.
        if self.attempt is not None and self.attempt.word == word and self.attempt.told.get("status") not in FINAL:
            self.attempt.told = told
            self.attempt.news.set()

    async def _report_for_ever(self) -> None:
        """Tells the others that this worker lives and what it does."""
        while True:
            doing = self.attempt.run.id if self.attempt else ""
            values = {"hardware": self.hardware, "doing": doing}
            row = insert(Worker).values(name=self.name, **values)
            with contextlib.suppress(SQLAlchemyError, OSError):
                async with self.context.sessions.begin() as session:
                    await session.execute(
                        row.on_conflict_do_update(index_elements=["name"], set_={**values, "seen_at": func.now()})
                    )
            await asyncio.sleep(5)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Awaits it whatever comes. Procrastinate tells of a cancel once, by cancelling the task: where the record told of
    it first, that would strike while the GPU is being freed, and leave the run at work."""
    doing = asyncio.ensure_future(work)
    while not doing.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(doing)
    doing.result()


def _plain(error: Any) -> str:
    """A model's error without the words that Cog and Python put before it."""
    return re.sub(r"^(Prediction failed: )?(Training failed: )?(ValueError: )?", "", str(error or "it says not why"))


def _files(output: Any) -> list[File]:
    if isinstance(output, File):
        return [output]
    entries = output.values() if isinstance(output, dict) else output if isinstance(output, list) else []
    return [file for entry in entries for file in _files(entry)]


def _references(output: Any) -> Any:
    if isinstance(output, File):
        return {"$file": output.id}
    if isinstance(output, dict):
        return {name: _references(entry) for name, entry in output.items()}
    return [_references(entry) for entry in output] if isinstance(output, list) else output


def hardware(environ: Mapping[str, str] = os.environ) -> str:
    """The name of the GPU that this worker has: CPU where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        if asked.returncode == 0 and asked.stdout.strip():
            number = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            names = asked.stdout.strip().splitlines()
            return names[int(number)] if number.isdigit() and int(number) < len(names) else names[0]
    return "CPU"
