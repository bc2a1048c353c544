"""The report: what it draws by default, the curve, and a page that stands by itself and runs nothing."""

import dataclasses
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageFont

from lora.request import parse_prompts
from lora.result import report
from lora.result.report import Curve, Lesson, Preview

SVG = "{http://www.w3.org/2000/svg}"
CURVE = Curve(losses=[0.5, 0.4, 0.9, 0.3], checks=[(0, 0.6), (2, 0.5), (4, 0.45)], held_out=False)
RECORD: dict[str, Any] = {
    "run_id": "0123456789abcdef",
    "inputs": {"trigger_word": "<TOK>", "lora_type": "subject", "lora_rank": 16, "learning_rate": None, "seed": None},
    "decided": {"base": "toyflux", "plan": "no GPU", "learning_rate": 0.002, "seed": 7, "resolutions": [96]},
    "versions": {"torch": "2.13.0"},
}


def _colour(name: str, size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size, name)


def _lesson(name: str = "a.png", caption: str = "a <TOK> & a dog", note: str = "") -> Lesson:
    return Lesson(name=name, caption=caption, source="yours", note=note, thumbnail=report.thumbnail(_colour("red")))


def _previews(*steps: int) -> list[Preview]:
    drawn = {step: [_colour("green"), _colour("yellow")] for step in steps}
    return report.pair_up(["a <tok> here", "a red house"], [_colour("red"), _colour("blue")], drawn)


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


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("native", [96, 1024])
@pytest.mark.parametrize("lora_type", ["subject", "style"])
@pytest.mark.parametrize("noun", [None, "dog"])
def test_by_default_three_prompts_call_it_up_and_one_does_not(native: int, lora_type: str, noun: str | None) -> None:
    prompts = report.preview_prompts("TOK", lora_type, noun, native)
    assert ["TOK" in prompt for prompt in prompts] == [True, True, True, False]
    if lora_type == "subject":
        assert all("TOK dog" in prompt for prompt in prompts[:3]) == (noun is not None)
    else:
        assert all(prompt.endswith("in the style of TOK") for prompt in prompts[:3])


def test_a_users_own_prompts_replace_the_others_but_not_the_one_that_must_stay() -> None:
    own = parse_prompts("  TOK on the moon \n\na cat with tok\n")
    assert own == ["TOK on the moon", "a cat with tok"]
    prompts = report.preview_prompts("TOK", "subject", None, 1024, own)
    assert prompts[:2] == own
    assert len(prompts) == 3
    assert "TOK" not in prompts[2]
    assert report.preview_prompts("TOK", "subject", None, 1024, ["a dog", "a TOK"]) == ["a dog", "a TOK"]


def test_too_many_prompts_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="preview_prompts: 9 prompts are more than 8"):
        parse_prompts("\n".join("abcdefghi"))


# ---------------------------------------------------------------- pictures


def test_the_sheet_shows_without_on_the_left_and_with_on_the_right() -> None:
    sheet = report.preview_sheet(_previews(4))
    half = sheet.width // 2
    for row, colours in enumerate((("red", "green"), ("blue", "yellow"))):
        y = (2 * row + 1) * sheet.height // 4
        for x, colour in zip((half // 2, half + half // 2), colours, strict=True):
            assert sheet.getpixel((x, y)) == _colour(colour, (1, 1)).getpixel((0, 0))
    assert sheet.width > 900


def test_words_that_the_sheets_font_cannot_write_are_left_to_the_page() -> None:
    font = ImageFont.load_default(size=16)
    assert report._has_all(font, "a photo of TOK, 100 %")
    assert not report._has_all(font, "a photo of 猫")
    assert not report._has_all(font, "фото TOK")


def test_a_wide_sheet_of_large_pictures_stays_a_picture() -> None:
    preview = Preview(prompt="x" * 900, without=_colour("red", (2048, 512)), drawn=((1, _colour("red", (2048, 512))),))
    assert report.preview_sheet([preview]).size == (2 * 512 + 36, 28 + 28 + 128 + 12)


def test_a_thumbnail_is_a_small_webp_and_is_never_enlarged() -> None:
    assert Image.open(io.BytesIO(report.thumbnail(_colour("red", (2000, 1000))))).size == (256, 128)
    assert Image.open(io.BytesIO(report.thumbnail(_colour("red", (20, 10))))).size == (20, 10)


def test_where_nothing_could_be_drawn_there_is_no_preview() -> None:
    some: dict[int, list[Image.Image]] = {3: [_colour("green")], 6: [_colour("blue")]}
    assert len(report.pair_up(["a"], [_colour("white")], some)) == 1
    assert report.pair_up(["a"], [], some) == []
    assert report.pair_up(["a"], [_colour("white")], {**some, 9: []}) == []


# ---------------------------------------------------------------- the curve


def test_smoothing_follows_a_constant_and_ends_near_the_last_of_a_step() -> None:
    assert report.smoothed([0.3] * 50) == pytest.approx([0.3] * 50)
    assert report.smoothed([1.0] * 100 + [0.0] * 100)[-1] == pytest.approx(0, abs=0.01)
    assert report.smoothed([]) == []


def _points(svg: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.attrib["points"].split())] for line in lines]


