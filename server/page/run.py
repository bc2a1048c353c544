"""A run's page: what it does now, and what came of it."""

import asyncio
import re
import tarfile
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server import files, objects, retention, runs
from server.api import runs as api_runs
from server.api.context import OwnContext, Problem, Session, missing
from server.context import Context
from server.page.session import Person
from server.page.view import Route, page
from server.records import FINAL, Account, File, Run

routes = APIRouter(route_class=Route)
TAIL = 60
"""Lines of the log."""
FINDING = re.compile(r"(\w[\w ]*): (?:(clear|weak|none) \()?(\d\.\d+)\)?\. (.*)")
"""A line of the verdict, which ends a training's log: what, in a word where one is due, from 0 to 1, in a sentence."""
MEMBERS = {"report": "report/index.html", "preview": "report/preview.webp"}
"""Of a training's tar."""
LOSS = re.compile(r"\| *(\d+)/(\d+), loss ([\d.]+)")
WIDTH, HEIGHT = 600, 120
KEPT_REPORTS = 100


async def owned(session: AsyncSession, person: Account, id: str, lock: bool = False) -> Run:
    chosen = select(Run).where(Run.id == id, Run.account_id == person.id)
    run = await session.scalar(chosen.with_for_update() if lock else chosen)
    if run is None:
        raise missing("This run")
    return run


def of(run: Run) -> dict[str, Any]:
    """What the templates show of a run."""
    lines = run.logs.splitlines()
    stages = [line.removeprefix("== ") for line in lines if line.startswith("== ")]
    starts = [number for number, line in enumerate(lines) if line.startswith("Verdict:")]
    verdict = lines[starts[-1] :] if starts else []
    found = [FINDING.fullmatch(line) for line in verdict[1:]]
    names = ("title", "word", "value", "says")
    findings = [dict(zip(names, match.groups(default=""), strict=True)) for match in found if match]
    return {
        "run": run,
        "final": run.status in FINAL,
        "stage": stages[-1] if stages else "waits for a worker" if run.status == "starting" else "begins",
        "progress": run.metrics.get("progress"),
        "left": run.metrics.get("seconds_left"),
        "loss": run.metrics.get("loss"),
        "curve": curve(run.logs),
        "tail": lines[-TAIL:],
        "warnings": [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")],
        "verdict": verdict[0] if verdict else "",
        "findings": findings,
        "pictures": objects.files_in(run.output) if run.kind == "prediction" else [],
        "seeds": re.findall(r"^drawing .* seed (\d+)$", run.logs, re.MULTILINE),
        "weights": objects.files_in(run.output) if run.kind == "training" else [],
    }


def curve(logs: str) -> str:
    """The loss as an SVG path of WIDTH x HEIGHT; empty with fewer than two points."""
    found = [(int(step) / max(1, int(steps)), float(loss)) for step, steps, loss in LOSS.findall(logs)]
    if len(found) < 2:
        return ""
    low, high = min(loss for _, loss in found), max(loss for _, loss in found)
    points = [(WIDTH * at, HEIGHT - HEIGHT * (loss - low) / ((high - low) or 1)) for at, loss in found]
    return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)


@routes.get("/run/{id}")
async def show(request: Request, id: str, person: Person, session: Session) -> Response:
    return page(request, "run.html", **of(await owned(session, person, id)))


@routes.get("/run/{id}/now")
async def now(request: Request, id: str, person: Person, session: Session, seen: str = "") -> Response:
    """The part that changes; nothing (204) while a drawing is as it was `seen`, for a screen reader reads out what is
    put in anew. When a training ends, the whole page is shown anew."""
    run = await owned(session, person, id)
    if run.kind == "prediction" and run.status == seen:
        return Response(status_code=204)
    answer = page(request, "now.html" if run.kind == "training" else "drawn.html", **of(run))
    if run.status in FINAL and run.kind == "training":
        answer.headers["HX-Refresh"] = "true"
    return answer


@routes.post("/run/{id}/cancel")
async def cancel(request: Request, id: str, person: Person, session: Session) -> Response:
    run = await owned(session, person, id, lock=True)
    await runs.cancel(session, run)
    await session.commit()
    return RedirectResponse(f"/run/{id}", 303)


@routes.post("/run/{id}/delete")
async def delete(request: Request, id: str, person: Person, session: Session, context: OwnContext) -> Response:
    run = await owned(session, person, id, lock=True)
    if run.status not in FINAL:
        raise Problem(409, "It has not ended", "Cancel it first")
    there = "/train" if run.kind == "training" else "/gallery"
    gone = await retention.files_of(session, run)
    await session.delete(run)
    await retention.forget(session, context.store, gone)
    return RedirectResponse(there, 303)


@routes.post("/run/{id}/tags")
async def tag(request: Request, id: str, person: Person, session: Session) -> Response:
    run = await owned(session, person, id, lock=True)
    tags = str((await request.form()).get("tags", "")).split(",")
    await api_runs.tag(session, run, api_runs.check_tags(tags))
    await session.commit()
    return RedirectResponse(f"/run/{id}", 303)


@routes.get("/picture/{id}")
async def picture(id: str, person: Person, session: Session, context: OwnContext, download: bool = False) -> Response:
    """A file of the account's, by the cookie: a page's links need not expire."""
    found = await files.owned(session, person.id, id)
    if found is None:
        raise missing("This file")
    shows = found.content_type in ("image/png", "image/jpeg", "image/webp") and not download
    headers = {
        "Content-Length": str(found.size),
        "Content-Disposition": f"{'inline' if shows else 'attachment'}; filename*=UTF-8''{quote(found.name)}",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private, max-age=86400, immutable",
    }
    try:
        blocks = await context.store.read(id)
    except FileNotFoundError:
        raise missing("This file") from None
    return StreamingResponse(blocks, headers=headers, media_type=found.content_type)


@routes.get("/run/{id}/{what}")
async def member(id: str, what: str, person: Person, session: Session, context: OwnContext) -> Response:
    """The report, or the previews, out of the training's tar."""
    run = await owned(session, person, id)
    ids = objects.files_in(run.output)
    file = await files.owned(session, person.id, ids[0]) if ids and run.kind == "training" else None
    if file is None or what not in MEMBERS:
        raise missing("This part of the run")
    path = context.settings.reports / f"{file.sha256}-{what}"
    if not path.is_file():
        await _extract(context, file, path)
    if not path.is_file():
        raise missing(f"The {what} of this training")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox allow-popups"
    kinds = {"report": "text/html; charset=utf-8", "preview": "image/webp"}
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, max-age=86400",
    }
    return FileResponse(path, media_type=kinds[what], headers=headers)


async def _extract(context: Context, file: File, path: Path) -> None:
    """Lays the report and the previews of a tar beside each other in a folder that holds the newest KEPT_REPORTS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        tar = Path(made) / "training.tar"
        await context.store.copy_to(file.id, tar)
        await asyncio.to_thread(_take_out, tar, path.parent, file.sha256)
    kept = sorted((p for p in path.parent.iterdir() if p.is_file()), key=lambda p: p.stat().st_mtime)
    for old in kept[: -2 * KEPT_REPORTS]:
        old.unlink(missing_ok=True)


def _take_out(tar: Path, folder: Path, called: str) -> None:
    with tarfile.open(tar) as opened:
        names = set(opened.getnames())
        for what, name in MEMBERS.items():
            source = opened.extractfile(name) if name in names else None
            if source is not None:
                part = tar.with_name(what)
                part.write_bytes(source.read())
                part.replace(folder / f"{called}-{what}")
