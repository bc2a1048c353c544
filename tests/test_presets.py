"""What a request means: other trainers' names, modes, priorities."""

from typing import Any

import pytest

from lora import presets, trigger
from lora.presets import Asked, settle
from lora.training import recipe


def test_what_is_left_empty_has_its_default_and_needs_no_note() -> None:
    settled = settle(Asked())
    assert (settled.trigger_word, settled.lora_type, settled.captioning) == ("TOK", "subject", "automatic")
    assert (settled.training_steps, settled.lora_rank) == (None, 16)
    assert (settled.autocaption_prefix, settled.autocaption_suffix) == ("", "")
    assert (settled.notes, settled.faults) == ((), ())


OTHER_NAMES: list[tuple[str, object, str, object, object]] = [
    ("trigger_phrase", "ohwx", "trigger_word", "ohwx", "TOK"),
    ("is_style", True, "lora_type", "style", "subject"),
    ("is_style", False, "lora_type", "subject", "style"),
    ("autocaption", True, "captioning", "automatic", "all"),
    ("autocaption", False, "captioning", "disabled", "automatic"),
    ("caption_prefix", "A photo,", "autocaption_prefix", "A photo,", "A picture,"),
    ("caption_suffix", ", grainy", "autocaption_suffix", ", grainy", ", sharp"),
    ("steps", 4, "training_steps", 4, 5),
    ("steps", 0, "training_steps", 0, 5),
    ("iterations", 300, "training_steps", 300, 301),
    ("rank", 32, "lora_rank", 32, 16),
]


@pytest.mark.parametrize(("other", "given", "name", "means", "differs"), OTHER_NAMES)
def test_another_trainers_name_counts_and_is_told_and_may_not_differ(
    other: str, given: object, name: str, means: object, differs: object
) -> None:
    def settled(**inputs: Any) -> presets.Settled:
        return settle(Asked(**inputs))

    alone = settled(**{other: given})
    assert getattr(alone, name) == means
    assert alone.notes == (f"{name}: {means!r}, given as {other}",)
    assert alone.faults == ()
    both = settled(**{other: given, name: means})
    assert getattr(both, name) == means
    assert (both.notes, both.faults) == ((), ())
    [fault] = settled(**{other: given, name: differs}).faults
    assert fault.startswith(f"{other}: it means the same as {name}, and they differ: ")
    assert fault.endswith(f"; give {name} alone")


def test_all_contradictions_are_told_and_long_texts_are_cut() -> None:
    long = {"caption_prefix": "x" * 300, "autocaption_prefix": "y" * 300}
    faults = settle(Asked(steps=1, iterations=2, training_steps=3, rank=4, lora_rank=5, **long)).faults
    assert [fault.partition(":")[0] for fault in faults] == ["caption_prefix", "steps", "iterations", "rank"]
    assert all(len(fault) < 300 for fault in faults)


@pytest.mark.parametrize(
    ("mode", "implied"), [("general", "subject"), ("character", "subject"), ("style", "style"), ("product", "subject")]
)
def test_a_mode_implies_its_type_and_contradicts_the_other(mode: str, implied: str) -> None:
    settled = settle(Asked(mode=mode))
    assert settled.lora_type == implied
    assert bool(settled.notes) == (mode != "general")
    assert settle(Asked(mode=mode, lora_type=implied)).faults == ()
    other = "style" if implied == "subject" else "subject"
    faults = settle(Asked(mode=mode, lora_type=other)).faults
    assert len(faults) == (mode != "general"), "general describes pictures of either type"


@pytest.mark.parametrize(
    ("given", "word", "taken"),
    [
        ("T\u200bOK", "TOK", "invisible characters (U+200B)"),
        ("\ufeffTOK\u2060", "TOK", "invisible characters (U+2060, U+FEFF)"),
        ("T\u00adOK", "TOK", "invisible characters (U+00AD)"),
        ("\u202eTOK\u202c", "TOK", "invisible characters (U+202C, U+202E)"),
        ('"TOK"', "TOK", "quotes or commas"),
        ("“my dog”", "my dog", "quotes or commas"),
        ("TOK,", "TOK", "quotes or commas"),
        (" TOK ", "TOK", "spaces"),
        ("'TOK', ", "TOK", "quotes or commas"),
    ],
)
def test_what_comes_with_a_copied_trigger_word_is_left_out_and_told(given: str, word: str, taken: str) -> None:
    settled = settle(Asked(trigger_word=given))
    assert settled.trigger_word == word
    assert settled.notes == (f"trigger_word: {word!r}; {taken} left out of {given!r}",)
    assert trigger.fault(word) is None


@pytest.mark.parametrize("word", ["TOK", "my dog", "rock'n'roll", "ANNA, BOB", "👨‍👩‍👧", "می‌خواهم", "L'Oréal", "TOK's"])
def test_a_sound_trigger_word_stays_as_it_was_typed(word: str) -> None:
    settled = settle(Asked(trigger_word=word))
    assert (settled.trigger_word, settled.notes) == (word, ())


@pytest.mark.parametrize("word", ["\u200b", '""', ",", "'', "])
def test_a_trigger_word_of_which_nothing_is_left_is_refused(word: str) -> None:
    assert trigger.fault(settle(Asked(trigger_word=word)).trigger_word) is not None


NATIVE = (512, 768, 1024)


def test_each_priority_decides_resolution_steps_and_previews() -> None:
    suited = recipe.steps_for("subject", None, 20)
    least = recipe.LEAST_STEPS["subject"]
    decided = {
        name: (presets.sides(name, None, NATIVE)[0], presets.steps(name, None, suited, least)[0], preset.previews)
        for name, preset in presets.PRIORITIES.items()
    }
    assert decided == {
        "quality": (NATIVE, 1000, None),
        "speed": ((512,), 500, 1),
        "high_res_only": ((1024,), 1000, None),
    }
    assert presets.sides("speed", None, NATIVE)[1] == "the smallest of the base's, as priority 'speed' has it"
    assert presets.steps("speed", None, suited, least)[1].endswith("times 0.5 as priority 'speed' has it, at least 500")


@pytest.mark.parametrize("name", presets.PRIORITIES)
def test_an_input_of_its_own_wins_over_a_priority(name: str) -> None:
    assert presets.sides(name, (640,), NATIVE) == ((640,), "as asked for")
    assert presets.steps(name, 7, (1000, "…"), 300) == (7, "as asked for")


@pytest.mark.parametrize(
    ("lora_type", "mode", "pictures", "steps", "why"),
    [
        ("subject", None, 20, 1000, "50 for each of 20 pictures of a subject"),
        ("subject", None, 5, 500, "50 for each of 5 pictures of a subject, but at least 500"),
        ("subject", "product", 12, 600, "50 for each of 12 pictures of a subject"),
        ("subject", "character", 20, 540, "27 for each of 20 pictures of a character"),
        ("subject", "character", 5, 300, "27 for each of 5 pictures of a character, but at least 300"),
        ("style", None, 15, 1500, "100 for each of 15 pictures of a style"),
        ("style", "style", 60, 2000, "100 for each of 60 pictures of a style, but at most 2000"),
    ],
)
def test_the_number_of_pictures_decides_the_steps_within_bounds(
    lora_type: str, mode: str | None, pictures: int, steps: int, why: str
) -> None:
    assert recipe.steps_for(lora_type, mode, pictures) == (steps, why)
