"""What a training or prediction goes through: starting, processing, then one of three ends.

A worker that begins a run takes a claim, a random word; what it writes counts only while the record holds that word.
So whoever is given up (killed, cut off, or only late) can neither change an end nor publish twice.
"""

import hashlib
import secrets
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from server import catalog, jobs
from server.records import FINAL, OPEN, File, Model, Run, Use, Version

DRAWING_FIRST = 1
"""The priority of drawings: somebody waits for one, and a training takes its time in any case."""


class Lost(Exception):
    """The run is another's by now, or has ended: the work on it is to be dropped."""


async def enqueue(session: AsyncSession, run: Run) -> None:
    """Gives the run to whichever worker is free first."""
    trains = run.cog == "trainer"
    queue, priority = (jobs.TRAININGS, 0) if trains else (jobs.PREDICTIONS, DRAWING_FIRST)
    run.job_id = await jobs.put(session, jobs.PERFORM, queue, priority=priority, run_id=run.id)


async def announce(session: AsyncSession, run: Run, event: str) -> None:
    """Has the caller's webhook told, if it wants this event: start, output, logs or completed."""
    if run.webhook and event in run.webhook_events:
        often = event in ("output", "logs")
        await jobs.put(
            session,
            jobs.DELIVER,
            jobs.WEBHOOKS,
            lock=run.id,
            only_one=f"{run.id}:{event}" if often else None,
            run_id=run.id,
            event=event,
            attempt=1,
        )


async def claim(session: AsyncSession, id: str, job: int) -> Run | None:
    """Begins an attempt for the job that was put in for it. None: the run has ended, or another job has it."""
    taken = update(Run).where(Run.id == id, Run.status.in_(OPEN), Run.job_id == job, Run.claim.is_(None))
    values = {"claim": secrets.token_hex(16), "attempts": Run.attempts + 1, "status": "starting"}
    run = await session.scalar(taken.values(**values).returning(Run))
    return run


async def held(session: AsyncSession, id: str, word: str) -> Run:
    """The run, locked, for whoever holds the claim. Raises Lost."""
    run = await session.scalar(select(Run).where(Run.id == id).with_for_update())
    if run is None or run.claim != word or run.status in FINAL:
        raise Lost(id)
    return run


async def begin(session: AsyncSession, run: Run) -> None:
    """The model has the input now."""
    run.status = "processing"
    run.started_at = run.started_at or datetime.now(UTC)
    await announce(session, run, "start")


async def end(
    session: AsyncSession, run: Run, status: str, *, output: Any = None, error: str | None = None, seconds: float = 0
) -> None:
    """Ends the run for good and tells its webhook. `seconds` are those that the model was at it."""
    assert status in FINAL
    now = datetime.now(UTC)
    run.status, run.error, run.completed_at = status, error, now
    if status == "succeeded":
        run.output = output
    run.claim, run.secrets = None, {}
    total = (now - run.created_at).total_seconds()
    run.metrics = {**run.metrics, "predict_time": round(seconds, 3), "total_time": round(total, 3)}
    pictures = len(run.output) if run.cog == "generator" and isinstance(run.output, list) else 0
    session.add(
        Use(
            run_id=run.id,
            account_id=run.account_id,
            token=run.token,
            kind=run.kind,
            model=run.destination or run.model,
            tags=run.tags,
            pictures=pictures,
            gpu_seconds=round(seconds, 3),
        )
    )
    await announce(session, run, "completed")


async def publish(session: AsyncSession, run: Run, weights: File) -> str:
    """Makes the training's LoRA a version of its destination; returns `owner/name:version`. Once for each training."""
    assert run.destination is not None
    owner, _, name = run.destination.partition("/")
    model = await session.scalar(
        select(Model).where(Model.owner == owner, Model.name == name, Model.account_id == run.account_id)
    )
    if model is None:  # deleted while it trained
        model = await new_model(session, run.account_id, owner, name)
    drawing = await session.scalar(
        select(Version)
        .join(Model)
        .where(Model.owner == catalog.OWNER, Model.name == catalog.GENERATOR)
        .order_by(Version.created_at.desc())
        .limit(1)
    )
    assert drawing is not None
    id = hashlib.sha256(f"{run.id}:{weights.sha256}".encode()).hexdigest()
    session.add(
        Version(
            id=id,
            model_id=model.id,
            cog="generator",
            cog_version=drawing.cog_version,
            openapi_schema=drawing.openapi_schema,
            weights=weights.id,
            run_id=run.id,
        )
    )
    await session.flush()
    return f"{owner}/{name}:{id}"


async def new_model(session: AsyncSession, account: int, owner: str, name: str) -> Model:
    """The model of that name, made where there is none; another request may do so at the same time."""
    values = {"account_id": account, "owner": owner, "name": name, "visibility": "private"}
    await session.execute(insert(Model).values(**values).on_conflict_do_nothing())
    model = await session.scalar(select(Model).where(Model.owner == owner, Model.name == name))
    assert model is not None
    return model


async def cancel(session: AsyncSession, run: Run) -> None:
    """Ends it now, whatever its worker does, and has the worker told; `run` is locked by the caller."""
    if run.status in FINAL:
        return
    since = run.started_at
    seconds = (datetime.now(UTC) - since).total_seconds() if since else 0
    await end(session, run, "canceled", seconds=seconds)
    if run.job_id is not None:
        await jobs.withdraw(session, run.job_id)


async def begin_again(session: AsyncSession, run: Run, reason: str, attempts: int) -> None:
    """After an attempt that was cut short: another one, or the end where there have been so many."""
    run.claim = None
    if run.attempts >= attempts:
        await end(session, run, "failed", error=f"given up after {run.attempts} attempts: {reason}")
        return
    run.status, run.logs = "starting", ""
    await enqueue(session, run)


async def count_open(session: AsyncSession, account: int) -> int:
    query = select(func.count()).select_from(Run).where(Run.account_id == account, Run.status.in_(OPEN))
    return await session.scalar(query) or 0
