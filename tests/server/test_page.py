"""The page's routes without a browser: who is let in, what a form holds, and what the service keeps count of."""

import asyncio
import io
import re
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import replicate

from server import accounts, database, guardrails
from server.guardrails import Broken, Rule
from server.page import drafts, form, session
from server.page.run import FINDING, curve
from server.records import Draft, Use
from tests.server.conftest import ROOT, SKETCH, Served

TRAINER = "/v1/models/local/flux-lora-trainer"
POSTS = ["/train", "/draw", "/sign-out", "/run/x/cancel", "/run/x/delete", "/run/x/tags", "/drafts/x/files"]


@pytest.fixture(scope="module")
def browser(served: Served) -> Iterator[httpx.Client]:
    """Signed in as `you`; sends what a browser sends of a form's origin."""
    with httpx.Client(base_url=served.url, headers={"Origin": served.url}, timeout=60) as client:
        assert client.post("/sign-in", data={"token": served.token}).status_code == 303
        yield client


@pytest.fixture(scope="module")
def drawing(browser: httpx.Client, client: replicate.Client) -> "replicate.prediction.Prediction":
    """A picture that was drawn with two tags."""
    with httpx.Client(base_url=str(browser.base_url), timeout=60) as api:
        made = api.post(
            "/v1/models/local/flux-lora-generator/predictions",
            headers={"Authorization": f"Bearer {client._api_token}", "Prefer": "wait"},
            json={"input": SKETCH | {"prompt": "a red house"}, "tags": ["winter", "leaflets", "winter"]},
        ).json()
    assert made["status"] == "succeeded", made
    assert made["tags"] == ["winter", "leaflets"]
    return client.predictions.get(made["id"])


@pytest.mark.parametrize("path", ["/train", "/draw", "/gallery", "/used", "/run/x", "/picture/x", "/export?tag=x"])
def test_without_signing_in_every_page_leads_to_the_form(served: Served, path: str) -> None:
    answer = httpx.get(served.url + path)
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")


def test_a_wrong_token_is_told_in_words(served: Served) -> None:
    answer = httpx.post(f"{served.url}/sign-in", data={"token": "r8_x"}, headers={"Origin": served.url})
    assert answer.status_code == 403
    assert "no token of this server" in answer.text
    assert "set-cookie" not in answer.headers


def test_the_cookie_is_for_the_server_alone_and_holds_no_token(served: Served) -> None:
    answer = httpx.post(f"{served.url}/sign-in", data={"token": served.token}, headers={"Origin": served.url})
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert served.token not in cookie


@pytest.mark.parametrize("change", [lambda c: c[:-1] + ("0" if c[-1] != "0" else "1"), lambda c: "x", lambda c: ""])
def test_a_cookie_that_was_made_elsewhere_lets_nobody_in(browser: httpx.Client, change: "object") -> None:
    forged = change(browser.cookies["session"])  # type: ignore[operator]
    assert httpx.get(f"{browser.base_url}/train", headers={"Cookie": f"session={forged}"}).status_code == 303


def test_a_sealed_cookie_opens_until_its_time() -> None:
    digest = 64 * "a"
    assert session.unseal(b"key", session.seal(b"key", digest, 2**39)) == digest
    assert session.unseal(b"other", session.seal(b"key", digest, 2**39)) is None
    assert session.unseal(b"key", session.seal(b"key", digest, 1)) is None


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Origin": ""}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_a_form_of_another_site_is_refused(browser: httpx.Client, path: str, headers: dict[str, str]) -> None:
    answer = browser.post(path, headers=headers)
    assert answer.status_code == 403
    assert "Sent by another site" in answer.text


def test_every_page_has_a_strict_policy(browser: httpx.Client) -> None:
    for path in ("/sign-in", "/train", "/draw", "/gallery", "/used", "/run/nothing"):
        answer = browser.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<script(?![^>]* src=)|\son\w+=|\sstyle=|https?://", answer.text), path


def test_a_trainings_form_is_made_from_the_schema(browser: httpx.Client, http: httpx.Client) -> None:
    schema = http.get("/models/local/flux-lora-trainer").json()["latest_version"]["openapi_schema"]
    own = schema["components"]["schemas"]["TrainingInput"]["properties"]
    page = browser.get("/train").text
    for name, field in own.items():
        wanted = not field.get("deprecated") and name != "input_images"
        assert (f'id="{name}"' in page) == wanted, name
    assert 'max="6000"' in page
    common, _, expert = page.partition("<details")
    assert 'id="training_steps"' in common
    assert 'id="layers_to_optimize_regex"' in expert


