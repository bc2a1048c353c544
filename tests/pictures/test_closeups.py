"""Close-ups of small subjects: which part of the picture they are, and in which sizes they train."""

import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from lora.pictures import buckets, closeups, views
from lora.pictures.views import Box, View

PICTURE = (4000, 3000)
BUCKET = buckets.buckets_for(*PICTURE, [512])[0]


def test_the_part_is_the_subject_with_its_margin_in_the_shape_of_the_bucket() -> None:
    part = closeups.around((0.4, 0.4, 0.6, 0.7), PICTURE, BUCKET)
    assert part is not None
    left, top, right, bottom = part
    assert ((left + right) / 2, (top + bottom) / 2) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0.55, abs=1e-3))
    assert (bottom - top) * 3000 == pytest.approx(1.5 * 0.3 * 3000, abs=2)
    assert (right - left) * 4000 / ((bottom - top) * 3000) == pytest.approx(BUCKET[0] / BUCKET[1], rel=1e-2)


def test_at_a_corner_it_is_moved_into_the_picture_and_a_tiny_subject_is_never_enlarged() -> None:
    part = closeups.around((0.98, 0.98, 1.0, 1.0), PICTURE, BUCKET)
    assert part is not None
    assert part[2:] == (1.0, 1.0)
    assert ((1 - part[0]) * 4000, (1 - part[1]) * 3000) == (pytest.approx(BUCKET[0]), pytest.approx(BUCKET[1]))


@pytest.mark.parametrize(
    ("subject", "picture"),
    [
        ((0.2, 0.2, 0.7, 0.71), PICTURE),  # not small
        ((0.1, 0.0, 0.3, 1.0), PICTURE),  # as high as the picture
        ((0.4, 0.4, 0.5, 0.5), (700, 500)),  # the smallest bucket is most of the picture
        ((0.4, 0.4, 0.5, 0.5), (400, 300)),  # or larger than it
    ],
)
def test_where_it_would_show_no_more_there_is_none(subject: Box, picture: tuple[int, int]) -> None:
    assert closeups.around(subject, picture, buckets.buckets_for(*picture, [512])[0]) is None


def test_whatever_the_box_the_part_lies_in_the_picture_and_fills_the_bucket() -> None:
    rng, some = random.Random(0), 0
    for _ in range(2000):
        picture = rng.randint(64, 5000), rng.randint(64, 5000)
        x, y = sorted(rng.sample(range(1001), 2)), sorted(rng.sample(range(1001), 2))
        bucket = buckets.choose_bucket(*picture, 64)
        part = closeups.around((x[0] / 1000, y[0] / 1000, x[1] / 1000, y[1] / 1000), picture, bucket)
        if part is None:
            continue
        some += 1
        left, top, right, bottom = part
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert buckets.cover(round((right - left) * picture[0]), round((bottom - top) * picture[1]), bucket) <= 1
    assert some > 200


def test_a_part_is_cut_out_with_its_mask_in_the_pictures_own_buckets_that_it_fills(tmp_path: Path) -> None:
    image, mask = Image.new("RGB", (1200, 900), "white"), Image.new("L", (600, 450))
    ImageDraw.Draw(image).rectangle((900, 100, 1019, 219), "red")
    ImageDraw.Draw(mask).rectangle((450, 50, 509, 109), 255)
    image.save(tmp_path / "a.png")
    mask.save(tmp_path / "m.png")
    whole = buckets.buckets_for(1200, 900, [96, 192, 384])
    part = closeups.around((0.75, 100 / 900, 0.85, 220 / 900), (1200, 900), whole[0])
    [fitted] = views.prepared([View(tmp_path / "a.png", tmp_path / "m.png", part)], [96, 192, 384])
    assert [picture.size for picture in fitted] == whole[:2] == whole[: len(fitted)]
    for picture in fitted:
        width, height = picture.size
        assert picture.getpixel((width // 2, height // 2)) == (255, 0, 0, 255)
        assert picture.getpixel((4, height // 2))[1:] == (255, 255, 0)  # type: ignore[index]
        red = sum(pixel[1] < 128 for pixel in picture.get_flattened_data())  # type: ignore[index]
        assert red == pytest.approx(width * height * 120 * 120 / (252 * 180), rel=0.1)
