"""The HTTP API: Replicate's, at /v1/x, and also at /x and /v1/v1/x.

Replicate's two Python clients read the same REPLICATE_BASE_URL, one with /v1 in it and one without; at three places
every client works with either. `context` holds what routes share; each other file has the routes of one noun.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Response
from sqlalchemy import text

from server import accounts, catalog, database, jobs, page, sweep, webhooks
from server.api import account, files, models, runs, stream, usage
from server.api.context import OwnContext, Session, add_handlers
from server.api.edge import Edge
from server.api.measures import measure
from server.context import Context
from server.files import Store
from server.outside import Outside
from server.settings import Settings


def create(settings: Settings) -> FastAPI:
    """The application. Its process also delivers webhooks and looks after lost workers, deadlines and retention."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with database.connected(settings.inside) as sessions, Outside(settings.allow_private) as outside:
            async with sessions.begin() as session:
                key = await accounts.link_key(session)
                await catalog.seed(session)
            app.state.reading = database.reading(sessions)
            app.state.spent, app.state.known = {}, {}
            app.state.context = context = Context(settings, sessions, Store(settings.storage_url), key)
            delivery = webhooks.Delivery(context, outside)
            taker = jobs.Taker(settings.database_url, delivery.register, [jobs.WEBHOOKS], 8)
            delivering = asyncio.create_task(taker.run())
            sweeping = asyncio.create_task(sweep.for_ever(context))
            try:
                yield
            finally:
                sweeping.cancel()
                taker.stop()
                await asyncio.gather(delivering, sweeping, return_exceptions=True)

    app = FastAPI(
        title="FLUX LoRA server", lifespan=life, docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json"
    )
    for routes in (account.routes, models.routes, runs.routes, files.routes, stream.routes, usage.routes):
        app.include_router(routes, prefix="/v1")
    page.add(app)
    add_handlers(app)
    app.add_middleware(Edge, settings=settings)

    @app.get("/health", include_in_schema=False)
    async def health(session: Session) -> dict[str, str]:
        await session.execute(text("SELECT 1"))
        return {"status": "ok"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics(context: OwnContext, session: Session) -> Response:
        return await measure(session, context)

    return app
