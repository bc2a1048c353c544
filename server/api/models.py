"""Routes about models and their versions."""

import re
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field
from sqlalchemy import or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from server import catalog, files, objects, pages
from server.api.context import Body, Caller, OwnContext, OwnLinks, Problem, Session, missing
from server.files import Links
from server.records import Account, Json, Model, Version

routes = APIRouter()
TEXTS = ("description", "github_url", "paper_url", "license_url", "cover_image_url")


class Texts(Body):
    """What a model says of itself."""

    description: str | None = Field(None, max_length=2000)
    github_url: str | None = Field(None, max_length=2000)
    paper_url: str | None = Field(None, max_length=2000)
    license_url: str | None = Field(None, max_length=2000)
    cover_image_url: str | None = Field(None, max_length=2000)
    readme: str | None = Field(None, max_length=100_000)


class NewModel(Texts):
    owner: str
    name: str = Field(max_length=63)
    visibility: str = Field("private", pattern="^(private|public)$")
    hardware: str = Field("", max_length=63)


class Change(Texts):
    visibility: str | None = Field(None, pattern="^(private|public)$")


def check_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
        raise Problem(422, "Invalid name", f"{name[:80]!r}: lower-case letters, digits, '-', '_' and '.', 63 at most")
    return name


async def visible(session: AsyncSession, caller: Account, owner: str, name: str) -> Model:
    found = await catalog.model(session, caller, owner, name)
    if found is None:
        raise missing(f"The model {owner}/{name}")
    return found


async def own(session: AsyncSession, caller: Account, owner: str, name: str) -> Model:
    found = await visible(session, caller, owner, name)
    if found.account_id != caller.id:
        raise Problem(403, "Forbidden", f"{owner}/{name} is not yours to change")
    return found


async def _shown(session: AsyncSession, model: Model, links: Links) -> Json:
    return objects.model(model, await catalog.newest(session, model), links)


@routes.post("/models", status_code=201)
async def create(body: NewModel, caller: Caller, session: Session, links: OwnLinks) -> Any:
    if body.owner != caller.name:
        raise Problem(403, "Forbidden", f"This token makes models of {caller.name}, not of {body.owner[:80]}")
    values = body.model_dump(include={"owner", "visibility", "hardware", *TEXTS})
    model = Model(account_id=caller.id, name=check_name(body.name), run_count=0, **values)
    session.add(model)
    try:
        await session.commit()
    except IntegrityError:
        raise Problem(409, "Conflict", f"A model {body.owner}/{body.name} exists already") from None
    await session.refresh(model)
    return objects.model(model, None, links)


@routes.get("/models")
async def listed(request: Request, caller: Caller, session: Session, links: OwnLinks) -> Any:
    page = await pages.read(session, Model, [catalog.visible(caller)], request.query_params, f"{links.base}/v1/models")
    return objects.page([await _shown(session, model, links) for model in page.rows], page.previous, page.next)


@routes.api_route("/models", methods=["QUERY"])
async def searched(request: Request, caller: Caller, session: Session, links: OwnLinks) -> Any:
    word = (await request.body()).decode("utf-8", "replace").strip()[:200]
    like = f"%{word.replace('%', '')}%"
    condition = or_(Model.name.ilike(like), Model.owner.ilike(like), Model.description.ilike(like))
    found = (await session.scalars(select(Model).where(catalog.visible(caller), condition).limit(50))).all()
    return objects.page([await _shown(session, model, links) for model in found], None, None)


@routes.get("/models/{owner}/{name}")
async def get(owner: str, name: str, caller: Caller, session: Session, links: OwnLinks) -> Any:
    return await _shown(session, await visible(session, caller, owner, name), links)


@routes.patch("/models/{owner}/{name}")
async def change(owner: str, name: str, body: Change, caller: Caller, session: Session, links: OwnLinks) -> Any:
    model = await own(session, caller, owner, name)
    for field, value in body.model_dump(exclude_unset=True, include={"visibility", *TEXTS}).items():
        if field != "visibility" or value is not None:
            setattr(model, field, value)
    await session.commit()
    return await _shown(session, model, links)


@routes.delete("/models/{owner}/{name}", status_code=204)
async def remove(owner: str, name: str, caller: Caller, session: Session, context: OwnContext) -> Response:
    """Its versions and their weights go with it."""
    model = await own(session, caller, owner, name)
    versions = (await session.scalars(select(Version).where(Version.model_id == model.id))).all()
    weights = [version.weights for version in versions if version.weights]
    await session.delete(model)
    await files.remove(session, context.store, weights)
    return Response(status_code=204)


@routes.get("/models/{owner}/{name}/versions")
async def versions(request: Request, owner: str, name: str, caller: Caller, session: Session, links: OwnLinks) -> Any:
    model = await visible(session, caller, owner, name)
    address = f"{links.base}/v1/models/{owner}/{name}/versions"
    page = await pages.read(session, Version, [Version.model_id == model.id], request.query_params, address)
    return objects.page([objects.version(version) for version in page.rows], page.previous, page.next)


@routes.get("/models/{owner}/{name}/versions/{id}")
async def version(owner: str, name: str, id: str, caller: Caller, session: Session) -> Any:
    found = await catalog.find(session, caller, f"{owner}/{name}:{id}")
    if found is None:
        raise missing(f"The version {owner}/{name}:{id}")
    return objects.version(found.version)


@routes.delete("/models/{owner}/{name}/versions/{id}", status_code=204)
async def remove_version(
    owner: str, name: str, id: str, caller: Caller, session: Session, context: OwnContext
) -> Response:
    model = await own(session, caller, owner, name)
    found = await session.scalar(select(Version).where(Version.id == id, Version.model_id == model.id))
    if found is None:
        raise missing(f"The version {owner}/{name}:{id}")
    weights = [found.weights] if found.weights else []
    await session.delete(found)
    await files.remove(session, context.store, weights)
    return Response(status_code=204)


@routes.get("/models/{owner}/{name}/examples")
async def examples(owner: str, name: str, caller: Caller, session: Session) -> Any:
    await visible(session, caller, owner, name)
    return objects.page([], None, None)


@routes.get("/models/{owner}/{name}/readme")
async def readme(owner: str, name: str, caller: Caller, session: Session) -> Response:
    model = await visible(session, caller, owner, name)
    return Response(model.description or "", media_type="text/plain; charset=utf-8")
