"""All that was drawn: by model, prompt, tag and time."""

from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from sqlalchemy import select

from server import pages, use
from server.api.context import OwnContext, Session
from server.api.usage import exported
from server.page import run as run_page
from server.page.session import Person
from server.page.view import Route, page
from server.records import Run

routes = APIRouter(route_class=Route)


@routes.get("/gallery")
async def show(
    request: Request,
    person: Person,
    session: Session,
    model: str = "",
    prompt: str = "",
    tag: str = "",
    after: str = "",
    before: str = "",
    cursor: str = "",
) -> Response:
    conditions = [Run.account_id == person.id, Run.kind == "prediction", Run.status == "succeeded"]
    conditions += [Run.cog == "generator", Run.data_removed.is_(False)]
    if model:
        conditions.append(Run.model == model)
    if prompt:
        conditions.append(Run.input["prompt"].astext.icontains(prompt, autoescape=True))
    if tag:
        conditions.append(Run.tags.contains([tag]))
    if (first := _day(after)) is not None:
        conditions.append(Run.created_at >= first)
    if (last := _day(before)) is not None:
        conditions.append(Run.created_at < last + timedelta(days=1))
    query = {"cursor": cursor} if cursor else {}
    found = await pages.read(session, Run, conditions, query, "/gallery", rows=24)
    wanted = {"model": model, "prompt": prompt, "tag": tag, "after": after, "before": before}
    asked = {name: value for name, value in wanted.items() if value}
    more = ""
    if found.next:
        more = f"{found.next}&{urlencode(asked)}"
    values: dict[str, Any] = {"runs": [run_page.of(run) for run in found.rows], "more": more, "wanted": wanted}
    if "hx-request" in request.headers and cursor:
        return page(request, "cards.html", **values)
    mine = select(Run.model).where(Run.account_id == person.id, Run.cog == "generator").distinct().order_by(Run.model)
    values["models"] = (await session.scalars(mine.limit(200))).all()
    values["tags"] = await use.tags(session, person.id)
    return page(request, "gallery.html", **values)


def _day(text: str) -> datetime | None:
    try:
        return datetime.combine(date.fromisoformat(text), time(), UTC)
    except ValueError:
        return None


@routes.get("/export")
async def export(person: Person, session: Session, context: OwnContext, tag: str = "") -> Response:
    return await exported(session, context, person, tag)
