"""Measures for Prometheus: requests (counted at the edge), and what the records say of the queue and the workers."""

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from server.context import Context
from server.records import OPEN, Run, Worker

WAITING = Gauge("server_jobs", "Trainings and predictions that wait or run", ["kind", "status"])
OLDEST = Gauge("server_oldest_waiting_seconds", "How long the oldest waiting run has waited", ["kind"])
WORKERS = Gauge("server_workers", "Workers heard of lately", ["hardware"])


async def measure(session: AsyncSession, context: Context) -> Response:
    counts = select(Run.kind, Run.status, func.count()).where(Run.status.in_(OPEN)).group_by(Run.kind, Run.status)
    found = {(kind, status): number for kind, status, number in (await session.execute(counts)).all()}
    for kind in ("training", "prediction"):
        for status in OPEN:
            WAITING.labels(kind, status).set(found.get((kind, status), 0))
        oldest = select(func.extract("epoch", func.now() - func.min(Run.created_at)))
        waited = await session.scalar(oldest.where(Run.status == "starting", Run.claim.is_(None), Run.kind == kind))
        OLDEST.labels(kind).set(float(waited or 0))
    recent = Worker.seen_at > func.now() - text(f"interval '{context.settings.lost_seconds:.0f} seconds'")
    WORKERS.clear()
    for hardware, number in await session.execute(
        select(Worker.hardware, func.count()).where(recent).group_by(Worker.hardware)
    ):
        WORKERS.labels(hardware).set(number)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
