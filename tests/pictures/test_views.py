"""What is trained of a picture: a mask goes through the same crop and scale, and transparency counts as one."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from lora.pictures import views
from lora.pictures.photos import Photo
from lora.pictures.views import View

SUBJECT = (60, 20, 100, 80)
"""A red box, in pixels of 160 x 100."""


def _picture(tmp_path: Path, **options: object) -> Path:
    image = Image.new("RGB", (160, 100), "white")
    ImageDraw.Draw(image).rectangle(SUBJECT, "red")
    image.save(tmp_path / "a.png", **options)
    return tmp_path / "a.png"


def _mask(tmp_path: Path, size: tuple[int, int] = (160, 100), box: tuple[int, ...] = SUBJECT) -> Path:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, 255)
    mask.save(tmp_path / "a.mask.png")
    return tmp_path / "a.mask.png"


def _is_on_the_subject(fitted: Image.Image) -> bool:
    """Whether alpha is white just where the picture is red, but for the edges' soft pixels."""
    pixels = list(zip(fitted.convert("RGB").get_flattened_data(), fitted.getchannel("A").get_flattened_data()))  # noqa: B905
    apart = sum((g < 128) != (alpha > 128) for (_, g, _), alpha in pixels)
    return 0.05 < sum(alpha > 128 for _, alpha in pixels) / len(pixels) < 0.5 and apart < 0.02 * len(pixels)


@pytest.mark.parametrize("scale", [1, 0.5, 4])
def test_a_mask_of_any_size_lies_on_its_picture_in_every_bucket(scale: float, tmp_path: Path) -> None:
    size, box = (int(160 * scale), int(100 * scale)), tuple(int(side * scale) for side in SUBJECT)
    view = View(_picture(tmp_path), _mask(tmp_path, size, box))
    [fitted] = views.prepared([view], [64, 96], merged={(128, 80): (96, 96)})
    assert len(fitted) == 2
    for picture in fitted:
        assert picture.mode == "RGBA"
        assert _is_on_the_subject(picture)


def test_a_turned_photograph_takes_a_mask_of_its_upright_shape(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(_picture(tmp_path))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    [[fitted]] = views.prepared([View(tmp_path / "turned.jpg", _mask(tmp_path))], [64])
    assert _is_on_the_subject(fitted)


def test_what_is_transparent_is_not_to_be_learned_and_an_opaque_picture_has_no_mask(tmp_path: Path) -> None:
    image = Image.open(_picture(tmp_path))
    image.putalpha(Image.open(_mask(tmp_path)))
    image.save(tmp_path / "cut.png")
    image.putalpha(255)
    image.save(tmp_path / "opaque.png")
    [cut], [opaque] = views.prepared([View(tmp_path / "cut.png"), View(tmp_path / "opaque.png")], [64])
    assert _is_on_the_subject(cut)
    assert opaque.mode == "RGB"


def test_masks_that_cannot_be_used_are_refused_all_at_once_and_a_black_one_is_told(tmp_path: Path) -> None:
    picture = _picture(tmp_path)
    wide, damaged, clear, black = (tmp_path / f"{name}.png" for name in ("wide", "damaged", "clear", "black"))
    Image.new("L", (200, 100), 255).save(wide)
    damaged.write_bytes(picture.read_bytes()[:60])
    Image.new("LA", (160, 100), (255, 128)).save(clear)
    Image.new("L", (80, 50)).save(black)
    found = [Photo(name=f"{mask.stem}.jpg", path=picture, caption=None, mask=mask) for mask in (wide, damaged, clear)]
    with pytest.raises(ValueError, match="input_images: these masks cannot be used") as refused:
        views.check_masks(found)
    assert "'wide.jpg' is 200 x 100, another shape than its picture, 160 x 100" in str(refused.value)
    assert "the mask of 'damaged.jpg': 'damaged.png' cannot be read" in str(refused.value)
    assert "the mask of 'clear.jpg' has transparent parts" in str(refused.value)
    [told] = views.check_masks([Photo(name="p.jpg", path=picture, caption=None, mask=black)])
    assert told == "the mask of 'p.jpg' is black, so it changes nothing: white is learned"
