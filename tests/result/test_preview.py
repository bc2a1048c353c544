"""The previews: what is drawn by default, the sheet of them, and thumbnails."""

import io
from typing import Any

import pytest
from PIL import Image, ImageFont

from lora.request import parse_prompts
from lora.result import preview
from lora.result.preview import Preview
from lora.trigger import Subject


def _colour(name: str, size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size, name)


def _previews(*steps: int) -> list[Preview]:
    drawn = {step: [_colour("green"), _colour("yellow")] for step in steps}
    return preview.pair_up(["a <tok> here", "a red house"], [_colour("red"), _colour("blue")], drawn)


def _prompts(kind: str, noun: str | None, *settings: Any, **named: Any) -> list[str]:
    return preview.prompts([Subject("TOK", noun)], kind, *settings, **named)


@pytest.mark.parametrize("native", [96, 1024])
@pytest.mark.parametrize("lora_type", ["subject", "style"])
@pytest.mark.parametrize("noun", [None, "dog"])
def test_by_default_three_prompts_call_it_up_and_one_does_not(native: int, lora_type: str, noun: str | None) -> None:
    prompts = _prompts(lora_type, noun, native)
    assert ["TOK" in prompt for prompt in prompts] == [True, True, True, False]
    if lora_type == "subject":
        assert all("TOK dog" in prompt for prompt in prompts[:3]) == (noun is not None)
    else:
        assert all(prompt.endswith("in the style of TOK") for prompt in prompts[:3])


def test_a_mode_decides_what_the_previews_show() -> None:
    drawn = {kind: _prompts(kind, None, 1024) for kind in ("character", "product", "general", "style")}
    assert drawn["character"][0] == "a portrait photo of TOK, looking at the camera"
    assert drawn["character"][-1] == "a portrait photo of a person, looking at the camera"
    assert drawn["product"][-1] == "a product photo of a bottle on a white background, studio light"
    assert all(prompt.startswith("TOK, ") for prompt in drawn["general"][:3])
    assert all(prompt.endswith("in the style of TOK") for prompt in drawn["style"][:3])
    assert len({tuple(prompts) for prompts in drawn.values()}) == 4


def test_fewer_previews_are_drawn_where_that_is_asked_for_but_never_fewer_than_the_users() -> None:
    prompts = _prompts("subject", None, 1024, most=1)
    assert ["TOK" in prompt for prompt in prompts] == [True, False]
    assert len(_prompts("subject", None, 1024, ["TOK a", "TOK b"], most=1)) == 3


def test_a_users_own_prompts_replace_the_others_but_not_the_one_that_must_stay() -> None:
    own = parse_prompts("  TOK on the moon \n\na cat with tok\n")
    assert own == ["TOK on the moon", "a cat with tok"]
    prompts = _prompts("subject", None, 1024, own)
    assert prompts[:2] == own
    assert len(prompts) == 3
    assert "TOK" not in prompts[2]
    assert _prompts("subject", None, 1024, ["a dog", "a TOK"]) == ["a dog", "a TOK"]


@pytest.mark.parametrize("native", [96, 1024])
def test_several_subjects_are_drawn_alone_and_together(native: int) -> None:
    both = [Subject("ANNA", "woman"), Subject("BOB")]
    prompts = preview.prompts(both, "subject", native)
    assert [("ANNA woman" in prompt, "BOB" in prompt) for prompt in prompts] == [
        *((True, False), (False, True), (True, True), (False, False))
    ]
    assert len({prompt.partition("ANNA woman")[2] or prompt.partition("BOB")[2] for prompt in prompts[:2]}) == 2
    styles = preview.prompts(both, "style", native)
    assert [prompt.rpartition("in the style of ")[2] for prompt in styles[:2]] == ["ANNA", "BOB"]
    assert len(styles) == 3
    assert len(preview.prompts(both, "subject", native, most=1)) == 3


def test_too_many_prompts_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="preview_prompts: 9 prompts are more than 8"):
        parse_prompts("\n".join("abcdefghi"))


# ---------------------------------------------------------------- pictures


def test_the_sheet_shows_without_on_the_left_and_with_on_the_right() -> None:
    sheet = preview.sheet(_previews(4))
    half = sheet.width // 2
    for row, colours in enumerate((("red", "green"), ("blue", "yellow"))):
        y = (2 * row + 1) * sheet.height // 4
        for x, colour in zip((half // 2, half + half // 2), colours, strict=True):
            assert sheet.getpixel((x, y)) == _colour(colour, (1, 1)).getpixel((0, 0))
    assert sheet.width > 900


def test_words_that_the_sheets_font_cannot_write_are_left_to_the_page() -> None:
    font = ImageFont.load_default(size=16)
    assert preview._has_all(font, "a photo of TOK, 100 %")
    assert not preview._has_all(font, "a photo of 猫")
    assert not preview._has_all(font, "фото TOK")


def test_a_wide_sheet_of_large_pictures_stays_a_picture() -> None:
    wide = Preview(prompt="x" * 900, without=_colour("red", (2048, 512)), drawn=((1, _colour("red", (2048, 512))),))
    assert preview.sheet([wide]).size == (2 * 512 + 36, 28 + 28 + 128 + 12)


def test_a_thumbnail_is_a_small_webp_and_is_never_enlarged() -> None:
    assert Image.open(io.BytesIO(preview.thumbnail(_colour("red", (2000, 1000))))).size == (256, 128)
    assert Image.open(io.BytesIO(preview.thumbnail(_colour("red", (20, 10))))).size == (20, 10)


def test_where_nothing_could_be_drawn_there_is_no_preview() -> None:
    some: dict[int, list[Image.Image]] = {3: [_colour("green")], 6: [_colour("blue")]}
    assert len(preview.pair_up(["a"], [_colour("white")], some)) == 1
    assert preview.pair_up(["a"], [], some) == []
    assert preview.pair_up(["a"], [_colour("white")], {**some, 9: []}) == []
