"""Lists in pages of a hundred, newest first, that keep their place while rows are added and removed."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from server.records import Record

ROWS = 100
Row = TypeVar("Row", bound=Record)


class BadCursor(ValueError):
    """The query does not name a page."""


@dataclass(frozen=True)
class Page(Generic[Row]):
    rows: list[Row]
    previous: str | None
    """The address of the page of newer rows."""
    next: str | None


async def read(
    session: AsyncSession,
    kind: type[Row],
    conditions: Sequence[ColumnElement[bool]],
    query: Mapping[str, str],
    address: str,
    rows: int = ROWS,
) -> Page[Row]:
    """The page that the query's `cursor` names, the first without one. Raises BadCursor."""
    table: Any = kind  # each has created_at and id
    place = tuple_(table.created_at, table.id)
    backwards, at = _read(query.get("cursor"), table.id.type.python_type)
    chosen = select(kind).where(*conditions)
    for name, condition in (("created_after", table.created_at.__ge__), ("created_before", table.created_at.__lt__)):
        if name in query:
            chosen = chosen.where(condition(_moment(name, query[name])))
    if at is not None:
        chosen = chosen.where(place > at if backwards else place < at)
    order = (table.created_at, table.id) if backwards else (table.created_at.desc(), table.id.desc())
    found = list((await session.scalars(chosen.order_by(*order).limit(rows + 1))).all())
    more, found = len(found) > rows, found[:rows]
    if backwards:
        found.reverse()
    kept = {name: value for name, value in query.items() if name != "cursor"}

    def link(row: Any, mark: str) -> str:
        text = f"{mark}{row.created_at.isoformat()} {row.id}"
        return f"{address}?{urlencode({**kept, 'cursor': base64.urlsafe_b64encode(text.encode()).decode()})}"

    newer = (more if backwards else at is not None) and found
    older = (True if backwards else more) and found
    return Page(found, link(found[0], "p") if newer else None, link(found[-1], "n") if older else None)


def _read(cursor: str | None, key: type) -> tuple[bool, tuple[datetime, Any] | None]:
    if not cursor:
        return False, None
    try:
        text = base64.urlsafe_b64decode(cursor).decode()
        created, _, id = text[1:].partition(" ")
        return text[0] == "p", (datetime.fromisoformat(created), key(id))
    except (binascii.Error, UnicodeDecodeError, ValueError, IndexError):
        raise BadCursor("cursor: this is none of this server's; take the address in 'next' as it is") from None


def _moment(name: str, text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise BadCursor(f"{name}: must be a date and time such as 2026-01-31T12:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
