"""The models that are there from the start, the names under which people call them, and how a model is found."""

import hashlib
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from server import schema
from server.records import Account, Model, Version

OWNER = "local"
TRAINER, GENERATOR = "flux-lora-trainer", "flux-lora-generator"
ALIASES = {
    "replicate/fast-flux-trainer": TRAINER,
    "ostris/flux-dev-lora-trainer": TRAINER,
    "black-forest-labs/flux-pro-trainer": TRAINER,
    "black-forest-labs/flux-dev-lora": GENERATOR,
    "black-forest-labs/flux-dev": GENERATOR,
    "lucataco/flux-dev-lora": GENERATOR,
}
"""Names that scripts for Replicate send: any version id of theirs means the newest of ours."""
ANSWERS_WITH_ID = "black-forest-labs/flux-pro-trainer"
"""Trains by a prediction too, whose output is the finetune_id: here, the run's id."""
DESCRIPTIONS = {
    TRAINER: "Trains a FLUX LoRA on your pictures and publishes it to the destination.",
    GENERATOR: "Draws with FLUX, and with any LoRA.",
}


@dataclass(frozen=True)
class Found:
    """What a reference means."""

    model: Model
    version: Version


async def seed(session: AsyncSession) -> None:
    """Makes the server's own models, and a version of them where the checkout holds another than before."""
    cog = await schema.read_soon()
    for name, kind in ((TRAINER, "trainer"), (GENERATOR, "generator")):
        values = {"owner": OWNER, "name": name, "visibility": "public", "description": DESCRIPTIONS[name]}
        await session.execute(insert(Model).values(**values).on_conflict_do_nothing())
        model = await session.scalar(select(Model).where(Model.owner == OWNER, Model.name == name))
        assert model is not None
        version = insert(Version).values(
            id=hashlib.sha256(f"{name}:{cog.digest}".encode()).hexdigest(),
            model_id=model.id,
            cog=kind,
            cog_version=cog.version,
            openapi_schema=cog.documents[kind],
        )
        await session.execute(version.on_conflict_do_nothing())


def visible(account: Account) -> "or_":  # type: ignore[valid-type]
    """The condition of a model that this account may see."""
    return or_(Model.account_id == account.id, Model.visibility == "public")


async def model(session: AsyncSession, account: Account, owner: str, name: str) -> Model | None:
    """The model that an account may see under this name."""
    if f"{owner}/{name}" in ALIASES:
        owner, name = OWNER, ALIASES[f"{owner}/{name}"]
    return await session.scalar(select(Model).where(Model.owner == owner, Model.name == name, visible(account)))


async def newest(session: AsyncSession, model: Model) -> Version | None:
    order = (Version.created_at.desc(), Version.id)
    return await session.scalar(select(Version).where(Version.model_id == model.id).order_by(*order).limit(1))


async def find(session: AsyncSession, account: Account, reference: str) -> Found | None:
    """What `owner/name`, `owner/name:version` or a version's id alone means to this account."""
    path, _, id = reference.partition(":")
    if "/" in path:
        owner, _, name = path.partition("/")
        chosen = await model(session, account, owner, name)
        if chosen is None:
            return None
        if not id or path in ALIASES:
            version = await newest(session, chosen)
        else:
            version = await session.scalar(select(Version).where(Version.id == id, Version.model_id == chosen.id))
        return Found(chosen, version) if version else None
    rows = select(Model, Version).join(Version, Version.model_id == Model.id)
    row = (await session.execute(rows.where(Version.id == path, visible(account)))).first()
    return Found(row[0], row[1]) if row else None
