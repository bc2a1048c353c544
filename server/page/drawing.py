"""The playground: a prompt, LoRAs and their scales, a picture and a mask to start from."""

import random
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.datastructures import FormData, UploadFile

from server import catalog, files, retention, schema
from server.api import runs as api_runs
from server.api.context import OwnContext, OwnLinks, Problem, Session
from server.context import Context
from server.files import Links
from server.inputs import Refused
from server.page import form
from server.page import run as run_page
from server.page.form import Field
from server.page.session import Person
from server.page.view import Route, page
from server.records import Account, Json, Model, Version

routes = APIRouter(route_class=Route)
GENERATOR = f"{catalog.OWNER}/{catalog.GENERATOR}"
APART = ("prompt", "image", "mask", "prompt_strength", "lora_weights", "lora_scale", "extra_lora", "extra_lora_scale")
"""Inputs that have a place of their own in the page."""
HIDDEN = ("guidance", "replicate_weights", "finetune_id", "finetune_strength", "go_fast", "include_metadata")
"""Other names of inputs that are shown, and what only programs need."""
PICTURES = ("image/png", "image/jpeg", "image/webp")
MOST_MODELS = 200


def _fields(document: Json) -> dict[str, Field]:
    return {name: field for name, field in form.fields(document, False).items() if name not in HIDDEN}


async def loras(session: AsyncSession, person: Account) -> list[str]:
    """Models that draw with a LoRA, the newest first."""
    chosen = (
        select(Model)
        .where(catalog.visible(person), Model.id.in_(select(Version.model_id).where(Version.weights.is_not(None))))
        .order_by(Model.created_at.desc())
        .limit(MOST_MODELS)
    )
    return [f"{model.owner}/{model.name}" for model in (await session.scalars(chosen)).all()]


@routes.get("/draw")
async def ask(request: Request, person: Person, session: Session, lora: str = "", again: str = "") -> Response:
    """`lora` is chosen already; `again` is a run whose inputs are filled in."""
    values: Json = {"lora_weights": lora}
    tags: list[str] = []
    if again:
        run = await run_page.owned(session, person, again)
        values = {name: value for name, value in run.input.items() if not isinstance(value, dict)}
        if run.model != GENERATOR and "lora_weights" not in values:
            values["lora_weights"] = run.model
        tags = run.tags
        if seeds := run_page.of(run)["seeds"]:
            values.setdefault("seed", seeds[0])
    found = await catalog.find(session, person, GENERATOR)
    assert found is not None
    fields = _fields(found.version.openapi_schema)
    common = [fields[name] for name in form.COMMON["generator"] if name in fields]
    others = [field for name, field in fields.items() if field not in common and name not in APART]
    return page(
        request,
        "draw.html",
        fields=fields,
        common=common,
        others=others,
        values=values,
        errors={},
        loras=await loras(session, person),
        tags=", ".join(tags),
        again=again,
    )


@routes.post("/draw")
async def draw(request: Request, person: Person, session: Session, context: OwnContext, links: OwnLinks) -> Response:
    """Begins one drawing, or two with one seed where another scale is to be seen beside it; shows them as they are."""
    shown: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    async with request.form(max_files=2, max_fields=100) as sent:
        try:
            shown = [run_page.of(run) for run in await _draw(request, person, session, context, links, sent)]
        except Refused as refused:
            errors = form.errors(refused.faults)
        except Problem as problem:
            errors = {"tags" if problem.title == "Invalid tag" else "form": str(problem.detail)}
    names = [name for name in (*schema.inputs(schema.read().documents["generator"], False), "tags", "form")]
    names = [name for name in names if name not in HIDDEN]
    return page(request, "drawings.html", drawings=shown, errors=errors, names=names)


async def _draw(
    request: Request, person: Account, session: AsyncSession, context: Context, links: Links, sent: FormData
) -> list[Any]:
    texts = {name: value for name, value in sent.items() if isinstance(value, str)}
    reference = texts.get("lora_weights", "").strip()
    found = await catalog.find(session, person, reference) if reference.count("/") == 1 else None
    own = found is not None and found.version.weights is not None
    if found is None or not own:
        found = await catalog.find(session, person, GENERATOR)
        assert found is not None
    values = form.parse(_fields(found.version.openapi_schema), texts)
    values.setdefault("prompt", "")
    if not values["prompt"]:
        raise Refused([("prompt", "write what to draw")])
    if own:
        values.pop("lora_weights", None)
    for name in ("image", "mask"):
        if (address := await _picture(session, context, person, links, sent.get(name))) is not None:
            values[name] = address
    if "image" not in values and texts.get("again") and texts.get("keep_image"):
        before = await run_page.owned(session, person, texts["again"])
        for name in ("image", "mask"):
            if isinstance(before.input.get(name), dict):
                values.setdefault(name, links.file(before.input[name]["$file"]))
    if not values.get("image"):
        values.pop("mask", None)
        values.pop("prompt_strength", None)
    if not reference:
        values.pop("lora_scale", None)
    if not values.get("extra_lora"):
        values.pop("extra_lora_scale", None)
    await session.commit()
    tags = texts.get("tags", "").split(",")
    each = [values]
    if texts.get("beside") == "on" and reference:
        values.setdefault("seed", random.SystemRandom().randrange(2**32))
        each.append({**values, "lora_scale": form.parse_number(texts.get("beside_scale", ""))})
    called = f"{found.model.owner}/{found.model.name}"
    begun = []
    for input in each:
        body = api_runs.NewPrediction.model_validate({"input": input, "tags": tags})
        begun.append(
            await api_runs.create_run(request, session, person, found, "prediction", body, called=called, source="web")
        )
    return begun


async def _picture(session: AsyncSession, context: Context, person: Account, links: Links, file: Any) -> str | None:
    if not isinstance(file, UploadFile) or not file.size:
        return None
    kind = file.content_type or ""
    if kind not in PICTURES:
        raise Refused([("image", "must be a PNG, JPEG or WebP")])
    kept = await files.keep(
        session, context.store, person.id, file.file, name=file.filename or "picture", content_type=kind
    )
    kept.expires_at = retention.expiry(context.settings.retention_days)
    return links.file(kept.id)
