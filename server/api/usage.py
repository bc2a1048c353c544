"""Routes about tags and about what was used."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from server import use
from server.api.context import Caller, OwnContext, Problem, Session
from server.context import Context
from server.records import Account

routes = APIRouter()


@routes.get("/tags")
async def tags(caller: Caller, session: Session) -> Any:
    return {"results": [{"name": name, "runs": number} for name, number in await use.tags(session, caller.id)]}


@routes.get("/tags/{tag}/export")
async def export(tag: str, caller: Caller, session: Session, context: OwnContext) -> FileResponse:
    return await exported(session, context, caller, tag)


async def exported(session: Session, context: Context, account: Account, tag: str) -> FileResponse:
    """The tag's zip, which is deleted when it has been sent. Raises Problem where nothing has the tag."""
    if tag not in dict(await use.tags(session, account.id)):
        raise Problem(404, "Not found", f"nothing of yours has the tag {tag[:80]!r}")
    made = tempfile.TemporaryDirectory(prefix="export-")
    path = Path(made.name) / "export.zip"
    await use.export(session, context.store, account.id, tag, path)
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(tag)}.zip"}
    return FileResponse(path, media_type="application/zip", headers=headers, background=BackgroundTask(made.cleanup))


@routes.get("/usage")
async def usage(caller: Caller, session: Session, since: datetime | None = None, until: datetime | None = None) -> Any:
    return await use.report(session, caller.id, _with_zone(since), _with_zone(until))


def _with_zone(moment: datetime | None) -> datetime | None:
    """A moment without a time zone is UTC's, whatever the database's own is."""
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
