"""What a caller sends as input: checked, and its files, LoRAs and secrets put where they belong."""

import base64
import binascii
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server import catalog, files, outside, schema
from server.files import Store
from server.records import Account, File, Json, Version
from server.settings import Settings

HIDDEN = "[REDACTED]"
"""What Replicate shows in place of a secret."""


class Refused(ValueError):
    """An input with faults: pairs of a field's name and what is allowed."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(f"- input.{name}: {text}" for name, text in faults))


@dataclass
class Taken:
    """An input as its run's record holds it: see `records.Run`."""

    shown: Json = field(default_factory=dict)
    secrets: Json = field(default_factory=dict)
    weights: Json = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """Names that the model does not have: Replicate passes over them, and so do we, with a word in the log."""


async def take(
    session: AsyncSession,
    store: Store,
    settings: Settings,
    account: Account,
    run: str,
    version: Version,
    training: bool,
    values: Json,
    bases: Sequence[str],
) -> Taken:
    """Raises Refused with all that is wrong. `bases` are addresses of this server: a link below them is a file here."""
    properties = schema.inputs(version.openapi_schema, training)
    values = {name: value for name, value in values.items() if value is not None}
    known = {name: value for name, value in values.items() if name in properties}
    faults = schema.faults(version.openapi_schema, training, known)
    taken = Taken(unknown=[name for name in values if name not in properties])
    taken.shown = {name: value for name, value in values.items() if name in taken.unknown}
    if '"$file"' in json.dumps(values):  # the records' own word for a file
        faults.append(("input", "may not hold a $file"))
    if faults:
        raise Refused(faults)
    for name, value in known.items():
        own = properties[name]
        try:
            if schema.is_secret(own):
                taken.secrets[name], taken.shown[name] = value, HIDDEN
            elif schema.is_file(own):
                place = _Place(session, store, settings, account, run, name, bases)
                many = isinstance(value, list)
                found = [await place.file(entry) for entry in (value if many else [value])]
                taken.shown[name] = found if many else found[0]
            elif schema.is_weights(name, own):
                taken.shown[name] = value
                many = isinstance(value, list)
                weights = [
                    await _weights(session, settings, account, entry, bases) for entry in (value if many else [value])
                ]
                if any(weights):
                    taken.weights[name] = weights if many else weights[0]
            else:
                taken.shown[name] = value
        except ValueError as error:
            faults.append((name, str(error)))
    if faults:
        raise Refused(faults)
    return taken


@dataclass(frozen=True)
class _Place:
    """Where a file of an input goes."""

    session: AsyncSession
    store: Store
    settings: Settings
    account: Account
    run: str
    field: str
    bases: Sequence[str]

    async def file(self, value: str) -> Json | str:
        """The value as the record holds it: a file of this server, or an address to be fetched by the worker."""
        if value.startswith("data:"):
            kind, data = read_data(value)
            ending = kind.rpartition("/")[2].partition("+")[0]
            kept = await files.keep(
                self.session,
                self.store,
                self.account.id,
                io.BytesIO(data),
                name=f"{self.field}.{ending}",
                content_type=kind,
                run=self.run,
            )
            return {"$file": kept.id}
        if own := await _own_file(self.session, self.account, value, self.bases):
            return {"$file": own}
        outside.check(value, self.settings.allow_private)
        return value


async def _own_file(session: AsyncSession, account: Account, value: str, bases: Sequence[str]) -> str | None:
    id = files.named_by(value, bases)
    if id is None:
        return None
    if await files.owned(session, account.id, id) is None:
        raise ValueError(f"there is no file {id}")
    return id


async def _weights(
    session: AsyncSession, settings: Settings, account: Account, value: str, bases: Sequence[str]
) -> str | None:
    """The file of the LoRA that a text names on this server; None where it is to be found elsewhere."""
    value = value.strip()
    if re.match(r"https?://", value):
        if own := await _own_file(session, account, value, bases):
            return own
        outside.check(value, settings.allow_private)
        return None
    if re.match(r"[./~\\]", value) or ".." in value or "://" in value:
        raise ValueError(
            "a path of the server's machine is not accepted; upload the file, or name a model or an address"
        )
    if re.fullmatch(r"[a-z2-7]{26}", value):
        made = select(File.id).where(File.run_id == value, File.account_id == account.id, File.name.endswith(".tar"))
        weights = await session.scalar(made.order_by(File.created_at.desc()).limit(1))
        if weights is None:
            raise ValueError(f"{value} is no finished training of yours")
        return weights
    found = await catalog.find(session, account, value) if "/" in value else None
    if found is None:
        return None  # an id of the Hugging Face Hub
    if found.version.weights is None:
        raise ValueError(f"{value[:100]} has no LoRA")
    return found.version.weights


def read_data(uri: str) -> tuple[str, bytes]:
    """The media type and the bytes of a data URI. Raises ValueError."""
    head, comma, body = uri.removeprefix("data:").partition(",")
    if not comma:
        raise ValueError("this data URI has no data: there is no comma in it")
    kind = head.partition(";")[0] or "text/plain"
    if not head.endswith(";base64"):
        return kind, unquote_to_bytes(body)
    try:
        return kind, base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except binascii.Error:
        raise ValueError("this data URI is not base64") from None