def test_fields_keep_the_schemas_order_and_a_form_says_only_what_was_changed(http: httpx.Client) -> None:
    schema = http.get("/models/local/flux-lora-trainer").json()["latest_version"]["openapi_schema"]
    fields = form.fields(schema, True)
    order = [schema["components"]["schemas"]["TrainingInput"]["properties"][name]["x-order"] for name in fields]
    assert order == sorted(order)
    on = {name: "on" for name, field in fields.items() if field.kind == "switch" and field.default}
    sent = {"training_steps": "12", "priority": "quality", "trigger_word": " TOK ", "seed": "x", **on}
    assert form.parse(fields, sent) == {"training_steps": 12, "trigger_word": "TOK", "seed": "x"}
    assert form.parse(fields, {}) == {name: False for name in on}


def test_pictures_are_looked_at_captioned_packed_and_refused_without_a_start(
    browser: httpx.Client, served: Served
) -> None:
    id = "pictures2345pictures2345ab"
    with zipfile.ZipFile(ROOT / "examples" / "subject.zip") as archive:
        one, two = archive.read("01.png"), archive.read("02.png")
    for name, data in (("a.png", one), ("b.png", two), ("<b>.png", one), ("broken.jpg", b"\xff\xd8\xff no")):
        assert browser.post(f"/drafts/{id}/files", files={"file": (name, data)}).status_code == 204
    seen = browser.post(f"/drafts/{id}/look", data={"caption:a.png": "[trigger] <sits>"}).text
    assert "1 cannot be used" in seen
    assert "data:image/webp;base64," in seen
    assert "look alike" in seen
    assert "[trigger] &lt;sits&gt;" in seen
    assert "<sits>" not in seen
    refused = browser.post("/train", data={"draft": id, "destination": "x", "training_steps": "7000"})
    assert refused.status_code == 422
    assert "remove what cannot be used" in refused.text
    for name in ("broken.jpg", "_b_.png"):
        seen = browser.post(f"/drafts/{id}/remove", data={"remove": name}).text
    assert "2 pictures" in seen
    refused = browser.post("/train", data={"draft": id, "destination": "Ä", "training_steps": "7000"})
    assert "Nothing was started" in refused.text
    assert "lower-case" in refused.text
    refused = browser.post("/train", data={"draft": id, "destination": "x", "training_steps": "7000"})
    assert "must be 6000 or less, not 7000" in refused.text
    begun = browser.post(
        "/train", data={"draft": id, "destination": "by-form", "training_steps": "2", "tags": "winter"}
    )
    assert begun.status_code == 303
    run = begun.headers["location"]
    assert browser.post(f"{run}/cancel").status_code == 303
    assert "canceled" in browser.get(run).text
    [(file,)] = served.rows("SELECT input->'input_images'->>'$file' FROM runs WHERE id = %s", run.rpartition("/")[2])
    with zipfile.ZipFile(io.BytesIO(browser.get(f"/picture/{file}").content)) as packed:
        assert sorted(packed.namelist()) == ["a.png", "a.png.txt", "b.png"]
        assert packed.read("a.png.txt") == b"[trigger] <sits>"
        assert packed.read("b.png") == two


@pytest.mark.slow
def test_the_captioner_is_asked_and_what_is_written_by_hand_stays(browser: httpx.Client) -> None:
    id = "captions2345captions2345ab"
    with zipfile.ZipFile(ROOT / "examples" / "subject.zip") as archive:
        for name in ("01.png", "02.png"):
            browser.post(f"/drafts/{id}/files", files={"file": (name, archive.read(name))})
    browser.post(f"/drafts/{id}/look")
    said = browser.post(f"/drafts/{id}/caption", data={"trigger_word": "TOK", "caption:01.png": "[trigger] sits"}).text
    assert "the captioning model" in said  # is not here
    assert "[trigger] sits" in said
    written = browser.post(f"/drafts/{id}/caption", data={"caption:02.png": "by hand"}).text
    assert 'class="error" role' not in written
    assert "2 with a caption" in written


def test_nothing_of_an_account_is_shown_to_another(
    served: Served, browser: httpx.Client, stranger: httpx.Client, drawing: "replicate.prediction.Prediction"
) -> None:
    picture = re.search(r'src="(/picture/\w+)"', browser.get(f"/run/{drawing.id}").text)
    assert picture
    assert browser.get(picture[1]).headers["content-type"] == "image/png"
    with httpx.Client(base_url=served.url, headers={"Origin": served.url}) as other:
        other.post("/sign-in", data={"token": stranger.headers["authorization"].removeprefix("Bearer ")})
        for path in (picture[1], f"/run/{drawing.id}", f"/run/{drawing.id}/now", f"/draw?again={drawing.id}"):
            assert other.get(path).status_code == 404, path
        for path in (f"/run/{drawing.id}/delete", f"/run/{drawing.id}/tags"):
            assert other.post(path).status_code == 404, path
        assert drawing.id not in other.get("/gallery").text
        assert other.get("/export", params={"tag": "winter"}).status_code == 404


