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
                place = _Place(session, store, settings, account, run, name, bases)
                many = isinstance(value, list)
                pairs = [await place.weights(entry) for entry in (value if many else [value])]
                taken.shown[name] = [shown for shown, _ in pairs] if many else pairs[0][0]
                if any(file for _, file in pairs):
                    taken.weights[name] = [file for _, file in pairs] if many else pairs[0][1]
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
        if own := await self._own(value):
            return {"$file": own}
        outside.check(value, self.settings.allow_private)
        return value

    async def weights(self, value: str) -> tuple[Json | str, str | None]:
        """What the record shows of a LoRA's name, and the id of its file where it is on this server."""
        value = value.strip()
        if value.startswith("data:") or await self._own(value):
            shown = await self.file(value)
            assert isinstance(shown, dict)
            return shown, shown["$file"]
        if re.match(r"https?://", value):
            outside.check(value, self.settings.allow_private)
            return value, None
        if re.fullmatch(r"[a-z2-7]{26}", value):
            made = select(File.id).where(
                File.run_id == value, File.account_id == self.account.id, File.name.endswith(".tar")
            )
            file = await self.session.scalar(made.order_by(File.created_at.desc()).limit(1))
            if file is None:
                raise ValueError(f"{value} is no finished training of yours")
            return value, file
        found = await catalog.find(self.session, self.account, value)
        if found is not None:
            if found.version.weights is None:
                raise ValueError(f"{value[:100]} has no LoRA")
            return value, found.version.weights
        if not re.fullmatch(r"[\w.-]+/[\w./ @:-]+", value) or value.startswith((".", "-")) or ".." in value:
            raise ValueError(
                "must be a model of this server (owner/name), the id of a training, an address, or an id of the Hugging"
                " Face Hub; upload a file to name it"
            )
        return value, None  # the Hub's

    async def _own(self, value: str) -> str | None:
        id = files.named_by(value, self.bases)
        if id is not None and await files.owned(self.session, self.account.id, id) is None:
            raise ValueError(f"there is no file {id}")
        return id


def names_weights(version: Version, taken: Taken) -> bool:
    """Whether an input names another LoRA in place of the version's own."""
    properties = schema.inputs(version.openapi_schema, False)
    given = {name for name in taken.shown if name in properties and schema.is_weights(name, properties[name])}
    return any(not name.startswith("extra_") for name in given)


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
