"""Words near the trigger word, made-up ones and ordinary ones."""

import random
from difflib import SequenceMatcher

import pytest

from lora.training import words
from lora.training.words import NEAR, near_words

TRIGGERS = ("TOK", "sks", "ohwx", "MIV", "Gesupe", "ST1LLSU1T", "my dog", "a", "猫", "x-7", "a+b")


@pytest.mark.parametrize("word", TRIGGERS)
def test_near_words_are_different_never_the_word_and_the_same_for_a_seed(word: str) -> None:
    near = near_words(word, random.Random(1), 24)
    assert len(near) == len(set(near)) > 0
    assert word not in near
    assert near == near_words(word, random.Random(1), 24)
    others = near_words(word, random.Random(1), 24, [kind for kind in NEAR if kind != "case"])
    assert not [other for other in others if words.whole_word(word).search(other)]


def test_each_kind_of_near_word_is_what_it_says() -> None:
    def near(kind: str, word: str = "ohwx", count: int = 30) -> set[str]:
        return set(near_words(word, random.Random(3), count, [kind]))

    assert all(len(w) == 4 and 1 <= sum(a != b for a, b in zip(w, "ohwx", strict=True)) <= 2 for w in near("changed"))
    assert len(near("changed")) == 30
    assert near("swapped") == {"howx", "owhx", "ohxw"}
    assert all(SequenceMatcher(None, w, "ohwx").ratio() > 0.7 and len(w) in (3, 5) for w in near("added"))
    assert near("part") == {"oh", "wx"}
    assert near("part", "my red-dog") == {"my", "red", "dog"}
    assert near("part", "TOK") == {"TO", "OK"}
    assert near("case", "Tok") == {"tok", "TOK", "tOK"}
    assert all(w.isupper() for w in near("changed", "TOK") | near("added", "TOK"))


def test_the_kinds_come_in_turn_and_end_where_there_are_no_more() -> None:
    first = near_words("TOK", random.Random(0), 10)
    assert first[4] in ("tok", "Tok")
    few = near_words("TOK", random.Random(0), 100, ["part", "case"])
    assert set(few) == {"TO", "OK", "tok", "Tok"}
    assert len(few[0]) == 2
    assert len(few[1]) == 3
    assert near_words("猫", random.Random(0), 5, ["swapped", "part", "case"]) == []
    with pytest.raises(ValueError, match="kinds: alike: not among changed"):
        near_words("TOK", random.Random(0), 5, ["alike"])


def test_a_made_up_word_is_another_word_and_no_ordinary_one_for_long() -> None:
    rng = random.Random(2)
    made = [words.made_up_word(rng, "SKS") for _ in range(500)]
    assert "SKS" not in made
    assert len(set(made)) > 450
    assert sum(map(words.is_ordinary, made)) < 5


def test_everyday_words_are_ordinary_in_any_case() -> None:
    for word in ("red", "Dog", "photo", "GIRL", "anime", "style", "face"):
        assert words.is_ordinary(word)
    assert not [word for word in words.POPULAR if words.is_ordinary(word)]
