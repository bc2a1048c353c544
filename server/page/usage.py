"""What was used, and what the rules refused."""

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Request, Response

from server import use
from server.api.context import OwnContext, Session
from server.page.session import Person
from server.page.view import Route, page

routes = APIRouter(route_class=Route)
SPANS = {1: "24 hours", 7: "7 days", 30: "30 days", 365: "a year"}


@routes.get("/used")
async def show(request: Request, person: Person, session: Session, context: OwnContext, days: int = 30) -> Response:
    days = days if days in SPANS else 30
    told = await use.report(session, person.id, datetime.now(UTC) - timedelta(days=days), None)
    return page(request, "used.html", told=told, days=days, spans=SPANS, rules=context.settings.rules)
