"""What the captioning model sees: how its answers are read, and what is told of them."""

import pytest

from captioner import look
from captioner.look import Seen

ANSWER = "people: 2\nface: hidden by sunglasses\nblurred: No\nbackground: A white wall.\nclothes: red jacket"


@pytest.mark.parametrize(
    "answer",
    [ANSWER, ANSWER.upper(), "\n".join(f"- **{line.replace(':', '**:')}" for line in ANSWER.splitlines())],
    ids=["plain", "capitals", "markdown"],
)
def test_an_answer_in_the_form_that_was_asked_for_is_read(answer: str) -> None:
    assert look.read(answer) == Seen(
        people=2, face="hidden", blurred=False, background="white wall", clothes="red jacket"
    )


@pytest.mark.parametrize(
    "answer", ["", "I see a nice dog.", "people: many\nface: yes\nblurred: a bit\nbackground: none", "people: -1"]
)
def test_what_an_answer_does_not_say_is_not_known(answer: str) -> None:
    assert look.read(answer) == Seen()


def test_each_trouble_is_told_with_the_pictures_and_what_to_do() -> None:
    seen = {
        "a.jpg": Seen(people=2),
        "b.jpg": Seen(people=1, face="hidden"),
        "c.jpg": Seen(people=1, face="small", blurred=True),
        "d.jpg": Seen(people=1, face="clear", blurred=False),
    }
    assert [line.rpartition(": ")[2] for line in look.warnings(seen, "subject")] == [
        "'a.jpg'",
        "'b.jpg'",
        "'c.jpg'",
        "'c.jpg'",
    ]
    assert look.warnings(seen, "subject", "young woman") == look.warnings(seen, "subject")
    assert [line.partition(":")[0] for line in look.warnings(seen, "subject", "dog")] == ["blurred"]
    assert all(": " in line for line in look.warnings(seen, "character"))
    assert [line.partition(":")[0] for line in look.warnings(seen, "style")] == ["blurred"]
    assert [line.partition(":")[0] for line in look.warnings(seen, "product")] == ["blurred"]
    assert look.warnings({"d.jpg": seen["d.jpg"]}, "subject") == []


def test_the_same_background_or_clothes_in_most_pictures_are_told() -> None:
    seen = {f"{i}.jpg": Seen(background="white wall", clothes=f"coat {i}") for i in range(4)}
    [line] = look.warnings(seen, "subject")
    assert line.startswith("4 of 4 pictures have the same background (white wall), which will be learned with the word")
    worn = {name: Seen(background=name, clothes="red jacket") for name in seen}
    assert "the same clothes (red jacket)" in look.warnings(worn, "subject")[0]
    assert look.warnings(worn, "style") == []
    few = dict(list(seen.items())[:3])
    assert look.warnings(few, "subject") == []
    mixed = seen | {"2.jpg": Seen(background="beach"), "3.jpg": Seen()}
    assert look.warnings(mixed, "subject") == []


def test_many_pictures_are_counted_not_listed() -> None:
    seen = {f"{i}.jpg": Seen(blurred=True) for i in range(30)}
    assert look.warnings(seen, "style")[0].endswith("and 20 more")
