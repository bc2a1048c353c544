"""Routes about files: uploads, and downloads by signed links."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from starlette.datastructures import UploadFile

from server import files, objects, pages
from server.api.context import Caller, OwnContext, OwnLinks, Problem, Session, caller, missing
from server.records import File, Json, Version

routes = APIRouter()


@routes.post("/files", status_code=201)
async def upload(request: Request, caller: Caller, session: Session, context: OwnContext, links: OwnLinks) -> Any:
    await session.commit()  # a slow upload holds no connection
    async with request.form(max_files=3, max_fields=10) as form:
        content = form.get("content")
        if not isinstance(content, UploadFile):
            raise Problem(422, "Invalid request", "content: send the file as a part of this name, multipart/form-data")
        if content.size is not None and content.size > context.settings.file_bytes:
            raise Problem(413, "Too large", f"A file may have {context.settings.file_bytes // 2**20} MiB at most")
        kept = await files.keep(
            session,
            context.store,
            caller.id,
            content.file,
            name=await _text(form.get("filename")) or content.filename or "file",
            content_type=await _text(form.get("type")) or content.content_type or "",
            details=_details(await _text(form.get("metadata"))),
        )
        if context.settings.retention_days:
            kept.expires_at = datetime.now(UTC) + timedelta(days=context.settings.retention_days)
        await session.commit()
        await session.refresh(kept)
    return objects.file(kept, links)


async def _text(part: UploadFile | str | None) -> str:
    """A field, which the JavaScript client sends as a file of JSON."""
    if isinstance(part, UploadFile):
        return (await part.read(2**20)).decode("utf-8", "replace")
    return part or ""


def _details(text: str) -> Json:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Problem(422, "Invalid request", "metadata: must be a JSON object")
    return value


@routes.get("/files")
async def listed(request: Request, caller: Caller, session: Session, links: OwnLinks) -> Any:
    conditions = [File.account_id == caller.id, File.run_id.is_(None)]
    page = await pages.read(session, File, conditions, request.query_params, f"{links.base}/v1/files")
    return objects.page([objects.file(file, links) for file in page.rows], page.previous, page.next)


@routes.get("/files/{id}")
async def get(id: str, caller: Caller, session: Session, links: OwnLinks) -> Any:
    found = await files.owned(session, caller.id, id)
    if found is None:
        raise missing(f"The file {id}")
    return objects.file(found, links)


@routes.delete("/files/{id}", status_code=204)
async def remove(id: str, caller: Caller, session: Session, context: OwnContext) -> Response:
    found = await files.owned(session, caller.id, id)
    if found is None:
        raise missing(f"The file {id}")
    if await session.scalar(select(Version.id).where(Version.weights == id)):
        raise Problem(409, "Conflict", "These are the weights of a version; delete the version")
    await files.remove(session, context.store, [id])
    return Response(status_code=204)


@routes.get("/files/{id}/download")
async def download(
    request: Request, id: str, session: Session, context: OwnContext, expires: str = "", signature: str = ""
) -> Response:
    """The bytes, for whoever holds a link that has not expired, and for the owner."""
    if files.is_signed(context.key, "file", id, expires, signature):
        found = await session.get(File, id)
    elif "authorization" in request.headers:
        found = await files.owned(session, (await caller(request, session)).id, id)
    else:
        raise Problem(403, "Forbidden", "This link has expired, or is not whole: fetch its record again for a new one")
    if found is None:
        raise missing(f"The file {id}")
    try:
        blocks = await context.store.read(id)
    except FileNotFoundError:
        raise missing(f"The file {id}") from None
    shows = found.content_type in ("image/png", "image/jpeg", "image/webp", "text/plain")
    headers = {
        "Content-Length": str(found.size),
        "Content-Disposition": f"{'inline' if shows else 'attachment'}; filename*=UTF-8''{quote(found.name)}",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private, max-age=3600",
        "ETag": f'"{found.sha256}"',
    }
    return StreamingResponse(blocks, headers=headers, media_type=found.content_type)
