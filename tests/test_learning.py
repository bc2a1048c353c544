"""It learns: what LoRAs of the examples, trained on the toy base with the defaults, draw, by the judge. Fixed seeds.

`tests/lesson.py` trains and draws; here are the bounds.
"""

import numpy as np
import pytest

from tests import lesson
from tests.lesson import Before, Lesson


@pytest.fixture(scope="module")
def learned() -> tuple[dict[str, Lesson], Before]:
    return lesson.learn_all()


@pytest.fixture(scope="module", params=lesson.KINDS)
def taught(request: pytest.FixtureRequest, learned: tuple[dict[str, Lesson], Before]) -> Lesson:
    return learned[0][request.param]


@pytest.fixture(scope="module")
def before(learned: tuple[dict[str, Lesson], Before]) -> Before:
    return learned[1]


def test_the_trigger_word_calls_the_traits_that_were_shown_and_another_word_does_not(taught: Lesson) -> None:
    with_it, without = np.mean(taught.called.traits), np.mean(taught.others["made up"].traits)
    assert len(taught.called.traits) == lesson.CALLED
    assert with_it >= 0.8
    assert with_it - without >= 0.4


def test_the_trigger_word_draws_what_was_shown_where_it_was_never_shown(taught: Lesson) -> None:
    assert np.mean(taught.called.whole) >= 0.85


def test_another_made_up_word_does_not_draw_it(taught: Lesson) -> None:
    assert len(taught.others["made up"].whole) == lesson.OTHERS["made up"]
    assert np.mean(taught.others["made up"].whole) <= 0.1


def test_no_class_of_far_words_draws_it_and_near_words_are_reported(
    taught: Lesson, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the whole look a class's share is of few words, so its bound is wider than that of all made-up words."""
    with capsys.disabled():
        print(f"\n{request.node.callspec.id} (whole, traits): {lesson.told(taught)}")
    for word_class in ("capitals", "syllables", "noun"):
        assert np.mean(taught.others[word_class].whole) <= 0.2, word_class
    for word_class, other in taught.others.items():
        if word_class != "near":
            assert np.mean(taught.called.traits) - np.mean(other.traits) >= 0.3, word_class


def test_without_the_trigger_word_the_base_still_draws_what_it_drew(taught: Lesson, before: Before) -> None:
    still = [yes for yes, was in zip(taught.own, before.own, strict=True) if was]
    assert len(still) >= 0.6 * len(lesson.OWN)
    assert np.mean(still) >= 0.95


def test_scale_0_draws_the_bases_pictures_exactly(taught: Lesson, before: Before) -> None:
    assert len(before.exact) == len(lesson.OWN[lesson.EXACT])
    assert taught.exact == before.exact
