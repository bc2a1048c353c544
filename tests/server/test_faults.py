"""Workers that die, are told to stop, or whose run is canceled: every run ends in a true state, once."""

import signal
import time

import httpx
import pytest

from tests.server.conftest import QUICK, ROOT, Served

TRAINER = "/models/ostris/flux-dev-lora-trainer/versions/" + 64 * "0" + "/trainings"
LONG = {**QUICK, "training_steps": 6000}


def train(http: httpx.Client, destination: str, **inputs: object) -> str:
    file = http.post("/files", files={"content": ("a.zip", (ROOT / "examples" / "subject.zip").read_bytes())}).json()
    body = {"destination": destination, "input": {"input_images": file["urls"]["get"], **QUICK, **inputs}}
    return str(http.post(TRAINER, json=body).json()["id"])


def until(http: httpx.Client, id: str, holds, seconds: float = 90) -> dict:
    deadline = time.monotonic() + seconds
    while True:
        run = http.get(f"/trainings/{id}").json()
        if holds(run):
            return run
        assert time.monotonic() < deadline, run
        time.sleep(0.1)


def attempts(served: Served, id: str) -> int:
    return int(served.rows("SELECT attempts FROM runs WHERE id = %s", id)[0][0])


def at_work(run: dict) -> bool:
    assert run["status"] in ("starting", "processing"), run
    return "| 1/6000" in run["logs"]


@pytest.mark.slow
def test_a_killed_worker_is_noticed_and_a_cancel_frees_the_gpu_within_two_seconds(
    served: Served, http: httpx.Client
) -> None:
    long = train(http, "you/long", **LONG)
    until(http, long, at_work)
    served.end_worker("trainings", signal.SIGKILL)
    killed = time.monotonic()
    until(http, long, lambda run: run["status"] == "starting" and run["logs"] == "", 30)
    assert time.monotonic() - killed < 30
    served.begin_worker("trainings")
    until(http, long, at_work)
    assert attempts(served, long) == 2
    short = train(http, "you/short")
    canceled = time.monotonic()
    assert http.post(f"/trainings/{long}/cancel").json()["status"] == "canceled"
    while attempts(served, short) == 0:
        assert time.monotonic() - canceled < 10
        time.sleep(0.02)
    free = time.monotonic() - canceled
    assert free < 2 + 1, "2 s, and one for whoever else has these cores"
    assert until(http, short, lambda run: run["status"] not in ("starting", "processing"))["status"] == "succeeded"
    assert http.get(f"/trainings/{long}").json()["status"] == "canceled"
    assert http.get("/models/you/long").json()["latest_version"] is None


@pytest.mark.slow
def test_a_training_goes_on_where_its_killed_worker_was(served: Served, http: httpx.Client) -> None:
    run = train(http, "you/unfinished", **{**QUICK, "training_steps": 400})
    until(http, run, lambda run: "state after step 40 saved" in run["logs"])
    [state] = (served.data / "trainings" / "unfinished").glob(f"{run}/*.state")
    served.end_worker("trainings", signal.SIGKILL)
    until(http, run, lambda run: run["status"] == "starting" and run["logs"] == "", 30)
    served.begin_worker("trainings")
    ended = until(http, run, lambda run: run["status"] not in ("starting", "processing"))
    assert ended["status"] == "succeeded", ended
    assert "an interrupted training of this request continues after step 40" in ended["logs"]
    assert "| 1/400" not in ended["logs"]
    deadline = time.monotonic() + 5
    while state.parent.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_hands_its_run_back(served: Served, http: httpx.Client) -> None:
    long = train(http, "you/handed", **LONG)
    until(http, long, at_work)
    served.end_worker("trainings", signal.SIGTERM)
    assert http.get(f"/trainings/{long}").json()["status"] == "starting"
    assert attempts(served, long) == 0, "it counts for nothing: nothing went wrong"
    served.begin_worker("trainings")
    until(http, long, at_work)
    http.post(f"/trainings/{long}/cancel")


@pytest.mark.slow
def test_a_run_that_kills_its_worker_is_given_up_after_three_attempts(served: Served, http: httpx.Client) -> None:
    long = train(http, "you/deadly", **LONG)
    for number in range(3):
        until(http, long, at_work)
        assert attempts(served, long) == number + 1
        served.end_worker("trainings", signal.SIGKILL)
        until(http, long, lambda run: run["logs"] == "" or run["status"] == "failed", 30)
        served.begin_worker("trainings")
    run = until(http, long, lambda run: run["status"] == "failed")
    assert run["error"] == "given up after 3 attempts: its worker stopped answering"
