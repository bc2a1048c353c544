"""What is deleted, and when: a run's pictures, captions, outputs and logs with the run, or after so many days."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import Text, and_, cast, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server import accounts, files, objects
from server.files import Store
from server.records import FINAL, OPEN, File, Run, Version

ROWS = 50
"""Runs in one transaction."""


async def files_of(session: AsyncSession, run: Run) -> list[str]:
    """The files that go with a run: those made for it or by it, and its uploads that no other run has use for.

    The weights of a version stay: they are a model by now. So does another run's output, though this one began with it.
    """
    sent = objects.files_in(run.input)
    mine = or_(File.run_id == run.id, and_(File.id.in_(sent), File.run_id.is_(None)))
    ids = (await session.scalars(select(File.id).where(mine, File.account_id == run.account_id))).all()
    kept = set((await session.scalars(select(Version.weights).where(Version.weights.in_(ids)))).all())
    for id in sent:
        wanted = select(Run.id).where(
            Run.id != run.id, Run.account_id == run.account_id, Run.status.in_(OPEN), cast(Run.input, Text).contains(id)
        )
        if await session.scalar(wanted.limit(1)):
            kept.add(id)
    return [id for id in ids if id not in kept]


def expiry(days: float) -> datetime | None:
    """When an upload of now is deleted."""
    return datetime.now(UTC) + timedelta(days=days) if days else None


async def forget(session: AsyncSession, store: Store, ids: list[str]) -> None:
    await files.remove(session, store, ids)


async def expire(session: AsyncSession, store: Store, days: float) -> int:
    """Empties runs that ended more than `days` ago (0: none), and deletes uploads whose time is over and that no open
    run has use for. Returns how many."""
    now = datetime.now(UTC)
    gone: list[str] = []
    runs = 0
    if days:
        old = select(Run).where(
            Run.status.in_(FINAL), Run.completed_at < now - timedelta(days=days), Run.data_removed.is_(False)
        )
        for run in (await session.scalars(old.limit(ROWS).with_for_update(skip_locked=True))).all():
            gone += await files_of(session, run)
            run.input, run.output, run.logs, run.data_removed = {}, None, "", True
            runs += 1
    used = select(Version.weights).where(Version.weights.is_not(None))
    waiting = (await session.scalars(select(Run.input).where(Run.status.in_(OPEN)))).all()
    late = select(File.id).where(
        File.expires_at < now, File.id.not_in(used), File.id.not_in(objects.files_in(list(waiting)))
    )
    uploads = (await session.scalars(late.limit(ROWS))).all()
    await files.remove(session, store, [*gone, *uploads])
    return runs + len(uploads)


async def strays(session: AsyncSession, store: Store, days: float = 1.0) -> int:
    """Deletes stored bytes that no record names, of files older than this: what crashes left. Returns how many.

    Whatever is not called as our files are is somebody else's in the same bucket, and stays.
    """
    gone = 0
    async for ids in store.older_than(datetime.now(UTC) - timedelta(days=days)):
        ours = [id for id in ids if accounts.is_id(id)]
        known = set((await session.scalars(select(File.id).where(File.id.in_(ours)))).all())
        unknown = [id for id in ours if id not in known]
        await store.delete(unknown)
        gone += len(unknown)
    return gone
