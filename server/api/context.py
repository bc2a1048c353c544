"""What every route shares: the database, the store, who calls, and how a refusal looks."""

import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from psycopg import OperationalError as DriverError
from pydantic import BaseModel, model_validator
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.exceptions import HTTPException

from server import accounts
from server.context import Context
from server.files import Links
from server.inputs import Refused
from server.pages import BadCursor
from server.records import Account

KNOWN_SECONDS = 2.0
NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""As JSON writes it."""


class Body(BaseModel):
    """A request's JSON, of which everything can be stored."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_stored(cls, sent: Any) -> Any:
        """Raises ValueError for what Python's JSON takes and PostgreSQL's does not: NaN, half a character, NUL."""
        try:
            text = json.dumps(sent, ensure_ascii=False, allow_nan=False)
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("half of a character (a lone surrogate) is no text") from None
        except ValueError:
            raise ValueError("NaN and Infinity are no JSON; leave them out") from None
        if NUL.search(text):
            raise ValueError("a text may not hold the character NUL")
        return sent


class Problem(HTTPException):
    """A refusal: told as RFC 7807 tells it."""

    def __init__(self, status: int, title: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.title = title


def missing(what: str) -> Problem:
    """404, whether it is not there or belongs to somebody else."""
    return Problem(404, "Not found", f"{what} does not exist, or belongs to another account")


def of_request(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


async def session(request: Request) -> AsyncIterator[AsyncSession]:
    sessions = of_request(request).sessions
    if request.method == "GET":  # reads alone: without a transaction, which saves two of its three ways to PostgreSQL
        sessions = request.app.state.reading
    async with sessions() as opened:
        yield opened


def base_url(request: Request) -> str:
    """This server's address as the caller knows it."""
    return of_request(request).settings.public_url or f"{request.url.scheme}://{request.url.netloc}"


def links(request: Request) -> Links:
    return of_request(request).links(base_url(request))


Session = Annotated[AsyncSession, Depends(session, scope="function")]
"""Its connection is free again before the answer is sent: a stream or a slow download would hold it to its end, and
twenty of them all that there are."""
OwnContext = Annotated[Context, Depends(of_request)]
OwnLinks = Annotated[Links, Depends(links)]


async def caller(request: Request, session: Session) -> Account:
    """The account of the request's token. Raises Problem: 401 without a good one, 429 for too many requests."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    account = None
    digest = accounts.digest(token.strip())
    if scheme.lower() in ("bearer", "token") and token:
        account = await _known(request.app.state.known, session, digest)
    if account is None:
        raise Problem(
            401,
            "Unauthenticated",
            "Give a token of this server in the Authorization header: 'Bearer r8_…'",
            {"WWW-Authenticate": "Bearer"},
        )
    request.state.token = digest
    spend(request, digest)
    return account


Caller = Annotated[Account, Depends(caller)]


async def _known(known: dict[str, tuple[Account, float]], session: AsyncSession, digest: str) -> Account | None:
    """The token's account. A token that is revoked may go on for KNOWN_SECONDS, a client that polls costs less."""
    account, until = known.get(digest, (None, 0.0))
    if time.monotonic() < until:
        return account
    account = await accounts.of_token(session, digest)
    if account is None:
        known.pop(digest, None)
    else:
        session.expunge(account)  # or a request that is rolled back would empty it for those after it
        known[digest] = (account, time.monotonic() + KNOWN_SECONDS)
    return account


def spend(request: Request, token: str) -> None:
    """Counts a request of the token with this digest. Raises Problem: 429."""
    _count(request.app.state.spent, of_request(request).settings.requests_a_minute, token)


def _count(spent: dict[str, tuple[float, float]], allowed: int, token: str) -> None:
    """One request of the token's; its allowance of a minute fills up again steadily.

    `spent` holds, by token, the requests that are left and when that was counted.
    """
    left, then = spent.get(token, (float(allowed), 0.0))
    now = time.monotonic()
    left = min(float(allowed), left + (now - then) * allowed / 60)
    if left < 1:
        seconds = max(1, round((1 - left) * 60 / allowed))
        raise Problem(
            429,
            "Too many requests",
            f"A token may make {allowed} requests a minute; try again in {seconds} s",
            {"Retry-After": str(seconds)},
        )
    spent[token] = (left - 1, now)


def problem(status: int, title: str, detail: str, headers: Any = None, **more: object) -> JSONResponse:
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, **more}
    return JSONResponse(body, status, headers=headers, media_type="application/problem+json")


def add_handlers(app: FastAPI) -> None:
    """Every error leaves as a problem document."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        title = error.title if isinstance(error, Problem) else str(error.detail)
        return problem(error.status_code, title, str(error.detail), error.headers, instance=request.url.path)

    async def wrong_input(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused)
        fields = [{"field": f"input.{name}", "description": text} for name, text in error.faults]
        return problem(422, "Input validation failed", str(error), invalid_fields=fields, instance=request.url.path)

    async def wrong_request(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        told = "\n".join(
            f"- {'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        return problem(422, "Invalid request", told, instance=request.url.path)

    async def wrong_page(request: Request, error: Exception) -> JSONResponse:
        return problem(400, "Invalid request", str(error), instance=request.url.path)

    async def no_value(request: Request, error: Exception) -> JSONResponse:
        told = "A text with the character NUL, or a number that is too large"
        return problem(422, "Invalid request", told, instance=request.url.path)

    async def broken(request: Request, error: Exception) -> JSONResponse:
        return problem(500, "Internal error", "The server met an error; its log says which", instance=request.url.path)

    async def away(request: Request, error: Exception) -> JSONResponse:
        return problem(503, "Database away", "The database does not answer; try again", {"Retry-After": "2"})

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Refused, wrong_input)
    app.add_exception_handler(RequestValidationError, wrong_request)
    app.add_exception_handler(BadCursor, wrong_page)
    app.add_exception_handler(DataError, no_value)
    app.add_exception_handler(Exception, broken)
    for kind in (OperationalError, InterfaceError, DriverError, PoolTimeout):
        app.add_exception_handler(kind, away)
