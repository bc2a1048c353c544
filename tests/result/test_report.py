"""The report's page: it stands by itself, runs nothing, and says what is asked of it."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from lora.result import preview, report
from lora.result.curve import Curve
from lora.result.preview import Preview
from lora.result.report import Lesson
from lora.result.verdict import Finding, Gains, Measured, Verdict

VERDICT = Verdict(
    findings=[Finding(name="learned", value=0.8, says="TOK is there.", advice="Draw with it.")],
    measured=Measured(trained=Gains(own=0.7, far=0.2, near=0.3, noun=0.2), unseen=None, own_then=None, drift=0.02),
)
CURVE = Curve(losses=[0.5, 0.4, 0.9, 0.3], checks=[(0, 0.6), (2, 0.5), (4, 0.45)])
RECORD: dict[str, Any] = {
    "run_id": "0123456789abcdef",
    "inputs": {"trigger_word": "<TOK>", "lora_type": "subject", "lora_rank": 16, "learning_rate": None, "seed": None},
    "decided": {
        **{"base": "toyflux", "plan": "no GPU", "learning_rate": 0.002, "seed": 7, "resolutions": [96], "licence": {}},
        "reasons": {"plan": "no GPU", "recipe": "the toy's", "seed": "chosen at random"},
    },
    "versions": {"torch": "2.13.0"},
}


def _colour(name: str, size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size, name)


def _lesson(name: str = "a.png", caption: str = "a <TOK> & a dog", note: str = "") -> Lesson:
    return Lesson(name=name, caption=caption, source="yours", note=note, thumbnail=preview.thumbnail(_colour("red")))


def _previews(*steps: int) -> list[Preview]:
    drawn = {step: [_colour("green"), _colour("yellow")] for step in steps}
    return preview.pair_up(["a <tok> here", "a red house"], [_colour("red"), _colour("blue")], drawn)


class _Page(HTMLParser):
    """The words, the tags and what a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.tags, self.links = "", [], []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.words += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_tells_whose_weights_they_are_where_an_earlier_step_was_better() -> None:
    curve = Curve(losses=[0.5, 0.4, 0.9, 0.3], checks=[(0, 0.6), (2, 0.3)], best=2)
    lessons = [_lesson(), dataclasses.replace(_lesson("b.png"), held_out=True)]
    page = report.page(RECORD, lessons, _previews(2), curve, VERDICT, [])
    for told in (
        "<dt>steps</dt><dd>2</dd>",
        "<dt>pictures</dt><dd>2</dd>",
        "The weights of step 2",
        "stroke-dasharray",
    ):
        assert told in page


def test_a_finding_without_a_word_has_no_colour() -> None:
    found = dataclasses.replace(VERDICT, findings=[dataclasses.replace(VERDICT.findings[0], worded=False)])
    for verdict, word in ((VERDICT, "clear"), (found, "")):
        assert f'<li class="{word}"><strong>Learned' in report.page(RECORD, [_lesson()], [], CURVE, verdict, [])
    page = report.page(RECORD, [_lesson()], [], CURVE, found, [])
    assert ".verdict li.clear { border-color: var(--good); }" in page
    assert re.search(r"\.verdict li \{[^}]*border-left: \.3rem solid var\(--line\)", page)


def test_what_was_decided_stands_with_its_reason_and_nothing_stands_as_python() -> None:
    page = report.page(RECORD, [_lesson()], _previews(2), CURVE, VERDICT, [])
    reasons, settings, _ = re.split(r"<h2>Made|<details>", page.split("<h2>Settings</h2>")[1])[:3]
    assert re.findall(r"<th>(.*?)</th><td>(.*?)</td>", reasons, re.DOTALL) == [
        ("plan", "no GPU"),
        ("recipe", "the toy&#39;s"),
        ("seed", '7 <span class="soft">(chosen at random)</span>'),
    ]
    assert "<th>learning_<wbr>rate</th><td>0.002</td>" in settings
    assert "licence" not in settings
    assert "{" not in settings


def test_the_page_stands_by_itself() -> None:
    text = report.page(RECORD, [_lesson()], _previews(2, 4), CURVE, VERDICT, ["few pictures"])
    page = _Page(text)
    assert page.links
    assert all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_everything_that_is_asked_of_it() -> None:
    words = _Page(
        report.page(RECORD, [_lesson(note="the end was cut")], _previews(2, 4), CURVE, VERDICT, ["few pictures"])
    ).words
    for expected in (
        *("<TOK>", "A subject LoRA for toyflux", "a <TOK> & a dog", "caption yours: the end was cut"),
        *("without", "with", "step 2", "a red house", "few pictures", "0.4500 at the end", "fixed noise"),
        *("learning_rate", "0.002", "no GPU", "torch", "2.13.0", "0123456789abcdef"),
    ):
        assert expected in words, expected


def test_a_close_up_is_told_as_one() -> None:
    lessons = [_lesson(), dataclasses.replace(_lesson(), close_up=True)]
    words = _Page(report.page(RECORD, lessons, _previews(4), CURVE, VERDICT, [])).words
    assert words.count("a.png, caption yours") == words.count("a.png, a close-up of its subject, caption yours") == 1


def test_the_page_tells_how_much_of_a_full_fine_tunings_change_the_lora_holds_and_else_nothing() -> None:
    layers = {f"transformer_blocks.{i}.attn.to_q": 0.9 - 0.01 * i for i in range(7)}
    told = {**RECORD, "held": {"share": 0.87, "layers": layers}}
    words = _Page(report.page(told, [_lesson()], _previews(4), CURVE, VERDICT, [])).words
    assert "The weights of 7 layers were trained, and this LoRA of rank 16 is made of their change" in words
    assert "87 %" in words
    shown = [name for name in layers if f"{name}\n" in words]
    assert shown == list(layers)[2:], "those of which least is held"
    assert words.index("84 %") < words.index("transformer_blocks.6.") or "84 %" in words
    without = _Page(report.page(RECORD, [_lesson()], _previews(4), CURVE, VERDICT, [])).words
    assert "holds of the change" not in without


def test_what_users_write_is_never_markup() -> None:
    lesson = _lesson(name='"><img src=x onerror=alert(1)>', caption="<script>alert(1)</script>")
    page = _Page(report.page(RECORD, [lesson], _previews(4), CURVE, VERDICT, ["<b>bold</b>"]))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert all(link.startswith("data:") for link in page.links)


def test_without_warnings_there_is_no_word_of_them() -> None:
    assert "Warnings" not in _Page(report.page(RECORD, [_lesson()], _previews(4), CURVE, VERDICT, [])).words


def test_the_files_are_the_same_every_time(tmp_path: Path) -> None:
    def once(name: str) -> dict[str, bytes]:
        members = report.write(tmp_path / name, json.dumps(RECORD), [_lesson()], _previews(4), CURVE, VERDICT, [])
        return {member: path.read_bytes() for member, path in members.items()}

    assert set(once("a")) == {"report/index.html", "report/loss.svg", "report/preview.webp"}
    assert once("b") == once("c")
