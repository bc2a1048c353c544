"""When fewer steps would do: on gains as trainings of the toy base had them."""

from collections.abc import Sequence

import pytest

from lora.training import enough
from lora.training.examine import Glance


def _learned(own: Sequence[float], unseen: Sequence[float | None]) -> tuple[float, float] | None:
    looks = zip(own, unseen, strict=True)
    return enough.learned([Glance(loss=1 - one, own=one, unseen=held, drift=0.0) for one, held in looks])


def test_a_high_gain_that_rises_no_more_is_enough() -> None:
    found = _learned([0.81, 0.82, 0.80, 0.82, 0.74, 0.86], [0.77, 0.80, 0.79, 0.81, 0.75, 0.84])
    assert found == (pytest.approx((2 * 0.84 + 0.86) / 3), pytest.approx((2 * 0.84 + 0.86 - 2 * 0.81 - 0.82) / 3))


def test_one_that_still_rises_or_is_low_is_not() -> None:
    assert _learned([0.80, 0.81, 0.81, 0.83, 0.82, 0.88], [0.80, 0.80, 0.81, 0.81, 0.81, 0.885]) is None
    assert _learned([0.68, 0.70, 0.75, 0.76, 0.78, 0.78], [0.70, 0.71, 0.74, 0.75, 0.76, 0.77]) is None
    assert _learned([0.9, 0.9], [0.9, 0.9]) is None, "two looks tell of no rise"


def test_held_out_pictures_count_as_they_were_seen_last_and_without_them_more_is_asked_for() -> None:
    assert _learned([0.9] * 8, [*[0.85] * 7, None]) == (pytest.approx((2 * 0.85 + 0.9) / 3), pytest.approx(0))
    assert _learned([0.9] * 8, [*[0.6] * 7, None]) is None
    assert _learned([0.86] * 8, [None] * 8) is not None
    assert _learned([0.82] * 8, [None] * 8) is None
