"""SIGKILL for everything, at random moments: no training is lost, and none is published twice.

FLUX_KILLS=8 script/test --all tests/server/test_kills.py is a short one; the seed of a run is told where it fails.
"""

import os
import random
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.conftest import Served, serve
from tests.server.test_faults import train

KILLS = int(os.environ.get("FLUX_KILLS", "50"))
TRAININGS = max(4, KILLS * 2 // 5)
SECONDS = 60 * 30


def victims(served: Served) -> dict[str, list[psutil.Process]]:
    """The processes that may be struck, by what they are. Not their keeper: that is `script/serve` itself."""
    found: dict[str, list[psutil.Process]] = {"api": [], "worker": [], "child": [], "postgres": []}
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or [])
        mine = (process.info["environ"] or {}).get("SERVER_DATA") == str(served.data)
        if str(served.data / "postgres") in line and " -D " in line:
            found["postgres"].append(process)
        elif mine and "leash.py" not in line and "server.serve api" in line:
            found["api"].append(process)
        elif mine and "leash.py" not in line and "server.serve worker" in line:
            found["worker"].append(process)
        elif "_run_worker" in line and str(served.data) in (process.info["environ"] or {}).get("TMPDIR", ""):
            found["child"].append(process)
    return found


@pytest.mark.slow
def test_whatever_is_killed_every_training_ends_with_one_version() -> None:
    seed = random.SystemRandom().randrange(1000)
    chance = random.Random(seed)
    with (
        tempfile.TemporaryDirectory(prefix="flux-kills-", ignore_cleanup_errors=True) as folder,
        serve(Path(folder), LOST_SECONDS="6", ATTEMPTS="100") as served,
        served.http() as http,
    ):
        ids = [train(http, f"you/lora-{number}") for number in range(TRAININGS)]
        struck: dict[str, int] = {}
        deadline = time.monotonic() + SECONDS
        while sum(struck.values()) < KILLS:
            time.sleep(chance.uniform(0.5, 8))
            kind = chance.choice(["api", "worker", "child", "postgres"])
            for process in victims(served)[kind]:
                process.kill()
                struck[kind] = struck.get(kind, 0) + 1
                break
            assert time.monotonic() < deadline, (seed, struck)
        open_ones = set(ids)
        while open_ones:
            assert time.monotonic() < deadline, (seed, struck, open_ones, served.log()[-3000:])
            time.sleep(1)
            for id in list(open_ones):
                try:
                    answer = http.get(f"/trainings/{id}")
                except httpx.HTTPError:
                    continue
                if answer.status_code == 200 and answer.json()["status"] not in ("starting", "processing"):
                    assert answer.json()["status"] == "succeeded", (seed, answer.json())
                    open_ones.remove(id)
        for number, id in enumerate(ids):
            run = http.get(f"/trainings/{id}").json()
            versions = http.get(f"/models/you/lora-{number}/versions").json()["results"]
            assert [f"you/lora-{number}:{version['id']}" for version in versions] == [run["output"]["version"]], seed
            assert httpx.get(run["output"]["weights"]).content[257:262] == b"ustar"
        assert served.rows("SELECT count(*) FROM versions WHERE run_id IS NOT NULL") == [(TRAININGS,)]
        attempts = served.rows("SELECT sum(attempts) FROM runs")[0][0]
        print(f"seed {seed}: struck {struck}, {TRAININGS} trainings in {attempts} attempts")
