"""A run as it happens, as server-sent events: logs, output, then done or error."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse, ServerSentEvent

from server import files, objects
from server.api.context import OwnContext, OwnLinks, Problem, Session, caller, missing
from server.api.runs import inline
from server.context import Context
from server.files import Links
from server.records import FINAL, Run

routes = APIRouter()
POLL = 0.25
"""Seconds between two looks at the record."""


@routes.get("/runs/{id}/stream")
async def stream(
    request: Request,
    id: str,
    session: Session,
    context: OwnContext,
    links: OwnLinks,
    expires: str = "",
    signature: str = "",
) -> EventSourceResponse:
    run = await session.get(Run, id)
    if not files.is_signed(context.key, "stream", id, expires, signature):
        if "authorization" not in request.headers:
            raise Problem(
                403, "Forbidden", "This link has expired, or is not whole: fetch its record again for a new one"
            )
        if run is not None and run.account_id != (await caller(request, session)).id:
            run = None
    if run is None:
        raise missing(f"The run {id}")
    return EventSourceResponse(_events(context, links, id), ping=15, headers={"Cache-Control": "no-store"})


async def _events(context: Context, links: Links, id: str) -> AsyncIterator[ServerSentEvent]:
    told, shown, number = "", 0, 0
    while True:
        async with context.sessions() as session:
            run = await session.get(Run, id)
            uris = {} if run is None else await inline(context, session, run, links)
        if run is None:
            return
        if not run.logs.startswith(told):
            told = ""  # begun again from the start
        outputs = [text for text in _texts(objects.with_links(run.output, links, uris))]
        events = [("logs", run.logs[len(told) :])] if len(run.logs) > len(told) else []
        events += [("output", text) for text in outputs[shown:]]
        told, shown = run.logs, len(outputs)
        if run.status in FINAL:
            failed = run.status == "failed"
            end = {"reason": "canceled"} if run.status == "canceled" else {}
            events.append(("error", json.dumps({"detail": run.error})) if failed else ("done", json.dumps(end)))
        for event, data in events:
            # The id comes first: Replicate's Python client passes over every event before it has seen one.
            yield ServerSentEvent(data, event=event, id=f"{id}:{number}")
            number += 1
        if run.status in FINAL:
            return
        await asyncio.sleep(POLL)


def _texts(output: object) -> Iterator[str]:
    if output is None:
        return
    if isinstance(output, list):
        for entry in output:
            yield from _texts(entry)
    else:
        yield output if isinstance(output, str) else json.dumps(output)
