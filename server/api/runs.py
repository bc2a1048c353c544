"""Routes about trainings and predictions."""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from server import accounts, catalog, guardrails, inputs, objects, outside, pages, retention, runs
from server.api.context import Body, Caller, OwnContext, OwnLinks, Problem, Session, base_url, missing, of_request
from server.api.models import check_name
from server.catalog import Found
from server.context import Context
from server.files import Links
from server.records import FINAL, Account, File, Json, Model, Run, Use

routes = APIRouter()
EVENTS = ["start", "output", "logs", "completed"]
WAIT = 60.0
"""Seconds that a request may be held open, as at Replicate."""
POLL = 0.2
INLINE_BYTES = 32 * 2**20
"""Outputs up to this size in all are shown as data URIs where the address is not https: Replicate's clients make file
objects of https and data addresses only."""


class NewRun(Body):
    input: Json = Field(default_factory=dict)
    webhook: str | None = Field(None, max_length=2000)
    webhook_completed: str | None = Field(None, max_length=2000)
    """The older name of a webhook for the end alone."""
    webhook_events_filter: list[str] | None = None
    tags: list[str] | None = None
    """What it belongs to; a header Tags, separated by commas, says the same for clients that know no such field."""


class Change(Body):
    tags: list[str]


class NewTraining(NewRun):
    destination: str = Field(max_length=127, pattern="^[^/]+/[^/]+$")


class NewPrediction(NewRun):
    version: str | None = Field(None, max_length=200)
    stream: bool | None = None


@routes.post("/models/{owner}/{name}/versions/{id}/trainings", status_code=201)
async def train(
    request: Request, owner: str, name: str, id: str, body: NewTraining, caller: Caller, session: Session
) -> Any:
    found = await catalog.find(session, caller, f"{owner}/{name}:{id}")
    if found is None:
        raise missing(f"The version {owner}/{name}:{id}")
    if found.version.cog != "trainer":
        raise Problem(422, "Not a trainer", f"{owner}/{name} cannot be trained; {catalog.OWNER}/{catalog.TRAINER} can")
    await prepare_destination(session, caller, body.destination)
    run = await create_run(request, session, caller, found, "training", body, destination=body.destination)
    return await _answer(request, session, run)


async def prepare_destination(session: AsyncSession, caller: Account, destination: str) -> None:
    """Makes the destination where it does not exist: what Replicate asks its callers to do before."""
    owner, _, name = destination.partition("/")
    if owner != caller.name:
        raise Problem(403, "Forbidden", f"destination: this token publishes to {caller.name}/…, not to {owner[:80]}")
    if await catalog.model(session, caller, owner, check_name(name)) is None:
        await runs.new_model(session, caller.id, owner, name)


@routes.post("/predictions", status_code=201)
async def predict(request: Request, body: NewPrediction, caller: Caller, session: Session) -> Any:
    if not body.version:
        raise Problem(422, "Invalid request", "version: give a version's id, or owner/name")
    return await _predict(request, session, caller, body.version, body)


@routes.post("/models/{owner}/{name}/predictions", status_code=201)
@routes.post("/deployments/{owner}/{name}/predictions", status_code=201)
async def predict_by_name(
    request: Request, owner: str, name: str, body: NewPrediction, caller: Caller, session: Session
) -> Any:
    return await _predict(request, session, caller, f"{owner}/{name}", body)


async def _predict(
    request: Request, session: AsyncSession, caller: Account, reference: str, body: NewPrediction
) -> Any:
    found = await catalog.find(session, caller, reference)
    if found is None:
        raise missing(f"The model or version {reference[:200]}, or a version of it,")
    run = await create_run(request, session, caller, found, "prediction", body, called=reference.partition(":")[0])
    wait = _seconds_to_wait(request.headers.get("prefer", ""))
    if wait and run.status not in FINAL:
        await session.commit()  # a repeated request's is open still, and would hold its connection
        run = await _wait(of_request(request), run, wait)
        if run.status not in FINAL:
            run.status = "starting"  # the clients take any other word for an end
    return await _answer(request, session, run)


