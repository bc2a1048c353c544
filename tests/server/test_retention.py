"""What is deleted, and what is kept. It empties what the tests before it ran."""

import asyncio
from pathlib import Path

import httpx
import replicate

from server import database, retention
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
    stray = served.data / "files" / (26 * "a")
    stray.write_bytes(b"left by a crash")

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
    for run in (failed, drawn):
        shown = http.get(f"/predictions/{run['id']}").json()
        assert (shown["data_removed"], shown["input"], shown["output"], shown["logs"]) == (True, {}, None, "")
    assert http.get(f"/files/{image['id']}").status_code == 404
    assert http.get(f"/trainings/{trained.id}").json()["logs"] == ""
    again = http.post("/models/you/trained/predictions", json={"input": SKETCH}, headers=headers).json()
    assert again["output"] == drawn["output"], "the version still draws, and the same"
