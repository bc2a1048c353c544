"""The prompts of prior preservation: of every kind, and never with the trigger word."""

from collections.abc import Sequence

from lora.training import prompts, words
from lora.trigger import Subject


def said(
    captions: Sequence[str], word: str, count: int, seed: int, kinds: Sequence[str], noun: str | None = None
) -> list[str]:
    of_one = dict.fromkeys(captions, Subject(word, noun))
    return [asked.prompt for asked in prompts.apart(of_one, count, seed, kinds)]


KINDS = ("things", "made-up words", "captions")


def test_no_prompt_has_the_trigger_word_and_the_users_captions_come_back_with_another() -> None:
    captions = ["a TOK on a sofa", "tok. sleeping (TOK!)"]
    asked = said(captions, "TOK", 90, 1, KINDS)
    assert len(asked) == 90
    assert not [prompt for prompt in asked if "tok" in prompt.casefold()]
    assert any(prompt.endswith("on a sofa") for prompt in asked)
    assert any("in the style of" in prompt for prompt in asked)
    assert asked == said(captions, "TOK", 90, 1, KINDS)
    assert asked != said(captions, "TOK", 90, 2, KINDS)


def test_near_prompts_have_words_near_the_trigger_word_and_never_itself_in_another_case() -> None:
    asked = said(["a TOK on a sofa"], "TOK", 40, 1, ("near",))
    found = {prompt.split()[1] for prompt in asked}
    assert len(found) > 10
    assert all(set(word.lower()) & set("tok") for word in found)
    assert "tok" not in {word.lower() for word in found}


def test_natural_prompts_hold_the_class_noun_and_none_is_in_the_toys_language() -> None:
    asked = said(["a TOK"], "TOK", 200, 1, ("natural",), "otter")
    assert len(prompts.NATURAL) >= 40
    assert sum("otter" in prompt for prompt in asked) > 100
    assert any("an otter" in prompt for prompt in asked)
    assert not [prompt for prompt in asked if "a otter" in prompt or "{" in prompt or "background on" in prompt]
    assert said(["a TOK on grass"], "TOK", 2, 1, ("noun",), "otter") == ["a otter on grass"] * 2


def test_each_kind_of_prompt_is_what_it_says() -> None:
    def asked(*kinds: str) -> list[str]:
        return said(["a TOK on a sofa"], "TOK", 40, seed=1, kinds=kinds)

    known = {"a", "an", "on", "the", "left", "right", "at", "top", "bottom", "small", "large", "background", "sofa"}
    known |= {*words.THINGS, *words.COLOURS}
    assert all(set(prompt.split()) <= known for prompt in asked("things") + asked("noun"))
    assert all(set(prompt.split()) - known for prompt in asked("made-up words") + asked("captions"))
    assert all(prompt.endswith(" on a sofa") for prompt in asked("captions") + asked("noun"))


def test_a_trigger_word_of_signs_is_replaced_as_it_stands() -> None:
    for word in (r"\1", "a+b", "[x]", "(", "猫"):
        asked = said([f"{word} in the sun"], word, 30, 0, KINDS)
        assert not [prompt for prompt in asked if word in prompt]
        assert [prompt for prompt in asked if prompt.endswith(" in the sun")]


def test_a_trigger_word_inside_another_word_is_none_and_an_ordinary_one_stands_in_no_prompt() -> None:
    asked = said(["an art museum at a starry party, by ART"], "art", 60, 0, KINDS)
    mine = [prompt for prompt in asked if "museum" in prompt]
    assert len(mine) == 20
    assert all(" museum at a starry party, by " in prompt and not prompt.endswith("ART") for prompt in mine)
    for word in ("red", "Dog", "background"):
        asked = said([f"a {word} here"], word, 300, 0, (*KINDS, "noun"))
        assert not [prompt for prompt in asked if word.casefold() in prompt.casefold().split()]
        assert words.is_ordinary(word)
    assert not words.is_ordinary("TOK")


def test_a_prompt_that_comes_from_a_caption_knows_it() -> None:
    captions = dict.fromkeys(["a TOK on grass", "TOK asleep"], Subject("TOK"))
    asked = prompts.apart(captions, 40, 1, ("captions", "near", "noun", "natural"))
    assert [one.caption is None for one in asked] == [False, False, False, True] * 10
    assert all(one.caption.split()[-1] == one.prompt.split()[-1] for one in asked if one.caption)


def test_of_several_subjects_no_word_stands_in_any_prompt_and_each_comes_with_its_own_noun() -> None:
    anna, bob = Subject("ANNA", "woman"), Subject("BOB", "otter")
    captions = {"ANNA beside BOB on a sofa": anna, "BOB on grass": bob, "a BOB asleep": bob}
    asked = prompts.apart(captions, 80, 1, ("captions", "near", "noun", "natural"))
    assert not [one.prompt for one in asked if {"anna", "bob"} & {*one.prompt.casefold().split()}]
    nouns = [one.prompt for one in asked[2::4]]
    assert any(prompt.startswith("woman beside ") and prompt.endswith(" on a sofa") for prompt in nouns)
    assert {"otter on grass", "a otter asleep"} <= {*nouns}
    assert not [prompt for prompt in nouns if "woman" in prompt and "sofa" not in prompt]