def test_a_drawing_is_shown_anew_when_something_is_new_about_it(
    browser: httpx.Client, drawing: "replicate.prediction.Prediction"
) -> None:
    """A screen reader reads out what is put in."""
    assert browser.get(f"/run/{drawing.id}/now?seen=succeeded").status_code == 204
    assert "/picture/" in browser.get(f"/run/{drawing.id}/now?seen=processing").text


def test_tags_are_listed_searched_changed_and_exported(
    http: httpx.Client, browser: httpx.Client, drawing: "replicate.prediction.Prediction"
) -> None:
    assert {"name": "leaflets", "runs": 1} in http.get("/tags").json()["results"]
    found = http.get("/predictions", params={"tag": "leaflets"}).json()["results"]
    assert [run["id"] for run in found] == [drawing.id]
    assert http.get("/predictions", params={"tag": "no such"}).json()["results"] == []
    assert http.post("/predictions", json={"version": "x", "tags": ["<"]}).status_code in (404, 422)
    assert http.patch(f"/predictions/{drawing.id}", json={"tags": ["<b>"]}).status_code == 422
    assert http.patch(f"/predictions/{drawing.id}", json={"tags": ["leaflets", "autumn"]}).json()["tags"][1] == "autumn"
    for query in ({"tag": "autumn"}, {"prompt": "RED h"}, {"model": "local/flux-lora-generator"}):
        assert drawing.id in browser.get("/gallery", params=query).text, query
    for query in ({"tag": "winter"}, {"prompt": "%"}, {"before": "2020-01-01"}):
        assert drawing.id not in browser.get("/gallery", params=query).text, query
    for address in ("/export?tag=autumn", None):
        answer = browser.get(address) if address else http.get("/tags/autumn/export")
        with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
            assert f"predictions/{drawing.id}-0.png" in packed.namelist()
            table = packed.read("runs.csv").decode()
        assert "a red house" in table
        assert '"autumn' in table or "autumn" in table


def test_what_was_used_is_told_by_token_model_and_tag_and_outlives_the_run(
    http: httpx.Client, browser: httpx.Client, served: Served
) -> None:
    made = http.post(
        "/models/local/flux-lora-generator/predictions",
        headers={"Prefer": "wait", "Tags": "counted, once"},
        json={"input": SKETCH | {"num_outputs": 2}},
    ).json()
    assert made["status"] == "succeeded", made
    assert http.delete(f"/predictions/{made['id']}").status_code == 204
    told = http.get("/usage").json()
    [row] = [row for row in told["by_tag"] if row["name"] == "counted"]
    assert (row["pictures"], row["predictions"], row["trainings"]) == (2, 1, 0)
    assert row["gpu_seconds"] > 0
    assert served.token[:7] in [row["name"] for row in told["by_token"]]
    assert "local/flux-lora-generator" in [row["name"] for row in told["by_model"]]
    assert http.get("/usage", params={"since": "2099-01-01"}).json()["total"]["pictures"] == 0
    assert "counted" in browser.get("/used").text


RULES = r"""
[[rule]]
name = "no weapons"
words = ["gun", "machine gun"]
[[rule]]
name = "no numbers"
pattern = '\d{4}'
[[rule]]
name = "checked"
safety_checker = true
[[rule]]
name = "three a day"
pictures_a_day = 3
"""


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"prompt": "a Gun."}, "no weapons"),
        ({"preview_prompts": "a dog\na machine gun"}, "no weapons"),
        ({"prompt": "call 1234"}, "no numbers"),
        ({"prompt": "a", "disable_safety_checker": True}, "checked"),
    ],
)
def test_a_prompt_that_breaks_a_rule_is_refused_by_its_name(
    tmp_path: Path, values: dict[str, object], rule: str
) -> None:
    (tmp_path / "rules.toml").write_text(RULES)
    with pytest.raises(Broken, match=rule):
        guardrails.said(guardrails.read(tmp_path / "rules.toml"), values)


