"""How a page is answered: templates, headers, and errors in words."""

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from server.api.context import Problem

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def _ago(moment: datetime) -> str:
    """The page's script shows it in the reader's own time zone."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _minutes(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d}"
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


_templates.filters |= {"moment": _ago, "minutes": _minutes}


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """The template with its values; `account` is None where nobody is signed in."""
    values.setdefault("account", getattr(request.state, "account", None))
    html = _templates.get_template(template).render(path=request.url.path, **values)
    return HTMLResponse(html, status, headers=HEADERS)


class Route(APIRoute):
    """A route whose refusals are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        plain = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await plain(request)
            except HTTPException as error:
                title = error.title if isinstance(error, Problem) else "This did not work"
                fragment = "hx-request" in request.headers
                answer = page(
                    request,
                    "fault.html" if fragment else "error.html",
                    error.status_code,
                    title=title,
                    why=error.detail,
                )
                answer.headers.update(error.headers or {})
                return answer

        return handler