def test_the_curve_has_a_raw_and_a_smooth_line_and_a_dot_for_each_check() -> None:
    svg = report.loss_svg(CURVE)
    raw, smooth = _points(svg)
    assert len(raw) == len(smooth) == 4
    assert raw[2][1] < raw[0][1] < raw[1][1] < raw[3][1], "a higher loss stands higher, and y grows downwards"
    dots = [c for c in ElementTree.fromstring(svg).iter(f"{SVG}circle") if float(c.attrib["cy"]) > 40]
    assert len(dots) == 3
    assert "training pictures, fixed noise" in svg
    assert "held-out" in report.loss_svg(Curve(losses=[1.0], checks=[(0, 1.0)], held_out=True))


def test_a_long_training_draws_few_points_and_keeps_its_extremes() -> None:
    losses = [0.5] * 6000
    losses[3000], losses[4007] = 0.1, 0.8
    raw, _ = _points(report.loss_svg(Curve(losses=losses, checks=[], held_out=False)))
    assert len(raw) <= 800
    heights = [y for _, y in raw]
    assert min(heights) < statistics.mode(heights) < max(heights), "the one spike upwards and the one downwards"


@pytest.mark.parametrize("losses", [[], [0.0], [0.25, 0.25], [1e-9, 2e-9], [1.0, 1e6], [float(i) for i in range(999)]])
def test_any_losses_give_a_picture_inside_its_frame(losses: list[float]) -> None:
    svg = report.loss_svg(Curve(losses=losses, checks=[(0, 1.0)], held_out=False))
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for line in _points(svg):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in line)
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.attrib["x"]) <= width


# ---------------------------------------------------------------- the page


def test_the_page_tells_whose_weights_they_are_where_an_earlier_step_was_better() -> None:
    curve = Curve(losses=[0.5, 0.4, 0.9, 0.3], checks=[(0, 0.6), (2, 0.3)], held_out=True, best=2)
    lessons = [_lesson(), dataclasses.replace(_lesson("b.png"), held_out=True)]
    page = report.page(RECORD, lessons, _previews(2), curve, [])
    for told in (
        "<dt>steps</dt><dd>2</dd>",
        "<dt>pictures</dt><dd>1</dd>",
        "The weights of step 2",
        "stroke-dasharray",
    ):
        assert told in page


def test_the_page_stands_by_itself() -> None:
    text = report.page(RECORD, [_lesson()], _previews(2, 4), CURVE, ["few pictures"])
    page = _Page(text)
    assert page.links
    assert all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_everything_that_is_asked_of_it() -> None:
    words = _Page(
        report.page(RECORD, [_lesson(note="the end was cut")], _previews(2, 4), CURVE, ["few pictures"])
    ).words
    for expected in (
        *("<TOK>", "A subject LoRA for toyflux", "a <TOK> & a dog", "caption yours: the end was cut"),
        *("without", "with", "step 2", "a red house", "few pictures", "0.4500 at the end", "fixed noise"),
        *("learning_rate", "0.002", "no GPU", "torch", "2.13.0", "0123456789abcdef"),
    ):
        assert expected in words, expected


def test_what_users_write_is_never_markup() -> None:
    lesson = _lesson(name='"><img src=x onerror=alert(1)>', caption="<script>alert(1)</script>")
    page = _Page(report.page(RECORD, [lesson], _previews(4), CURVE, ["<b>bold</b>"]))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert all(link.startswith("data:") for link in page.links)


def test_without_warnings_there_is_no_word_of_them() -> None:
    assert "Warnings" not in _Page(report.page(RECORD, [_lesson()], _previews(4), CURVE, [])).words


def test_the_files_are_the_same_every_time(tmp_path: Path) -> None:
    def once(name: str) -> dict[str, bytes]:
        members = report.write(tmp_path / name, json.dumps(RECORD), [_lesson()], _previews(4), CURVE, [])
        return {member: path.read_bytes() for member, path in members.items()}

    assert set(once("a")) == {"report/index.html", "report/loss.svg", "report/preview.webp"}
    assert once("b") == once("c")
