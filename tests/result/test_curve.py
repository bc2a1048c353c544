"""The loss as a curve: smoothed, thinned, and inside its frame."""

import statistics
from xml.etree import ElementTree

import pytest

from lora.result import curve
from lora.result.curve import Curve

SVG = "{http://www.w3.org/2000/svg}"
CURVE = Curve(losses=[0.5, 0.4, 0.9, 0.3], checks=[(0, 0.6), (2, 0.5), (4, 0.45)])


def test_smoothing_follows_a_constant_and_ends_near_the_last_of_a_step() -> None:
    assert curve.smoothed([0.3] * 50) == pytest.approx([0.3] * 50)
    assert curve.smoothed([1.0] * 100 + [0.0] * 100)[-1] == pytest.approx(0, abs=0.01)
    assert curve.smoothed([]) == []


def _points(svg: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.attrib["points"].split())] for line in lines]


def test_the_curve_has_a_raw_and_a_smooth_line_and_a_dot_for_each_check() -> None:
    svg = curve.loss_svg(CURVE)
    raw, smooth = _points(svg)
    assert len(raw) == len(smooth) == 4
    assert raw[2][1] < raw[0][1] < raw[1][1] < raw[3][1], "a higher loss stands higher, and y grows downwards"
    dots = [c for c in ElementTree.fromstring(svg).iter(f"{SVG}circle") if float(c.attrib["cy"]) > 40]
    assert len(dots) == 3
    assert "training pictures, fixed noise" in svg


def test_a_long_training_draws_few_points_and_keeps_its_extremes() -> None:
    losses = [0.5] * 6000
    losses[3000], losses[4007] = 0.1, 0.8
    raw, _ = _points(curve.loss_svg(Curve(losses=losses, checks=[])))
    assert len(raw) <= 800
    heights = [y for _, y in raw]
    assert min(heights) < statistics.mode(heights) < max(heights), "the one spike upwards and the one downwards"


@pytest.mark.parametrize("losses", [[], [0.0], [0.25, 0.25], [1e-9, 2e-9], [1.0, 1e6], [float(i) for i in range(999)]])
def test_any_losses_give_a_picture_inside_its_frame(losses: list[float]) -> None:
    svg = curve.loss_svg(Curve(losses=losses, checks=[(0, 1.0)]))
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for line in _points(svg):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in line)
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.attrib["x"]) <= width
