"""A drawing's file and its metadata, read as other tools read them."""

from pathlib import Path

import pytest
from PIL import Image

from lora.result import drawing
from lora.result.drawing import Drawn

DRAWN = Drawn(
    prompt="a TOK, on a beach",
    steps=28,
    guidance=3.5,
    seed=4294967295,
    size=(1024, 768),
    model="black-forest-labs/FLUX.1-dev",
    loras=[("TOK", 0.9, "ab" * 32), ("film grain", -0.25, "cd" * 32)],
)


def _read(path: Path) -> str:
    """The text as A1111's web UI and Civitai look for it."""
    with Image.open(path) as picture:
        if picture.format == "PNG":
            return str(picture.info["parameters"])
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def test_the_text_is_that_of_a1111() -> None:
    assert drawing.parameters(DRAWN).splitlines() == [
        "a TOK, on a beach <lora:TOK:0.9> <lora:film grain:-0.25>",
        "Steps: 28, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 4294967295,"
        " Size: 1024x768, Model: black-forest-labs/FLUX.1-dev,"
        ' Lora hashes: "TOK: abababababab, film grain: cdcdcdcdcdcd"',
    ]


def test_what_the_model_has_not_is_not_written() -> None:
    plain = Drawn(prompt="a", steps=4, guidance=None, seed=1, size=(64, 64), model="x", loras=[], strength=0.7)
    text = drawing.parameters(plain)
    assert "Distilled" not in text
    assert "Lora" not in text
    assert text.endswith("Model: x, Denoising strength: 0.7")


@pytest.mark.parametrize("prompt", ["a TOK", "ein Bär, 富士山 🗻\nim Schnee", "x" * 100_000, "half a \ud83d sign", ""])
@pytest.mark.parametrize("kind", drawing.FORMATS)
def test_every_format_carries_any_prompt(kind: str, prompt: str, tmp_path: Path) -> None:
    text = drawing.parameters(Drawn(prompt=prompt, steps=4, guidance=3, seed=1, size=(64, 64), model="x", loras=[]))
    drawing.save(Image.new("RGB", (64, 64)), tmp_path / f"a.{kind}", 80, text)
    assert _read(tmp_path / f"a.{kind}") == text.replace("\ud83d", "?")


@pytest.mark.parametrize("kind", drawing.FORMATS)
def test_without_a_text_there_are_no_metadata(kind: str, tmp_path: Path) -> None:
    drawing.save(Image.new("RGB", (64, 64)), tmp_path / f"a.{kind}", 80)
    with Image.open(tmp_path / f"a.{kind}") as picture:
        assert "parameters" not in picture.info
        assert not dict(picture.getexif())


@pytest.mark.parametrize("kind", drawing.FORMATS)
def test_pictures_are_saved_as_asked_for(kind: str, tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    sizes = []
    for quality in (10, 95):
        drawing.save(noise, tmp_path / f"a.{kind}", quality, "the same")
        with Image.open(tmp_path / f"a.{kind}") as picture:
            assert picture.format == drawing.FORMATS[kind]
        sizes.append((tmp_path / f"a.{kind}").stat().st_size)
    assert (sizes[0] < sizes[1]) == (kind != "png")
