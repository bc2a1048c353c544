"""Who has signed in: a cookie that holds the token's digest, signed, and no token."""

import hmac
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import RedirectResponse

from server import accounts
from server.api.context import OwnContext, Problem, Session, of_request, spend
from server.page.view import Route, page
from server.records import Account

routes = APIRouter(route_class=Route)
COOKIE, DAYS = "session", 30


def seal(key: bytes, digest: str, until: int) -> str:
    signature = hmac.new(key, f"session:{digest}:{until}".encode(), "sha256").hexdigest()
    return f"{digest}.{until}.{signature}"


def unseal(key: bytes, cookie: str) -> str | None:
    """The digest of the token; None where the cookie is not this server's, or too old."""
    digest, _, rest = cookie.partition(".")
    until, _, _ = rest.partition(".")
    if not (until.isascii() and until.isdigit() and len(until) < 13) or int(until) < time.time():
        return None
    return digest if hmac.compare_digest(seal(key, digest, int(until)).encode(), cookie.encode()) else None


def check_origin(request: Request) -> None:
    """Refuses a form that another site has sent here (browsers say so; SameSite keeps the cookie from most of them)."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    public = of_request(request).settings.public_url
    ours = (f"{request.url.scheme}://{request.url.netloc}", public)
    if site == "same-origin" or (site is None and origin and origin in ours):
        return
    raise Problem(403, "Sent by another site", "This form did not come from this server's own page: open it again")


async def signed_in(request: Request, session: Session) -> Account:
    """The account of whoever has signed in; others are sent to sign in first."""
    if request.method != "GET":
        check_origin(request)
    digest = unseal(of_request(request).key, request.cookies.get(COOKIE, ""))
    account = None if digest is None else await accounts.of_token(session, digest)
    if account is None or digest is None:
        there = "/sign-in"
        if "hx-request" in request.headers:
            raise Problem(401, "Signed out", "Sign in again", {"HX-Redirect": there})
        raise Problem(303, "Signed out", "Sign in first", {"Location": there})
    session.expunge(account)  # it stays readable where a request's work is rolled back
    request.state.account, request.state.token = account, digest
    spend(request, digest)
    return account


Person = Annotated[Account, Depends(signed_in)]


@routes.get("/")
async def home() -> Response:
    return RedirectResponse("/train", 303)


@routes.get("/sign-in")
async def ask(request: Request) -> Response:
    return page(request, "sign-in.html", why="")


@routes.post("/sign-in")
async def sign_in(
    request: Request, session: Session, context: OwnContext, token: Annotated[str, Form(max_length=200)] = ""
) -> Response:
    check_origin(request)
    if await accounts.of_token(session, accounts.digest(token.strip())) is None:
        why = "This is no token of this server, or it has been revoked: script/serve token makes one"
        return page(request, "sign-in.html", 403, why=why)
    until = int(time.time()) + DAYS * 86400
    answer = RedirectResponse("/train", 303)
    answer.set_cookie(
        COOKIE,
        seal(context.key, accounts.digest(token.strip()), until),
        max_age=DAYS * 86400,
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https" or context.settings.public_url.startswith("https:"),
    )
    return answer


@routes.post("/sign-out")
async def sign_out(person: Person) -> Response:
    answer = RedirectResponse("/sign-in", 303)
    answer.delete_cookie(COOKIE)
    return answer