async def create_run(
    request: Request,
    session: AsyncSession,
    caller: Account,
    found: Found,
    kind: str,
    body: NewRun,
    *,
    destination: str | None = None,
    called: str = "",
    source: str = "api",
) -> Run:
    """Checks the input, writes the record and queues it. Raises Problem, and Refused for the input. `called` is the
    model's name as it was sent."""
    context, base, owner = of_request(request), base_url(request), caller.id
    digest = hashlib.sha256(f"{request.url.path} {body.model_dump_json()}".encode()).hexdigest()
    key = request.headers.get("idempotency-key", "").strip()[:255] or None
    if key and (before := await _same(session, owner, key, digest)):
        return before
    await _check_open_jobs(context, session, owner)
    webhook, events = _webhook(body, context)
    id, trains = accounts.new_id(), kind == "training" or called == catalog.ANSWERS_WITH_ID
    taken = await inputs.take(
        session,
        context.store,
        context.settings,
        caller,
        id,
        found.version,
        trains,
        body.input,
        (base, f"{request.url.scheme}://{request.url.netloc}"),
    )
    token, model = getattr(request.state, "token", None), f"{found.model.owner}/{found.model.name}"
    await _guard(context, session, owner, token, model, trains, taken.shown)
    if found.version.weights and not inputs.names_weights(found.version, taken):
        taken.weights["lora_weights"] = found.version.weights
    run = Run(
        id=id,
        kind=kind,
        account_id=caller.id,
        model=model,
        version=found.version.id,
        cog="trainer" if trains else "echo" if found.version.cog == "trainer" else "generator",
        destination=destination,
        input=taken.shown,
        secrets=taken.secrets,
        weights=taken.weights,
        status="starting",
        logs="".join(f"warning: this model has no input {name[:60]!r}: it was passed over\n" for name in taken.unknown),
        metrics={},
        webhook=webhook,
        webhook_events=events,
        base_url=base,
        created_at=datetime.now(UTC),
        deadline=_deadline(request.headers.get("cancel-after", "")),
        idempotency_key=key,
        body_digest=digest,
        source=source,
        tags=_tags(request, body),
        token=token,
    )
    return await _queued(session, run, found.model.id)


async def _check_open_jobs(context: Context, session: AsyncSession, owner: int) -> None:
    """Raises Problem where the account has as many runs waiting or running as it may."""
    if await runs.count_open(session, owner) >= context.settings.open_jobs:
        raise Problem(
            429,
            "Too many open jobs",
            f"{context.settings.open_jobs} of your trainings and predictions wait or run; try again when one has ended",
            {"Retry-After": "30"},
        )


async def _queued(session: AsyncSession, run: Run, model_id: int) -> Run:
    """The run, written down and in the queue; or the one that the same request made at the same time."""
    session.add(run)
    try:
        await session.flush()
    except IntegrityError:  # the same request, at the same time
        owner, key, digest = run.account_id, run.idempotency_key, run.body_digest
        await session.rollback()
        before = await _same(session, owner, key or "", digest)
        assert before is not None
        return before
    await session.execute(update(Model).where(Model.id == model_id).values(run_count=Model.run_count + 1))
    await runs.enqueue(session, run)
    await session.commit()
    return run


def _tags(request: Request, body: NewRun) -> list[str]:
    return check_tags(request.headers.get("tags", "").split(",") if body.tags is None else body.tags)


async def _guard(
    context: Context, session: AsyncSession, owner: int, token: str | None, model: str, trains: bool, values: Json
) -> None:
    try:
        await guardrails.check(session, context.settings.rules, owner, token, trains, values)
    except guardrails.Broken as broken:
        await guardrails.record(context.sessions, owner, token, model, broken)
        headers = {"Retry-After": "3600"} if broken.is_quota else None
        raise Problem(429 if broken.is_quota else 403, "Refused by a rule", str(broken), headers) from None


async def _same(session: AsyncSession, owner: int, key: str, digest: str) -> Run | None:
    run = await session.scalar(select(Run).where(Run.account_id == owner, Run.idempotency_key == key))
    if run is not None and run.body_digest != digest:
        raise Problem(422, "Idempotency-Key used before", "This key came before with another request; take a new one")
    return run


def _webhook(body: NewRun, context: Context) -> tuple[str | None, list[str]]:
    address = body.webhook or body.webhook_completed
    if address is None:
        return None, []
    try:
        outside.check(address, context.settings.allow_private)
    except ValueError as error:
        raise Problem(422, "Invalid request", f"webhook: {error}") from None
    events = EVENTS if body.webhook_events_filter is None else body.webhook_events_filter
    if wrong := [event for event in events if event not in EVENTS]:
        raise Problem(
            422, "Invalid request", f"webhook_events_filter: {wrong[0][:40]!r} is none of {', '.join(EVENTS)}"
        )
    return address, list(events) if body.webhook else ["completed"]


def _seconds_to_wait(prefer: str) -> float:
    """`wait` and `wait=5` of the Prefer header."""
    found = re.search(r"\bwait(?:=(\d{1,4}))?\b", prefer)
    return min(WAIT, float(found[1] or WAIT)) if found else 0


def _deadline(after: str) -> datetime | None:
    """The moment that Cancel-After names: 90, 30s, 5m, 1h30m."""
    found = re.fullmatch(r"(?:(\d{1,4})h)?(?:(\d{1,5})m)?(?:(\d{1,6})s?)?", after.strip())
    if not after.strip() or found is None:
        return None
    hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return datetime.now(UTC) + timedelta(hours=hours, minutes=minutes, seconds=seconds)


