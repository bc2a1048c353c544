"""The form of a training."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server import accounts, catalog
from server.api import runs as api_runs
from server.api.context import OwnContext, OwnLinks, Problem, Session
from server.inputs import Refused
from server.page import drafts, form, look
from server.page.form import Field
from server.page.session import Person
from server.page.view import Route, page
from server.records import Account, Draft, Run

routes = APIRouter(route_class=Route)
TRAINER = f"{catalog.OWNER}/{catalog.TRAINER}"
RECENT = 20


async def trainer(session: AsyncSession, account: Account) -> catalog.Found:
    found = await catalog.find(session, account, TRAINER)
    assert found is not None
    return found


def _fields(found: catalog.Found) -> dict[str, Field]:
    fields = form.fields(found.version.openapi_schema, True)
    return {name: field for name, field in fields.items() if field.kind != "file"}


@routes.get("/train")
async def ask(request: Request, person: Person, session: Session, resume_from: str = "", draft: str = "") -> Response:
    """`draft` is a set of pictures that was begun: the page's script puts it into the address, for a reload."""
    values = {"resume_from": resume_from} if resume_from else {}
    begun = await session.scalar(select(Draft).where(Draft.id == draft, Draft.account_id == person.id))
    id = accounts.new_id() if begun is None else begun.id
    return await _shown(request, session, person, begun, id, values, {})


async def _shown(
    request: Request,
    session: AsyncSession,
    person: Account,
    draft: Draft | None,
    id: str,
    values: Any,
    errors: dict[str, str],
    status: int = 200,
) -> Response:
    fields = _fields(await trainer(session, person))
    common = [fields[name] for name in form.COMMON["trainer"] if name in fields]
    others = [field for field in fields.values() if field not in common]
    mine = select(Run).where(Run.account_id == person.id, Run.kind == "training")
    recent = (await session.scalars(mine.order_by(Run.created_at.desc()).limit(RECENT))).all()
    name = values.get("destination") or f"lora-{datetime.now(UTC):%m%d-%H%M}"
    return page(
        request,
        "train.html",
        status,
        id=id,
        draft=draft,
        common=common,
        others=others,
        values=values,
        errors=errors,
        open=any(field.name in errors or field.name in values for field in others),
        destination=name,
        recent=recent,
        error="",
        **drafts.of(draft),
    )


@routes.post("/train")
async def train(request: Request, person: Person, session: Session, context: OwnContext, links: OwnLinks) -> Response:
    sent = {name: str(value) for name, value in (await request.form(max_fields=3000)).items()}
    id, errors = sent.get("draft", ""), {}
    found = await trainer(session, person)
    fields = _fields(found)
    draft = await session.scalar(select(Draft).where(Draft.id == id, Draft.account_id == person.id).with_for_update())
    if draft is None:
        errors["input_images"] = "add pictures first"
    else:
        drafts.keep_captions(draft, sent)
        await session.commit()
        seen = drafts.of(draft)
        broken = [picture["name"] for picture in seen["pictures"] if picture["fault"]]
        if broken or seen["faults"]:
            errors["input_images"] = "remove what cannot be used: it is marked below"
        elif not seen["pictures"]:
            errors["input_images"] = "add pictures first"
    try:
        if not errors and draft is not None:
            values = form.parse(fields, sent)
            if sent.get("resume_from", "").strip() == "":
                values.pop("resume_from", None)
            zipped = await drafts.packed(session, context, draft)
            await session.commit()
            values["input_images"] = links.file(zipped.id)
            destination = f"{person.name}/{sent.get('destination', '').strip()}"
            tags = sent.get("tags", "").split(",")
            body = api_runs.NewTraining.model_validate(
                {"input": values, "destination": destination[:127], "tags": tags}
            )
            await api_runs.prepare_destination(session, person, body.destination)
            run = await api_runs.create_run(
                request, session, person, found, "training", body, destination=body.destination, source="web"
            )
            return RedirectResponse(f"/run/{run.id}", 303)
    except Refused as refused:
        errors = form.errors(refused.faults)
    except look.Fault as fault:
        errors["input_images"] = str(fault)
    except Problem as problem:
        field = "destination" if problem.title in ("Invalid name", "Forbidden") else "tags"
        errors[field if problem.title in ("Invalid name", "Forbidden", "Invalid tag") else "form"] = str(problem.detail)
    except ValueError:  # pydantic's, of the destination
        errors["destination"] = "give the new LoRA a name: lower-case letters, digits and -"
    await session.rollback()
    draft = await session.get(Draft, id, populate_existing=True)
    return await _shown(request, session, person, draft, id, sent, errors, 422)
