"""What is deleted, and what is kept. It empties what the tests before it ran."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import replicate

from server import database, retention, settings, sweep
from server.context import Context
from server.files import Store
from tests.server.conftest import SKETCH, Served


def test_old_runs_lose_their_data_and_published_weights_stay(
    served: Served, http: httpx.Client, trained: replicate.training.Training, tmp_path: Path
) -> None:
    image = http.post("/files", files={"content": ("a.txt", b"no picture")}).json()
    body = {"input": {**SKETCH, "image": image["urls"]["get"]}}
    headers = {"Prefer": "wait"}
    failed = http.post("/models/local/flux-lora-generator/predictions", json=body, headers=headers).json()
    drawn = http.post("/models/you/trained/predictions", json={"input": SKETCH}, headers=headers).json()
    assert (failed["status"], drawn["status"]) == ("failed", "succeeded")
    stray, foreign = served.data / "files" / (26 * "a"), served.data / "files" / "backups" / "of-another.sql"
    stray.write_bytes(b"left by a crash")
    foreign.parent.mkdir()
    foreign.write_bytes(b"another program's, in the same bucket")

    async def expire() -> None:
        store = Store(f"file://{served.data}/files")
        url = served.database.replace("postgresql://", "postgresql+psycopg://")
        async with database.connected(url, 1) as sessions, sessions() as session:
            assert await retention.expire(session, store, 1e-9) > 0
            while await retention.expire(session, store, 1e-9):
                pass
            assert await retention.strays(session, store, 1) == 0, "not old enough"
            assert await retention.strays(session, store, 0) >= 1

    asyncio.run(expire())
    assert not stray.exists()
    assert foreign.exists()
    for run in (failed, drawn):
        shown = http.get(f"/predictions/{run['id']}").json()
        assert (shown["data_removed"], shown["input"], shown["output"], shown["logs"]) == (True, {}, None, "")
    assert http.get(f"/files/{image['id']}").status_code == 404
    assert http.get(f"/trainings/{trained.id}").json()["logs"] == ""
    again = http.post("/models/you/trained/predictions", json={"input": SKETCH}, headers=headers).json()
    assert again["output"] == drawn["output"], "the version still draws, and the same"


def test_a_run_takes_no_other_runs_picture_with_it(http: httpx.Client) -> None:
    headers = {"Prefer": "wait"}
    first = http.post("/models/local/flux-lora-generator/predictions", json={"input": SKETCH}, headers=headers).json()
    [picture] = http.get(f"/predictions/{first['id']}").json()["output"]
    link = http.get("/predictions").json()["results"][0]["output"][0]
    assert "/download" in link
    body = {"input": {**SKETCH, "image": link}}
    second = http.post("/models/local/flux-lora-generator/predictions", json=body, headers=headers).json()
    assert second["status"] == "succeeded", second["error"]
    assert http.delete(f"/predictions/{second['id']}").status_code == 204
    assert http.get(f"/predictions/{first['id']}").json()["output"] == [picture]
    assert httpx.get(link).status_code == 200


def test_an_upload_whose_time_is_over_waits_for_the_run_that_needs_it(http: httpx.Client, served: Served) -> None:
    files = [http.post("/files", files={"content": ("a.zip", b"none")}).json() for _ in range(2)]
    ids = [file["id"] for file in files]
    served.rows("UPDATE files SET expires_at = now() - interval '1 day' WHERE id = ANY(%s) RETURNING id", ids)
    [(run,)] = served.rows(
        "INSERT INTO runs (id, kind, account_id, model, version, cog, input, secrets, weights, metrics, webhook_events,"
        " base_url, body_digest) SELECT 'waiting', 'training', id, 'o/m', 'v', 'trainer',"
        " jsonb_build_object('input_images', jsonb_build_object('$file', %s::text)), '{}', '{}', '{}', '[]', '', ''"
        " FROM accounts WHERE name = 'you' RETURNING id",
        ids[0],
    )

    async def expire() -> None:
        url = served.database.replace("postgresql://", "postgresql+psycopg://")
        async with database.connected(url, 1) as sessions, sessions() as session:
            while await retention.expire(session, Store(f"file://{served.data}/files"), 0):
                pass

    asyncio.run(expire())
    served.rows("DELETE FROM runs WHERE id = %s RETURNING id", run)
    assert http.get(f"/files/{ids[1]}").status_code == 404, "though nothing else is ever deleted, by 0 days"
    assert http.get(f"/files/{ids[0]}").status_code == 200


def test_a_report_that_was_looked_at_is_kept_for_a_day(tmp_path: Path, served: Served) -> None:
    own = settings.read({"SERVER_DATA": str(tmp_path), "DATABASE_URL": served.database})
    own.reports.mkdir()
    old, new = own.reports / "old-report", own.reports / "new-report"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 90_000, time.time() - 90_000))

    async def tidy() -> None:
        async with database.connected(own.inside, 1) as sessions:
            await sweep.tidy(Context(own, sessions, Store(own.storage_url), b""))

    asyncio.run(tidy())
    assert [path.name for path in own.reports.iterdir()] == ["new-report"]


def test_a_worker_that_begins_deletes_the_states_of_runs_that_others_have_ended(
    served: Served, trained: replicate.training.Training
) -> None:
    state = served.data / "trainings" / "unfinished" / trained.id
    state.mkdir(parents=True)
    served.end_worker("trainings", signal.SIGTERM)
    served.begin_worker("trainings")
    deadline = time.monotonic() + 30
    while state.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
