"""Puts right what nobody else can: runs whose worker is lost, runs past their deadline, data past its time."""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from server import retention, runs
from server.context import Context
from server.records import DRAFT_DAYS, OPEN, Draft, Run
from server.settings import Settings

SECONDS = 2.0
RETENTION_SECONDS = 60.0
STRAYS_SECONDS = 6 * 3600.0
"""Listing a bucket costs money."""
KEEP_JOBS_DAYS = 7
REPORT_SECONDS = 86400.0

LOST = text(
    """
    SELECT r.id, j.status::text, j.id FROM runs r
    LEFT JOIN procrastinate_jobs j ON j.id = r.job_id
    LEFT JOIN procrastinate_workers w ON w.id = j.worker_id
    WHERE r.status IN ('starting', 'processing') AND (
        j.id IS NULL OR j.status NOT IN ('todo', 'doing')
        OR (j.status = 'doing' AND (w.id IS NULL OR w.last_heartbeat < now() - make_interval(secs => :seconds)))
    ) LIMIT 100
    """
)
"""Open runs whose job has ended without an end for them, or belongs to a worker that reports no more."""
STUCK = text(
    """
    SELECT j.id FROM procrastinate_jobs j JOIN procrastinate_workers w ON w.id = j.worker_id
    WHERE j.status = 'doing' AND w.last_heartbeat < now() - make_interval(secs => :seconds)
    UNION SELECT id FROM procrastinate_jobs WHERE status = 'doing' AND worker_id IS NULL
    """
)


async def for_ever(context: Context) -> None:
    """Several processes may do this at once: each run is put right by one of them."""
    log, cleaned = logging.getLogger("server.sweep"), 0.0
    searched = time.monotonic()
    while True:
        await asyncio.sleep(SECONDS)
        try:
            await take_up_lost(context)
            await cancel_late(context)
            if time.monotonic() - cleaned > RETENTION_SECONDS:
                cleaned = time.monotonic()
                await tidy(context)
            if time.monotonic() - searched > STRAYS_SECONDS:
                searched = time.monotonic()
                async with context.sessions() as session:
                    await retention.strays(session, context.store)
        except Exception as error:  # the database may be away for a moment
            log.warning("sweep: %s", str(error).partition("\n")[0])


async def take_up_lost(context: Context) -> int:
    """Begins again, or ends, every run whose worker is lost. Returns how many."""
    async with context.sessions() as session:
        found = (await session.execute(LOST, {"seconds": context.settings.lost_seconds})).all()
    for id, status, job in found:
        async with context.sessions.begin() as session:
            await _take_up(session, context.settings, id, status, job)
    async with context.sessions.begin() as session:
        # Webhooks and jobs of ended runs that a killed process was at: they are not begun again as they are.
        for job in (await session.scalars(STUCK, {"seconds": context.settings.lost_seconds})).all():
            await _put_back(session, job)
    return len(found)


async def _take_up(session: AsyncSession, settings: Settings, id: str, status: str | None, job: int | None) -> None:
    run = await session.scalar(select(Run).where(Run.id == id, Run.job_id == job).with_for_update(skip_locked=True))
    if run is None or run.status not in OPEN:
        return
    if status == "doing":
        await session.execute(text("SELECT procrastinate_finish_job_v1(:job, 'failed', false)"), {"job": job})
    await runs.begin_again(session, run, "its worker stopped answering", settings.attempts)


async def _put_back(session: AsyncSession, job: int) -> None:
    """A webhook is delivered again; a run's job is only closed, for its run says what is to be done."""
    task = text("SELECT task_name FROM procrastinate_jobs WHERE id = :job AND status = 'doing' FOR UPDATE SKIP LOCKED")
    name = await session.scalar(task, {"job": job})
    if name == "deliver":
        again = text("SELECT procrastinate_retry_job_v2(:job, now(), NULL, NULL, NULL)")
        await session.execute(again, {"job": job})
    elif name is not None:
        await session.execute(text("SELECT procrastinate_finish_job_v1(:job, 'failed', false)"), {"job": job})


async def cancel_late(context: Context) -> None:
    """Runs whose caller wanted them to end by now."""
    async with context.sessions.begin() as session:
        late = select(Run).where(Run.status.in_(OPEN), Run.deadline < datetime.now(UTC))
        for run in (await session.scalars(late.with_for_update(skip_locked=True))).all():
            await runs.cancel(session, run)


async def tidy(context: Context) -> None:
    for report in context.settings.reports.glob("*"):
        if report.is_file() and report.stat().st_mtime < time.time() - REPORT_SECONDS:
            report.unlink(missing_ok=True)
    async with context.sessions() as session:
        while await retention.expire(session, context.store, context.settings.retention_days):
            pass
    async with context.sessions.begin() as session:
        old = Draft.created_at < datetime.now(UTC) - timedelta(days=DRAFT_DAYS)
        await session.execute(delete(Draft).where(old))
        days = {"days": KEEP_JOBS_DAYS}
        done = """
            DELETE FROM procrastinate_jobs WHERE status NOT IN ('todo', 'doing') AND id NOT IN (
                SELECT job_id FROM procrastinate_events WHERE at > now() - make_interval(days => :days))
        """
        await session.execute(text(done), days)
        await session.execute(text("DELETE FROM workers WHERE seen_at < now() - make_interval(days => :days)"), days)
