"""Pictures with one background."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from lora.pictures import archive, background, photos, survey


def _looks(folder: Path, grounds: list[tuple[int, int, int]]) -> list[survey.Look]:
    """Something in another place and colour on each of these grounds."""
    for i, ground in enumerate(grounds):
        picture = Image.new("RGB", (320, 256), ground)
        pen = ImageDraw.Draw(picture)
        pen.ellipse((80 + 8 * i, 90, 200 + 8 * i, 250), fill=(40 * i, 255 - 40 * i, 90))
        pen.line((0, 40 + i, 320, 48 + i), fill=(90, 80, 70), width=6)
        picture.save(folder / f"{i}.png")
    return survey.look_at({file.name: file for file in sorted(folder.iterdir())})


def test_one_wall_behind_them_all_is_told_with_what_to_do(tmp_path: Path) -> None:
    walls = [(200 + i, 190 + i, 180) for i in range(5)]
    told = background.warning(_looks(tmp_path, walls))
    assert told is not None
    assert "have the same background" in told
    assert "add pictures in other places" in told


def test_different_walls_are_not_and_neither_are_three_pictures(tmp_path: Path) -> None:
    grounds = [(200, 190, 180), (90, 120, 60), (30, 40, 120), (240, 240, 240), (120, 60, 60)]
    looks = _looks(tmp_path, grounds)
    assert background.warning(looks) is None
    assert background.warning([looks[0]] * 3) is None


@pytest.mark.parametrize("name", ["dog6.zip", "backpack-nested.zip", "monster-toy.tar.gz"])
def test_photographs_in_different_places_are_not_told_of(name: str, photographs: Path, tmp_path: Path) -> None:
    found, _ = photos.pair(tmp_path, archive.unpack(photographs / name, tmp_path))
    assert background.warning(survey.look_at({photo.name: photo.path for photo in found})) is None