def test_a_prompt_that_only_looks_like_it_passes(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(RULES)
    rules = guardrails.read(tmp_path / "rules.toml")
    guardrails.said(rules, {"prompt": "a gunner of 123", "lora_weights": "gun/1234", "disable_safety_checker": False})


def test_a_refusal_names_the_rule_is_recorded_and_leaves_no_run(http: httpx.Client, browser: httpx.Client) -> None:
    before = http.get("/predictions").json()["results"][:1]
    answer = http.post(
        "/models/local/flux-lora-generator/predictions", json={"input": {"prompt": "a Forbidden-By-Test"}}
    )
    assert answer.status_code == 403
    assert "'a word of the tests'" in answer.json()["detail"]
    assert http.get("/predictions").json()["results"][:1] == before
    [told] = [row for row in http.get("/usage").json()["refusals"] if row["rule"] == "a word of the tests"]
    assert told["count"] >= 1
    assert "a word of the tests" in browser.post("/draw", data={"prompt": "forbidden-by-test"}).text
    assert "refused" in browser.get("/used").text


def test_a_quota_counts_what_a_token_has_used_and_what_waits(served: Served) -> None:
    rules = [Rule("three", "pictures_a_day", limit=3), Rule("ten", "gpu_seconds_a_day", limit=10)]
    used = {"kind": "prediction", "model": "o/m", "tags": []}

    async def counted() -> list[str]:
        broken = []
        url = served.database.replace("postgresql://", "postgresql+psycopg://")
        async with database.connected(url, 1) as sessions, sessions() as session:
            account = await accounts.create(session, "counted")
            old = datetime.now(UTC) - timedelta(hours=25)
            more = {"account_id": account.id, "token": "t", "pictures": 2, "gpu_seconds": 4.0}
            session.add(Use(run_id="old", created_at=old, **used, **more))
            session.add(Use(run_id="new", **used, **more))
            await session.flush()
            for token, trains, number in (("t", False, 1), ("t", False, 2), ("t", True, 2), ("other", False, 3)):
                try:
                    await guardrails.check(session, rules, account.id, token, trains, {"num_outputs": number})
                except Broken as fault:
                    broken.append(f"{token} {number} {fault.rule.name}")
            session.add(Use(run_id="long", **used, **(more | {"pictures": 0, "gpu_seconds": 6.0})))
            await session.flush()
            try:
                await guardrails.check(session, rules, account.id, "t", True, {})
            except Broken as fault:
                broken.append(fault.rule.name)
            await session.rollback()
        return broken

    assert asyncio.run(counted()) == ["t 2 three", "ten"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x", "no TOML"),
        ("[[rules]]\nname = 'a'", "rule"),
        ("[[rule]]\nwords = ['a']", "needs a name"),
        ("[[rule]]\nname = 'a'", "exactly one"),
        ("[[rule]]\nname = 'a'\nwords = []", "list of words"),
        ("[[rule]]\nname = 'a'\nwords = ['x']\npattern = 'x'", "exactly one"),
        ("[[rule]]\nname = 'a'\npattern = '('", "no regular expression"),
        ("[[rule]]\nname = 'a'\npictures_a_day = 0", "1 or more"),
        ("[[rule]]\nname = 'a'\npictures_a_day = true", "exactly one"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_told_when_the_server_starts(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(ValueError, match=why):
        guardrails.read(tmp_path / "rules.toml")


def test_a_verdict_is_read_with_and_without_words() -> None:
    lines = ["Verdict: it worked", "Learned: weak (0.50). It is seen. Train on.", "Its own word: 0.25. It is: here."]
    found = [FINDING.fullmatch(line) for line in lines[1:]]
    assert [match.groups("") for match in found if match] == [
        ("Learned", "weak", "0.50", "It is seen. Train on."),
        ("Its own word", "", "0.25", "It is: here."),
    ]


def test_the_curve_falls_from_left_to_right() -> None:
    logs = " 10%|#  | 1/10, loss 0.9\n 50%|##  | 5/10, loss 0.5\n100%|##| 10/10, loss 0.4\n"
    assert curve(logs) == "M60.0,0.0 L300.0,96.0 L600.0,120.0"
    assert curve("loss 0.9") == ""


def test_what_was_removed_is_gone_though_the_look_at_the_others_is_still_going_on() -> None:
    pictures = [{"name": "a.png", "fault": "", "caption": ""}, {"name": "b.jpg", "fault": "broken", "caption": ""}]
    seen = drafts.of(Draft(look={"pictures": pictures}, captions={}, removed=["b.jpg"]))
    assert [picture["name"] for picture in seen["pictures"]] == ["a.png"]
    assert seen["usable"] == 1
