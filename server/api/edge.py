"""What happens to a request before any route: its address is made one of ours, its size is limited, it is counted."""

import time

from prometheus_client import Counter, Histogram
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import accounts
from server.api.context import Problem, of_request, problem
from server.settings import Settings

NOUNS = {
    *("account", "hardware", "models", "predictions", "trainings", "files", "webhooks", "deployments", "runs"),
    *("tags", "usage", "openapi.json"),
}
"""The first parts of the API's addresses: /trainings and /v1/v1/trainings mean /v1/trainings."""
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY"}
STRANGERS_BYTES = 2**20
"""What a request may have whose sender is not known yet."""
FORM_BYTES = 2**20
"""What a multipart request may have beyond its file."""
REQUESTS = Counter("server_requests", "Requests answered", ["method", "noun", "status"])
SECONDS = Histogram(
    "server_request_seconds", "Seconds to the first byte of an answer", ["noun"], buckets=(0.01, 0.05, 0.2, 1, 5, 60)
)


class Edge:
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = own_path(scope["path"])
        scope = {**scope, "path": path, "raw_path": path.encode()}
        parts = [*path.split("/"), ""]  # the path of OPTIONS may be a star alone
        part = parts[2] if path.startswith("/v1/") else parts[1]
        noun = part if part in NOUNS else "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        uploads = path == "/v1/files" or path.startswith("/drafts/")
        limit = self.settings.file_bytes + FORM_BYTES if uploads else self.settings.body_bytes
        advice = "" if uploads else "; upload large files to /v1/files first"
        too_large = f"A request here may have {limit // 2**20} MiB at most{advice}"
        begun, received = time.monotonic(), 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise Problem(413, "Too large", too_large)
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                SECONDS.labels(noun).observe(time.monotonic() - begun)
                REQUESTS.labels(method, noun, message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        announced = int(length) if length.isdigit() else 0
        # Uploads, and the page's forms but one, are read when it is known who sends them; JSON is read before.
        early = not uploads and (path.startswith("/v1/") or path == "/sign-in")
        large = announced > STRANGERS_BYTES or b"transfer-encoding" in headers
        if announced > limit:
            await problem(413, "Too large", too_large)(scope, receive, counted)
        elif early and large and not await is_known(Request(scope)):
            told = f"A request of more than {STRANGERS_BYTES // 2**20} MiB needs a token of this server"
            await problem(401, "Unauthenticated", told)(scope, receive, counted)
        else:
            await self.app(scope, limited, counted)


async def is_known(request: Request) -> bool:
    """Whether the request has a token of this server. True where the database is away: its route tells of that."""
    digest = accounts.digest(request.headers.get("authorization", "").partition(" ")[2].strip())
    try:
        async with of_request(request).sessions() as session:
            return await accounts.of_token(session, digest) is not None
    except SQLAlchemyError:
        return True


def own_path(path: str) -> str:
    """`/trainings/x`, `/v1/trainings/x` and `/v1/v1/trainings/x` as `/v1/trainings/x`; other paths as they are."""
    rest = path
    while rest.startswith("/v1/"):
        rest = rest[3:]
    return f"/v1{rest}" if rest.split("/")[1:2] and rest.split("/")[1] in NOUNS else path