async def _wait(context: Context, run: Run, seconds: float) -> Run:
    until = time.monotonic() + seconds - 0.2
    while time.monotonic() < until:
        await asyncio.sleep(POLL)
        async with context.sessions() as session:
            found = await session.get(Run, run.id)
        if found is None or found.status in FINAL:
            return found or run
        run = found
    return run


async def _answer(request: Request, session: AsyncSession, run: Run) -> Json:
    context = of_request(request)
    links = context.links(base_url(request))
    return objects.run(run, links, await inline(context, session, run, links))


async def inline(context: Context, session: AsyncSession, run: Run, links: Links) -> dict[str, str]:
    """Data URIs of a prediction's output, by file, where a link would stay a plain text to the clients."""
    ids = objects.files_in(run.output)
    if run.kind != "prediction" or not ids or links.base.startswith("https:"):
        return {}
    found = (await session.scalars(select(File).where(File.id.in_(ids)))).all()
    if sum(file.size for file in found) > INLINE_BYTES:
        return {}
    uris = {}
    for file in found:
        data = b"".join([block async for block in await context.store.read(file.id)])
        uris[file.id] = f"data:{file.content_type};base64,{base64.b64encode(data).decode()}"
    return uris


@routes.get("/trainings")
@routes.get("/predictions")
async def listed(request: Request, caller: Caller, session: Session, links: OwnLinks) -> Any:
    kind = _kind(request)
    conditions = [Run.account_id == caller.id, Run.kind == kind]
    if tag := request.query_params.get("tag"):
        conditions.append(Run.tags.contains([tag]))
    page = await pages.read(session, Run, conditions, request.query_params, f"{links.base}/v1/{kind}s")
    return objects.page([objects.run(run, links) for run in page.rows], page.previous, page.next)


def _kind(request: Request) -> str:
    return "training" if "/trainings" in request.url.path else "prediction"


async def owned(request: Request, session: AsyncSession, caller: Account, id: str, lock: bool = False) -> Run:
    kind = _kind(request)
    chosen = select(Run).where(Run.id == id, Run.account_id == caller.id, Run.kind == kind)
    run = await session.scalar(chosen.with_for_update() if lock else chosen)
    if run is None:
        raise missing(f"The {kind} {id}")
    return run


@routes.get("/trainings/{id}")
@routes.get("/predictions/{id}")
async def get(request: Request, id: str, caller: Caller, session: Session) -> Any:
    return await _answer(request, session, await owned(request, session, caller, id))


@routes.patch("/trainings/{id}")
@routes.patch("/predictions/{id}")
async def change(request: Request, id: str, body: Change, caller: Caller, session: Session) -> Any:
    """Other tags; the report of use follows."""
    run = await owned(request, session, caller, id, lock=True)
    await tag(session, run, check_tags(body.tags))
    await session.commit()
    return await _answer(request, session, run)


async def tag(session: AsyncSession, run: Run, tags: list[str]) -> None:
    run.tags = tags
    await session.execute(update(Use).where(Use.run_id == run.id).values(tags=tags))


def check_tags(named: Sequence[str]) -> list[str]:
    """The tags, each once. Raises Problem."""
    tags = list(dict.fromkeys(tag.strip() for tag in named if tag.strip()))
    if wrong := [tag for tag in tags if not re.fullmatch(r"[\w][\w .:-]{0,62}", tag)]:
        raise Problem(
            422, "Invalid tag", f"tags: {wrong[0][:80]!r} is none; letters, digits, spaces and . : - _, 63 at most"
        )
    if len(tags) > 20:
        raise Problem(422, "Too many tags", f"tags: {len(tags)} are given, 20 are allowed")
    return tags


@routes.post("/trainings/{id}/cancel")
@routes.post("/predictions/{id}/cancel")
async def cancel(request: Request, id: str, caller: Caller, session: Session) -> Any:
    run = await owned(request, session, caller, id, lock=True)
    await runs.cancel(session, run)
    await session.commit()
    return await _answer(request, session, run)


@routes.delete("/trainings/{id}", status_code=204)
@routes.delete("/predictions/{id}", status_code=204)
async def remove(request: Request, id: str, caller: Caller, session: Session, context: OwnContext) -> Response:
    """Its pictures, captions, outputs and logs go with it; a version that it published stays."""
    run = await owned(request, session, caller, id, lock=True)
    if run.status not in FINAL:
        raise Problem(409, "Conflict", "It has not ended: cancel it first")
    gone = await retention.files_of(session, run)
    await session.delete(run)
    await retention.forget(session, context.store, gone)
    return Response(status_code=204)
