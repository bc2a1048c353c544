"""Tags, and what was used: how many trainings, pictures and GPU seconds, by token, model and tag."""

import asyncio
import csv
import io
import json
import zipfile
from datetime import datetime
from pathlib import Path

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from server import objects
from server.files import Store
from server.records import File, Json, Refusal, Run, Token, Use

MOST_ROWS = 1000
COLUMNS = ("file", "id", "kind", "status", "model", "version", "prompt", "seed", "tags", "loras", "input", "created_at")


async def tags(session: AsyncSession, account: int) -> list[tuple[str, int]]:
    """Each tag with the number of its runs, the most used first."""
    each = select(func.jsonb_array_elements_text(Run.tags).label("tag")).where(Run.account_id == account).subquery()
    counted = select(each.c.tag, func.count()).group_by(each.c.tag).order_by(func.count().desc(), each.c.tag)
    return [(tag, number) for tag, number in (await session.execute(counted.limit(MOST_ROWS))).all()]


async def report(session: AsyncSession, account: int, since: datetime | None, until: datetime | None) -> Json:
    """What ended from `since` on and before `until`, in all and by token, model and tag; and what rules refused."""
    mine: list[ColumnElement[bool]] = [Use.account_id == account]
    refused: list[ColumnElement[bool]] = [Refusal.account_id == account]
    for table, conditions in ((Use, mine), (Refusal, refused)):
        if since is not None:
            conditions.append(table.created_at >= since)
        if until is not None:
            conditions.append(table.created_at < until)
    hint = select(Token.hint).where(Token.digest == Use.token).scalar_subquery()
    tag = func.jsonb_array_elements_text(Use.tags)
    told: Json = {
        "total": (await _sums(session, None, mine))[0],
        "by_token": await _sums(session, hint, mine),
        "by_model": await _sums(session, Use.model, mine),
        "by_tag": await _sums(session, tag, mine),
    }
    rules = select(Refusal.rule, func.count(), func.max(Refusal.created_at)).where(*refused).group_by(Refusal.rule)
    told["refusals"] = [
        {"rule": rule, "count": count, "last_at": objects.moment(last)}
        for rule, count, last in (await session.execute(rules.order_by(func.count().desc()))).all()
    ]
    return told


async def _sums(
    session: AsyncSession,
    by: ColumnElement[str] | InstrumentedAttribute[str] | None,
    conditions: list[ColumnElement[bool]],
) -> list[Json]:
    chosen = (
        select(
            *([] if by is None else [by.label("name")]),
            Use.kind,
            Use.pictures,
            Use.gpu_seconds,
        )
        .where(*conditions)
        .subquery()
    )
    sums = select(
        func.count().filter(chosen.c.kind == "training"),
        func.count().filter(chosen.c.kind == "prediction"),
        func.coalesce(func.sum(chosen.c.pictures), 0),
        func.coalesce(func.sum(chosen.c.gpu_seconds), 0.0),
    )
    if by is not None:
        sums = sums.add_columns(chosen.c.name).group_by(chosen.c.name)
    rows = (await session.execute(sums.order_by(func.sum(chosen.c.gpu_seconds).desc()).limit(MOST_ROWS))).all()
    names = ("trainings", "predictions", "pictures", "gpu_seconds", "name")
    made = [dict(zip(names, row, strict=False)) for row in rows]
    return [{**row, "gpu_seconds": round(row["gpu_seconds"], 1)} for row in made]


async def export(session: AsyncSession, store: Store, account: int, tag: str, out: Path) -> int:
    """A zip of every picture and LoRA with the tag, and `runs.csv`, which says what made each. Returns how many files
    it holds besides the table."""
    chosen = select(Run).where(Run.account_id == account, Run.tags.contains([tag])).order_by(Run.created_at)
    table, number = io.StringIO(), 0
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    part = out.with_suffix(".part")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as packed:
        for run in (await session.scalars(chosen)).all():
            ids = objects.files_in(run.output)
            found = (await session.scalars(select(File).where(File.id.in_(ids), File.account_id == account))).all()
            loras = await _loras(session, run)
            for file in found:
                name = f"{run.kind}s/{run.id}-{ids.index(file.id)}{Path(file.name).suffix}"
                await store.copy_to(file.id, part)
                await asyncio.to_thread(packed.write, part, name)
                number += 1
                writer.writerow(_row(run, name, loras))
            if not found:
                writer.writerow(_row(run, "", loras))
        packed.writestr("runs.csv", table.getvalue())
    part.unlink(missing_ok=True)
    return number


async def _loras(session: AsyncSession, run: Run) -> Json:
    """The SHA-256 of each LoRA's file, by the input that named it; null where the file has been deleted."""
    kept = {name: ids if isinstance(ids, list) else [ids] for name, ids in run.weights.items()}
    wanted = [id for ids in kept.values() for id in ids if id]
    rows = (await session.execute(select(File.id, File.sha256).where(File.id.in_(wanted)))).all()
    hashes: dict[str, str] = {id: digest for id, digest in rows}
    return {name: [hashes.get(id) for id in ids] for name, ids in kept.items()}


def _row(run: Run, name: str, loras: Json) -> list[str]:
    words = {key: value for key, value in run.input.items() if key not in ("prompt", "seed")}
    values = [name, run.id, run.kind, run.status, run.destination or run.model, run.version]
    values += [str(run.input.get("prompt", "")), str(run.input.get("seed", "")), ", ".join(run.tags)]
    values += [json.dumps(loras), json.dumps(words, ensure_ascii=False), objects.moment(run.created_at) or ""]
    return [_safe(value) for value in values]


def _safe(value: str) -> str:
    """A spreadsheet takes a cell that begins so for a formula."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
