"""The page: what a person without a program does with the server, by forms.

It calls the same functions as the API, for the account of the token that was signed in with. `session` says who that
is; `form` makes the inputs' fields from a model's schema; `drafts` holds pictures before their training; each other
file has the routes of one noun. Templates are Jinja2's, and htmx replaces parts of them; there is no build step.
"""

from fastapi import APIRouter, FastAPI
from starlette.staticfiles import StaticFiles

from server.page import drafts, drawing, gallery, run, session, training, usage
from server.page.view import HERE, Route

routes = APIRouter(route_class=Route, include_in_schema=False)
for part in (session, training, drafts, run, drawing, gallery, usage):
    routes.include_router(part.routes)


def add(app: FastAPI) -> None:
    app.include_router(routes)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
