"""Routes about the caller and the server: account, hardware, webhook secret."""

from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter
from sqlalchemy import select

from server import objects
from server.api.context import Caller, Session
from server.records import Worker

routes = APIRouter()


@routes.get("/account")
async def account(caller: Caller) -> Any:
    return objects.account(caller)


@routes.get("/hardware")
async def hardware(caller: Caller, session: Session) -> Any:
    """What the workers that run now have; a model may name any other too, and runs on what there is."""
    recent = Worker.seen_at > datetime.now(UTC) - timedelta(minutes=1)
    names = (await session.scalars(select(Worker.hardware).where(recent).distinct().order_by(Worker.hardware))).all()
    return [{"sku": name.lower().replace(" ", "-"), "name": name} for name in names or ["CPU"]]


@routes.get("/webhooks/default/secret")
async def webhook_secret(caller: Caller) -> Any:
    return {"key": caller.webhook_secret}
