"""Pictures that are put together for a training: sent one by one or as a zip, looked at, captioned and mended."""

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.datastructures import UploadFile

from server import files
from server.api.context import OwnContext, Problem, Session, missing
from server.context import Context
from server.page import look
from server.page.session import Person
from server.page.view import Route, page
from server.records import DRAFT_DAYS, Account, Draft, File

routes = APIRouter(route_class=Route)
MOST_FILES = 500
CAPTION = "caption:"
"""Before a picture's name: the form's field of its caption."""


@dataclass(frozen=True)
class Folder:
    """A draft's files on this machine, for as long as they are looked at."""

    files: Path
    without: Path
    captions: Path
    work: Path
    """Empty."""


async def owned(session: AsyncSession, account: Account, id: str) -> Draft:
    draft = await session.scalar(select(Draft).where(Draft.id == id, Draft.account_id == account.id).with_for_update())
    if draft is None:
        raise missing("This set of pictures")
    return draft


async def _files(session: AsyncSession, draft: Draft) -> list[File]:
    mine = select(File).where(File.account_id == draft.account_id, File.details["draft"].astext == draft.id)
    return list((await session.scalars(mine.order_by(File.created_at))).all())


@contextlib.asynccontextmanager
async def unpacked(session: AsyncSession, context: Context, draft: Draft) -> AsyncIterator[Folder]:
    """Commits first: what is done with the files may take minutes, and holds neither the row nor a connection."""
    found = await _files(session, draft)
    await session.commit()
    with tempfile.TemporaryDirectory(prefix="draft-") as made:
        folder = Folder(*(Path(made) / name for name in ("files", "without.json", "captions.json", "work")))
        folder.files.mkdir()
        folder.work.mkdir()
        for file in found:
            name = file.name.lstrip(".") or file.id
            path = folder.files / name
            while path.exists():  # two pictures of one name, from two folders
                path = path.with_name(f"{path.stem}-2{path.suffix}")
            await context.store.copy_to(file.id, path)
        folder.without.write_text(json.dumps(draft.removed), encoding="utf-8")
        folder.captions.write_text(json.dumps(draft.captions), encoding="utf-8")
        yield folder


async def look_again(session: AsyncSession, context: Context, draft: Draft) -> None:
    async with unpacked(session, context, draft) as folder:
        draft.look = await look.look(folder.files, folder.without)


def keep_captions(draft: Draft, sent: Mapping[str, Any]) -> None:
    """Takes what the form holds: nothing that a person wrote is lost by another look."""
    written = {name.removeprefix(CAPTION): str(text)[:4000] for name, text in sent.items() if name.startswith(CAPTION)}
    draft.captions = {**draft.captions, **written}


def shown(request: Request, draft: Draft | None, error: str = "") -> Response:
    return page(request, "pictures.html", draft=draft, error=error, **of(draft))


def of(draft: Draft | None) -> dict[str, Any]:
    """What the templates show of a draft. What was removed is gone, though the look at the others is still going on."""
    seen: dict[str, Any] = draft.look if draft is not None else {}
    removed = draft.removed if draft is not None else []
    pictures = [picture for picture in seen.get("pictures", []) if picture["name"] not in removed]
    captions = draft.captions if draft is not None else {}
    return {
        "pictures": [{**picture, "caption": captions.get(picture["name"], picture["caption"])} for picture in pictures],
        "usable": sum(not picture["fault"] for picture in pictures),
        "faults": seen.get("faults", []),
        "warnings": [*seen.get("warnings", []), *seen.get("notes", [])],
    }


@routes.post("/drafts/{id}/files")
async def add(request: Request, id: str, person: Person, session: Session, context: OwnContext) -> Response:
    """One file: the page's script sends each by itself, so that one that is refused stops no other."""
    if not (len(id) == 26 and id.isalnum()):
        raise missing("This set of pictures")
    await session.commit()  # a slow upload holds no connection
    async with request.form(max_files=1, max_fields=1) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Problem(422, "No file", "Send one file, as 'file'")
        if not file.size:
            raise Problem(422, "An empty file", f"{(file.filename or '')[:100]} is empty")
        values = {"id": id, "account_id": person.id, "look": {}, "captions": {}, "removed": []}
        await session.execute(insert(Draft).values(**values).on_conflict_do_nothing())
        draft = await owned(session, person, id)
        if len(await _files(session, draft)) >= MOST_FILES:
            raise Problem(422, "Too many files", f"{MOST_FILES} files are allowed; send them as a zip")
        kept = await files.keep(
            session, context.store, person.id, file.file, name=file.filename or "picture", details={"draft": id}
        )
    kept.expires_at = datetime.now(UTC) + timedelta(days=DRAFT_DAYS)
    await session.commit()
    return Response(status_code=204)


@routes.post("/drafts/{id}/look")
async def look_at(request: Request, id: str, person: Person, session: Session, context: OwnContext) -> Response:
    draft = await owned(session, person, id)
    keep_captions(draft, await request.form())
    try:
        await look_again(session, context, draft)
    except look.Fault as fault:
        await session.commit()
        return shown(request, draft, str(fault))
    await session.commit()
    return shown(request, draft)


@routes.post("/drafts/{id}/remove")
async def remove(request: Request, id: str, person: Person, session: Session, context: OwnContext) -> Response:
    draft = await owned(session, person, id)
    form = await request.form()
    keep_captions(draft, form)
    name = str(form.get("remove", ""))
    draft.removed = [*draft.removed, name]
    await look_again(session, context, draft)
    await session.commit()
    return shown(request, draft)


@routes.post("/drafts/{id}/caption")
async def caption(request: Request, id: str, person: Person, session: Session, context: OwnContext) -> Response:
    """Has the captioner write where nothing is written yet."""
    draft = await owned(session, person, id)
    form = await request.form()
    keep_captions(draft, form)
    wanted = ("trigger_word", "lora_type", "mode", "autocaption_prefix", "autocaption_suffix")
    given = [f"{name}={form[name]}" for name in wanted if isinstance(form.get(name), str) and form[name]]
    error = ""
    async with unpacked(session, context, draft) as folder:
        try:
            written = await look.write_captions(folder.files, folder.without, folder.captions, folder.work, given)
        except look.Fault as fault:
            written, error = {}, str(fault)
    draft = await owned(session, person, id)
    draft.captions = {**draft.captions, **written}
    await session.commit()
    return shown(request, draft, error)


async def packed(session: AsyncSession, context: Context, draft: Draft) -> File:
    """The zip that is trained on, as an upload of the account. Raises look.Fault."""
    async with unpacked(session, context, draft) as folder:
        out = folder.work / "pictures.zip"
        await look.pack(folder.files, folder.without, folder.captions, out)
        kept = await files.keep(session, context.store, draft.account_id, out, name="pictures.zip")
    kept.expires_at = datetime.now(UTC) + timedelta(days=DRAFT_DAYS)
    return kept
