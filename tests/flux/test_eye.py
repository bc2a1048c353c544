"""Likeness by eye, by a tiny DINOv2 that the production loader loads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Model

from lora.flux import eye
from lora.flux.eye import Eye
from lora.result.preview import Preview
from tests import tiny_dino


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dino.write(tmp_path_factory.mktemp("dino"))


def _striped(hue: int, stripes: int) -> Image.Image:
    """Pictures of one hue are one thing, from several distances."""
    picture = Image.new("HSV", (64, 48), (hue, 255, 200))
    for i in range(stripes):
        picture.paste((hue, 90, 90), (8 + 16 * i, 0, 12 + 16 * i, 48))
    return picture.convert("RGB")


RED, BLUE = [_striped(0, i) for i in range(4)], [_striped(160, i) for i in range(4)]


def test_a_picture_is_embedded_as_dinov2_does_it_on_pixels_prepared_by_hand(folder: Path) -> None:
    """Shortest side to 32 (bicubic), the middle 28 x 28, ImageNet's mean and deviation; the first token, length 1."""
    middle = RED[2].resize((42, 32), Image.Resampling.BICUBIC).crop((7, 2, 35, 30))
    pixels = (np.asarray(middle) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        token = Dinov2Model.from_pretrained(folder)(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
    wanted = token.pooler_output[0] / token.pooler_output[0].norm()
    found = Eye(str(folder)).embed([BLUE[0], RED[2].convert("RGBA")])
    assert found.shape == (2, 32)
    torch.testing.assert_close(found[1], wanted, atol=1e-4, rtol=1e-3)


def test_what_the_base_draws_is_0_and_what_is_like_the_users_pictures_is_1(folder: Path) -> None:
    own, base = (Eye(str(folder)).embed(pictures) for pictures in (RED, BLUE))
    assert eye.likeness(own, base, base) == 0
    among = own @ own.T
    mean = (among.sum() - 4) / 12
    lifted = (mean - (base @ own.T).mean()).item()
    assert lifted > eye.LEAST_APART, "or this test sees nothing"
    like = eye.likeness(own, base, own[:2])
    assert like == pytest.approx(((own[:2] @ own.T).mean().item() - (base @ own.T).mean().item()) / lifted, rel=1e-4)
    assert like is not None
    assert like > 0.9
    assert eye.likeness(own, own, own) is None, "the two ends are the same"
    assert eye.likeness(own[:1], base, own) is None, "one picture is like no other"


def test_previews_are_looked_at_and_it_is_told(folder: Path) -> None:
    previews = [Preview(prompt="a TOK", without=BLUE[i], drawn=((2, RED[i]),)) for i in range(2)]
    found, line = eye.look(str(folder), "cpu", RED, previews)
    assert found is not None
    assert found > 0.8
    assert line == f"likeness: {folder.name}: {found:.2f} over 2 previews"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (None, "not measured without a GPU, unless EYE names a folder"),
        ("none", "left out, as EYE says"),
        ("", "left out, as EYE says"),
        ("/no/such/eye", "left out, for EYE, '/no/such/eye', cannot be loaded"),
    ],
)
def test_where_there_is_no_eye_it_is_left_out_and_said(name: str | None, why: str) -> None:
    found, line = eye.look(name, "cpu", RED, [])
    assert found is None
    assert why in line


def test_a_folder_without_a_model_costs_nobody_the_training(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded" in eye.find(str(tmp_path), "cpu")[1]
