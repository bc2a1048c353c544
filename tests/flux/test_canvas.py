"""What is drawn on: sizes, and what a mask keeps."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lora.flux import canvas


@pytest.mark.parametrize(
    ("ratio", "side", "size"),
    [("1:1", 1024, (1024, 1024)), ("16:9", 1024, (1360, 768)), ("9:16", 96, (64, 128)), ("3:2", 96, (112, 80))],
)
def test_a_ratio_is_a_size_of_the_bases_area(ratio: str, side: int, size: tuple[int, int]) -> None:
    assert canvas.blank(ratio, None, None, side).size == size


def test_width_and_height_are_for_custom_alone() -> None:
    assert canvas.blank("custom", 100, 64.0, 96).size == (96, 64)
    assert canvas.blank("1:1", 100, 64, 96).size == (96, 96)
    with pytest.raises(ValueError, match="aspect_ratio: custom takes width and height in pixels; give height too"):
        canvas.blank("custom", 100, None, 96)
    with pytest.raises(ValueError, match="give width and height too"):
        canvas.blank("custom", None, None, 96)


def _noise(size: tuple[int, int]) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise(size, 90) for _ in "RGB"])


def _mask(size: tuple[int, int], box: tuple[int, int, int, int], white: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=white)
    return mask


@pytest.mark.parametrize("size", [(96, 96), (301, 203), (50, 70)])
def test_what_is_black_in_the_mask_is_the_pictures_own_in_any_size(size: tuple[int, int]) -> None:
    picture, mask = _noise(size), _mask(size, (10, 12, 30, 33))
    place = canvas.within(picture, mask, 96)
    assert place.start is not None
    assert place.mask is not None
    assert place.start.size == place.mask.size == place.size
    result = place.finish(Image.new("RGB", place.size, "red"))
    white = np.asarray(mask) > 0
    assert result.size == size
    assert (np.asarray(result)[~white] == np.asarray(picture)[~white]).all()
    assert (np.asarray(result)[white] == (255, 0, 0)).all()


def test_greys_blend_and_the_traces_of_jpeg_do_not() -> None:
    picture = Image.new("RGB", (96, 96), "black")
    for level, seen in ((canvas.BLACK, 0), (128, 128), (canvas.WHITE, 255)):
        mask = _mask((96, 96), (40, 40, 60, 60))
        mask.putpixel((5, 5), level)
        result = canvas.within(picture, mask, 96).finish(Image.new("RGB", (96, 96), "white"))
        assert result.getpixel((5, 5)) == (seen, seen, seen)


def test_a_mask_of_another_size_and_the_same_shape_is_fitted() -> None:
    picture = _noise((96, 64))
    place = canvas.within(picture, _mask((960, 640), (500, 0, 959, 639)).convert("RGB"), 96)
    result = np.asarray(place.finish(Image.new("RGB", place.size, "red")))
    assert (result[:, :48] == np.asarray(picture)[:, :48]).all()
    assert (result[:, 52:] == (255, 0, 0)).all()


def test_every_latent_that_the_mask_touches_is_drawn_however_thin_the_line() -> None:
    line = _mask((960, 960), (0, 484, 959, 484))  # one pixel of ten that come together
    place = canvas.within(_noise((960, 960)), line, 96)
    assert place.mask is not None
    rows = np.flatnonzero(np.asarray(place.mask).any(axis=1))
    assert rows.tolist() == list(range(48, 56))


def test_a_mask_that_cannot_be_meant_is_refused() -> None:
    picture = _noise((96, 64))
    with pytest.raises(ValueError, match="mask: it is 64x96 and image is 96x64: give a mask of the same shape"):
        canvas.within(picture, _mask((64, 96), (0, 0, 9, 9)), 96)
    with pytest.raises(ValueError, match="mask: nothing of it is white"):
        canvas.within(picture, Image.new("L", (96, 64), canvas.BLACK), 96)


def test_a_picture_larger_than_anything_drawn_is_made_smaller_first() -> None:
    place = canvas.within(Image.new("RGB", (4096, 1024)), _mask((4096, 1024), (0, 0, 99, 99)), 96)
    assert place.kept is not None
    assert place.kept[0].size == place.kept[1].size == (2048, 512)


def test_white_strokes_on_nothing_are_a_mask_and_other_transparent_parts_are_refused(tmp_path: Path) -> None:
    strokes = Image.new("RGBA", (96, 64))
    strokes.paste((255, 255, 255, 255), (10, 10, 30, 30))
    strokes.save(tmp_path / "strokes.png")
    white = np.asarray(canvas.read_mask(tmp_path / "strokes.png").convert("L")) > 0
    assert white.sum() == 400
    strokes.paste((0, 0, 0, 255), (40, 10, 60, 30))
    strokes.save(tmp_path / "either.png")
    with pytest.raises(ValueError, match="transparent parts, which may mean either"):
        canvas.read_mask(tmp_path / "either.png")
    opaque = _mask((96, 64), (10, 10, 29, 29)).convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    assert (np.asarray(canvas.read_mask(tmp_path / "opaque.png").convert("L")) > 0).sum() == 400
