"""The API by plain requests: what it refuses, what it hides from strangers, and where it answers."""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import psutil
import psycopg
import pytest
import replicate
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from server import database
from tests.server.conftest import QUICK, ROOT, SKETCH, Served

TRAINER = "/models/replicate/fast-flux-trainer/versions/" + 64 * "0" + "/trainings"
DRAW = "/models/local/flux-lora-generator/predictions"
ZIP = "data:application/zip;base64,UEsFBgAAAAAAAAAAAAAAAAAAAAAAAA=="


@pytest.mark.parametrize("prefix", ["", "/v1", "/v1/v1"])
def test_every_base_address_that_a_client_needs_is_answered(served: Served, prefix: str) -> None:
    headers = {"Authorization": f"Bearer {served.token}"}
    assert httpx.get(f"{served.url}{prefix}/account", headers=headers).json()["username"] == "you"
    assert httpx.get(f"{served.url}{prefix}/trainings", headers=headers).json()["results"] is not None


def test_curl_as_the_fast_trainers_users_call_it(http: httpx.Client) -> None:
    uploaded = http.post("/files", files={"content": ("pictures.zip", (ROOT / "examples/subject.zip").read_bytes())})
    body = {
        "destination": "you/curled",
        "input": {
            "input_images": uploaded.json()["urls"]["get"],
            "trigger_word": "TOK",
            "lora_type": "subject",
            **QUICK,
        },
    }
    made = http.post(TRAINER, json=body)
    assert made.status_code == 201
    run = made.json()
    assert run["status"] == "starting"
    deadline = time.monotonic() + 120
    while run["status"] in ("starting", "processing"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        run = http.get(f"/trainings/{run['id']}").json()
    assert run["status"] == "succeeded", run["error"]
    assert run["output"]["version"].startswith("you/curled:")
    assert run["metrics"]["total_time"] >= run["metrics"]["predict_time"] > 0


@pytest.mark.parametrize("token", ["r8_" + 40 * "0", "x"])
def test_without_a_good_token_nothing_is_told(served: Served, token: str) -> None:
    answer = httpx.get(f"{served.url}/v1/trainings", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 401
    assert "r8_0" not in answer.text


def test_tokens_are_stored_as_hashes_alone(served: Served) -> None:
    with psycopg.connect(served.database) as database:
        tables = database.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
        for (table,) in tables.fetchall():
            rows = database.execute(f'SELECT t::text FROM "{table}" t').fetchall()
            assert not any(served.token in row for (row,) in rows), table


def test_all_that_is_wrong_with_an_input_is_told_at_once(http: httpx.Client) -> None:
    inputs = {"training_steps": 6001, "lora_type": "person", "lora_rank": "big", "seed": -1, "trigger_word": ""}
    answer = http.post(TRAINER, json={"destination": "you/x", "input": inputs})
    assert answer.status_code == 422
    told = answer.json()
    assert told["title"] == "Input validation failed"
    assert {fault["field"] for fault in told["invalid_fields"]} == {
        f"input.{name}" for name in (*inputs, "input_images")
    }
    assert "- input.lora_type: must be one of subject, style" in told["detail"]
    assert http.get("/models/you/x").status_code == 404


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"input": {"input_images": ZIP}}, "destination"),
        ({"destination": "you", "input": {"input_images": ZIP}}, "destination"),
        ({"destination": "you/x", "input": {"input_images": "/etc/passwd"}}, "http or https"),
        ({"destination": "you/x", "input": {"input_images": "file:///etc/passwd"}}, "http or https"),
        ({"destination": "you/x", "input": {"input_images": ZIP, "resume_from": "/etc/passwd"}}, "must be a model"),
        ({"destination": "you/x", "input": {"input_images": ZIP, "resume_from": "a/../../etc"}}, "must be a model"),
        ({"destination": "you/x", "input": {"input_images": ZIP, "x": {"$file": "a"}}}, "$file"),
        ({"destination": "you/x", "input": {"input_images": ZIP}, "webhook": "ftp://x"}, "webhook"),
        (
            {
                "destination": "you/x",
                "input": {"input_images": ZIP},
                "webhook": "http://a",
                "webhook_events_filter": ["end"],
            },
            "end",
        ),
    ],
)
def test_a_bad_request_is_refused_and_says_why(http: httpx.Client, body: dict[str, object], word: str) -> None:
    answer = http.post(TRAINER, json=body)
    assert answer.status_code == 422
    assert word in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'{"input": {"prompt": "a\\u0000b"}}', "NUL"),
        (b'{"input": {"prompt": "a", "unknown": [{"a\\u0000": 1}]}}', "NUL"),
        (b'{"input": {"prompt": "\\ud800"}}', "surrogate"),
        (b'{"input": {"prompt": "a", "lora_scale": NaN}}', "NaN"),
    ],
)
def test_what_json_has_and_a_database_has_not_is_a_callers_mistake(http: httpx.Client, body: bytes, word: str) -> None:
    answer = http.post(DRAW, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert word in answer.json()["detail"]


def test_a_backslash_before_u0000_is_text_like_any_other(http: httpx.Client) -> None:
    made = http.post(DRAW, json={"input": {**SKETCH, "prompt": r"\u0000 \\u0000"}})
    assert made.json()["input"]["prompt"] == r"\u0000 \\u0000"


def test_an_address_that_no_database_holds_is_a_callers_mistake(http: httpx.Client) -> None:
    large = base64.urlsafe_b64encode(b"p2026-01-01 99999999999999999999").decode()
    for path in ("/trainings/%00", "/predictions?tag=%00", f"/models?cursor={large}"):
        answer = http.get(path)
        assert answer.status_code == 422, path
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_request_about_the_server_itself_is_no_fault_of_the_servers(served: Served) -> None:
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(12) in (b"HTTP/1.1 404", b"HTTP/1.1 405")


def test_a_strangers_destination_is_refused(http: httpx.Client) -> None:
    answer = http.post(TRAINER, json={"destination": "somebody/x", "input": {"input_images": ZIP}})
    assert answer.status_code == 403
    assert http.post("/models", json={"owner": "local", "name": "x", "visibility": "private"}).status_code == 403


def test_nothing_of_an_account_is_seen_by_another(
    client: replicate.Client, http: httpx.Client, stranger: httpx.Client, trained: replicate.training.Training
) -> None:
    prediction = client.predictions.create(version="you/trained", input=SKETCH, wait=True)
    file = http.post("/files", files={"content": ("a.txt", b"mine")}).json()
    version = trained.output["version"].partition(":")[2]
    output = re.search(r"/files/([a-z2-7]{26})", trained.output["weights"])[1]
    for method, path in [
        ("GET", f"/trainings/{trained.id}"),
        ("POST", f"/trainings/{trained.id}/cancel"),
        ("DELETE", f"/trainings/{trained.id}"),
        ("GET", f"/predictions/{prediction.id}"),
        ("POST", f"/predictions/{prediction.id}/cancel"),
        ("GET", f"/runs/{prediction.id}/stream"),
        ("GET", f"/files/{file['id']}"),
        ("DELETE", f"/files/{file['id']}"),
        ("GET", f"/files/{file['id']}/download"),
        ("GET", f"/files/{output}/download"),
        ("GET", "/models/you/trained"),
        ("PATCH", "/models/you/trained"),
        ("DELETE", "/models/you/trained"),
        ("GET", "/models/you/trained/versions"),
        ("GET", f"/models/you/trained/versions/{version}"),
        ("DELETE", f"/models/you/trained/versions/{version}"),
    ]:
        answer = stranger.request(method, path, json={} if method == "PATCH" else None)
        assert answer.status_code == 404, (method, path, answer.text)
        other = {"GET": http.get}.get(method)
        assert other is None or other(path).status_code == 200, path
    assert stranger.post("/predictions", json={"version": version, "input": SKETCH}).status_code == 404
    assert stranger.post("/models/you/trained/predictions", json={"input": SKETCH}).status_code == 404
    for inputs in (
        {**SKETCH, "image": file["urls"]["get"]},
        {**SKETCH, "image": file["urls"]["download"]},
        {**SKETCH, "lora_weights": trained.output["weights"]},
        {**SKETCH, "lora_weights": trained.id},
        {**SKETCH, "finetune_id": trained.id},
    ):
        answer = stranger.post(DRAW, json={"input": inputs})
        assert answer.status_code == 422, inputs
        assert "there is no file" in answer.text or "no finished training" in answer.text
    for noun in ("trainings", "predictions", "files"):
        assert stranger.get(f"/{noun}").json()["results"] == []
    assert {model["owner"] for model in stranger.get("/models").json()["results"]} == {"local"}
    assert stranger.get("/webhooks/default/secret").json() != http.get("/webhooks/default/secret").json()


def test_a_public_model_draws_for_others_and_is_changed_by_its_owner_alone(
    http: httpx.Client, stranger: httpx.Client, trained: replicate.training.Training
) -> None:
    assert http.patch("/models/you/trained", json={"visibility": "public"}).status_code == 200
    try:
        body = {"input": {**SKETCH, "extra_lora": "you/trained"}}
        drawn = stranger.post("/models/you/trained/predictions", json=body, headers={"Prefer": "wait"}).json()
        assert drawn["status"] == "succeeded", drawn["error"]
        assert stranger.delete("/models/you/trained").status_code == 403
        assert stranger.get(f"/trainings/{trained.id}").status_code == 404
    finally:
        assert http.patch("/models/you/trained", json={"visibility": "private"}).status_code == 200


def test_a_link_is_good_for_its_file_and_its_time_alone(served: Served, http: httpx.Client) -> None:
    file, other = (http.post("/files", files={"content": ("a.txt", text)}).json() for text in (b"one", b"two"))
    link = httpx.URL(file["urls"]["download"])
    answer = httpx.get(link)
    assert answer.text == "one"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(link.copy_set_param("expires", "99999999999")).status_code == 403
    assert httpx.get(link.copy_set_param("expires", "1")).status_code == 403
    assert httpx.get(link.copy_remove_param("signature")).status_code == 403
    assert httpx.get(str(link).replace(file["id"], other["id"])).status_code == 403


@pytest.mark.parametrize("kind", ["text/plain\r\nX-Theirs: 1", "日本/x", "x" * 200, "text"])
def test_a_content_type_that_is_none_is_passed_over(http: httpx.Client, kind: str) -> None:
    file = http.post("/files", files={"content": ("a.txt", b"one")}, data={"type": kind}).json()
    assert file["content_type"] == "text/plain"
    assert httpx.get(file["urls"]["download"]).text == "one"


def test_a_repeated_post_with_the_same_key_is_the_same_run(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "once"}
    made: list[str] = []

    def ask() -> None:
        made.append(http.post(DRAW, json={"input": SKETCH}, headers=headers).json()["id"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(made)) == 1
    other = http.post(DRAW, json={"input": {**SKETCH, "seed": 2}}, headers=headers)
    assert other.status_code == 422
    assert "Idempotency-Key" in other.json()["title"]


def test_a_repeated_post_stays_the_same_run_when_its_model_gets_a_newer_version(
    http: httpx.Client, served: Served, trained: replicate.training.Training
) -> None:
    headers, path = {"Idempotency-Key": "before the newer one"}, "/models/you/trained/predictions"
    first = http.post(path, json={"input": SKETCH}, headers=headers).json()["id"]
    newer = (
        "INSERT INTO versions (id, model_id, cog, cog_version, openapi_schema, weights, created_at) SELECT 'newer',"
        " model_id, cog, cog_version, openapi_schema, weights, now() + interval '1 s' FROM versions WHERE run_id = %s"
        " RETURNING id"
    )
    served.rows(newer, trained.id)
    again = http.post(path, json={"input": SKETCH}, headers=headers).json()
    served.rows("DELETE FROM versions WHERE id = 'newer' RETURNING id")
    assert again.get("id") == first, again


def test_a_destination_that_another_request_makes_at_the_same_time_is_taken(http: httpx.Client, served: Served) -> None:
    body = {"destination": "you/at-once", "input": {"input_images": ZIP}}
    answers: list[httpx.Response] = []
    with psycopg.connect(served.database) as other:
        other.execute(
            "INSERT INTO models (account_id, owner, name, visibility) SELECT id, name, 'at-once', 'private'"
            " FROM accounts WHERE name = 'you'"
        )
        asking = threading.Thread(target=lambda: answers.append(http.post(TRAINER, json=body)))
        asking.start()
        time.sleep(1)
        assert not answers, "it waits for the other"
    asking.join()
    assert answers[0].status_code == 201, answers[0].text
    http.post(f"/trainings/{answers[0].json()['id']}/cancel")


def test_waiting_in_vain_answers_starting(http: httpx.Client) -> None:
    """The clients take any other word for an end."""
    body = {"input": {**SKETCH, "num_inference_steps": 50, "num_outputs": 4}}
    answer = http.post(DRAW, json=body, headers={"Prefer": "wait=1"}).json()
    assert answer["status"] == "starting"
    assert http.post(f"/predictions/{answer['id']}/cancel").json()["status"] in ("canceled", "succeeded")


def test_a_run_ends_by_its_deadline(http: httpx.Client) -> None:
    zip = {"content": ("pictures.zip", (ROOT / "examples/subject.zip").read_bytes())}
    file = http.post("/files", files=zip).json()["urls"]["get"]
    body = {"input": {"input_images": file, **QUICK, "training_steps": 6000}, "destination": "you/late"}
    run = http.post(TRAINER, json=body, headers={"Cancel-After": "1s"}).json()
    assert run["deadline"] > run["created_at"]
    deadline = time.monotonic() + 20
    while run["status"] in ("starting", "processing"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        run = http.get(f"/trainings/{run['id']}").json()
    assert run["status"] == "canceled"


def test_secrets_are_shown_nowhere(served: Served, http: httpx.Client) -> None:
    body = {"input": {"input_images": ZIP, "hf_token": "hf_verysecret"}, "destination": "you/secret"}
    made = http.post(TRAINER, json=body)
    assert made.json()["input"]["hf_token"] == "[REDACTED]"
    assert "hf_verysecret" not in http.get(f"/trainings/{made.json()['id']}").text
    assert "hf_verysecret" not in served.log()
    url = served.database.replace("postgresql://", "postgresql+psycopg://")

    async def fail() -> None:
        async with database.connected(url, 1) as sessions, sessions() as session:
            await session.execute(text("SELECT CAST(:a AS int)"), {"a": "hf_verysecret\0"})

    with pytest.raises(SQLAlchemyError) as error:
        asyncio.run(fail())
    assert "hf_verysecret" not in str(error.value), "errors are logged whole"


def test_the_address_between_a_worker_and_cog_is_in_no_processs_arguments(http: httpx.Client, served: Served) -> None:
    assert http.post(DRAW, json={"input": SKETCH}, headers={"Prefer": "wait"}).json()["status"] == "succeeded"
    children = psutil.Process(served.workers["predictions"].pid).children(recursive=True)
    commands = [" ".join(child.cmdline()) for child in children]
    assert any("cog.server.http" in command for command in commands)
    assert not re.search(r"[0-9a-f]{32}", "\n".join(commands))


def test_an_input_that_the_model_does_not_have_is_named_in_the_log(http: httpx.Client) -> None:
    answer = http.post(DRAW, json={"input": {**SKETCH, "brightness": 3}}, headers={"Prefer": "wait"}).json()
    assert answer["status"] == "succeeded"
    assert "warning: this model has no input 'brightness'" in answer["logs"]


def test_what_a_run_said_does_not_pile_up_beside_its_record(http: httpx.Client, served: Served) -> None:
    first, second = (http.post(DRAW, json={"input": SKETCH}, headers={"Prefer": "wait"}).json()["id"] for _ in range(2))
    [log] = (served.data / "predictions" / "workers").glob("*/generator/cog.log")
    assert second in log.read_text()
    assert first not in log.read_text()


def test_nulls_are_as_good_as_left_out(http: httpx.Client) -> None:
    body = {"input": {**SKETCH, "image": None, "height": None, "lora_weights": None}}
    assert http.post(DRAW, json=body, headers={"Prefer": "wait"}).json()["status"] == "succeeded"


def test_lists_come_in_pages_that_can_be_walked_both_ways(http: httpx.Client, served: Served) -> None:
    token = f"r8_{40 * 'e'}"
    served.rows("INSERT INTO accounts (name, webhook_secret) VALUES ('pager', 'whsec_') RETURNING id")
    served.rows(
        "INSERT INTO tokens (digest, account_id, hint) SELECT %s, id, 'r8_eeee' FROM accounts WHERE name = 'pager'"
        " RETURNING digest",
        hashlib.sha256(token.encode()).hexdigest(),
    )
    with served.http(token) as pager:
        served.rows(
            "INSERT INTO models (account_id, owner, name, visibility) SELECT id, name, 'm' || number, 'private'"
            " FROM accounts, generate_series(1, 101) AS number WHERE name = 'pager' RETURNING id"
        )
        first = pager.get("/models").json()
        assert len(first["results"]) == 100
        assert first["previous"] is None
        second = pager.get(first["next"]).json()
        assert len(second["results"]) == 3, "one of 101 and the server's own two"
        assert second["next"] is None
        again = pager.get(second["previous"]).json()
        assert [model["name"] for model in again["results"]] == [model["name"] for model in first["results"]]
        answer = pager.get("/models?cursor=nonsense")
        assert answer.status_code == 400


def test_large_requests_are_refused_and_small_ones_counted(http: httpx.Client, served: Served) -> None:
    answer = http.post("/predictions", content=b"{" + 65 * 2**20 * b" ", headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    parts = (2**20 * b" " for _ in range(65))  # without a length that would be told before
    answer = http.post("/predictions", content=parts, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    measures = httpx.get(f"{served.url}/metrics").text
    assert 'server_requests_total{method="POST",noun="predictions",status="413"}' in measures
    assert 'server_jobs{kind="training",status="starting"}' in measures
    assert 'server_workers{hardware="CPU"} 2.0' in measures


@pytest.mark.parametrize("size", ["Content-Length: 60000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", ["/predictions", "/v1/models", "/sign-in"])
def test_of_a_stranger_no_large_request_is_read(served: Served, path: str, size: str) -> None:
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        asked = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer r8_{40 * '0'}\r\n{size}\r\n"
        connection.sendall(f"{asked}Content-Type: application/json\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 401", "though it has sent no more than this"


def test_a_training_is_deleted_with_its_pictures_and_logs(http: httpx.Client, served: Served) -> None:
    file = http.post("/files", files={"content": ("a.zip", b"no pictures")}).json()
    body = {"input": {"input_images": file["urls"]["get"]}, "destination": "you/gone"}
    made = http.post(TRAINER, json=body).json()
    deadline = time.monotonic() + 60
    while http.get(f"/trainings/{made['id']}").json()["status"] in ("starting", "processing"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert http.delete(f"/trainings/{made['id']}").status_code == 204
    assert http.get(f"/trainings/{made['id']}").status_code == 404
    assert http.get(f"/files/{file['id']}").status_code == 404
    assert not (served.data / "files" / file["id"]).exists()


def test_a_webhook_is_told_again_until_it_answers(http: httpx.Client) -> None:
    received: list[dict[str, str]] = []
    ended = threading.Event()

    class Inbox(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append({"id": self.headers["webhook-id"], "status": body["status"]})
            self.send_response(404 if len(received) == 1 else 200)  # it is being deployed
            self.end_headers()
            if len(received) == 2:
                ended.set()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Inbox) as inbox:
        threading.Thread(target=inbox.serve_forever, daemon=True).start()
        webhook = f"http://127.0.0.1:{inbox.server_address[1]}/hook"
        http.post(DRAW, json={"input": SKETCH, "webhook": webhook, "webhook_events_filter": ["completed"]})
        assert ended.wait(30)
        inbox.shutdown()
    assert received[0] == received[1]
    assert received[0]["status"] == "succeeded"
