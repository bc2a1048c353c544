"""What an answer says of where the subject is: one box, or nothing."""

import pytest

from captioner import ground

BOX = (0.1, 0.2, 0.35, 1.0)


@pytest.mark.parametrize(
    "answer",
    [
        '{"bbox_2d": [100, 200, 350, 1000], "label": "dog"}',
        '[{"bbox_2d": [100, 200, 350, 1000]}]',
        '```json\n[\n\t{"bbox_2d": [100, 200, 350.0, 1000], "label": "dog"}\n]\n```',
        ' ```\n{"label": "```", "bbox_2d": [100, 200, 350, 1000]}```\n',
    ],
)
def test_a_box_is_read_in_every_form_that_the_model_gives_it(answer: str) -> None:
    assert ground.read(answer) == BOX


@pytest.mark.parametrize(
    "corners",
    [
        "[350, 200, 100, 1000]",
        "[100, 200, 100, 1000]",
        "[-1, 200, 350, 1000]",
        "[100, 200, 350, 1001]",
        "[100, 200, 350]",
        "[100, 200, 350, 1000, 1]",
        '["100", 200, 350, 1000]',
        "[false, 200, 350, 1000]",
        "[NaN, 200, 350, 1000]",
        "[100, 200, 350, Infinity]",
        "[100, 200, 350, 1e999]",
        "[100, 200, 350, " + "9" * 5000 + "]",
        "[[100], 200, 350, 1000]",
        "{}",
        "null",
    ],
)
def test_what_is_no_box_within_the_picture_is_none(corners: str) -> None:
    assert ground.read(f'{{"bbox_2d": {corners}}}') is None


@pytest.mark.parametrize(
    "answer",
    [
        *("", "[]", "null", "7", "the dog is on the left", '{"bbox": [100, 200, 350, 1000]}', "[" * 100_000),
        '[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4]}]',
        'Here it is: {"bbox_2d": [100, 200, 350, 1000]}',
        '{"bbox_2d": [100, 200, 350, 1000]',
    ],
)
def test_several_boxes_and_other_words_are_none(answer: str) -> None:
    assert ground.read(answer) is None


def test_the_question_names_the_subject_where_it_is_known() -> None:
    assert "the woman that is the main subject" in ground.question("woman")
    assert '"label": "subject"' in ground.question(None)
