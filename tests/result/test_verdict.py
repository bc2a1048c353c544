"""What the measured numbers mean."""

import dataclasses
from typing import Any

import pytest

from lora.result import verdict
from lora.result.verdict import CLEAR_FROM, WEAK_FROM, Gains, Measured

GOOD = Gains(own=0.8, far=0.15, near=0.2, noun=0.2)
SOUND = Measured(trained=GOOD, unseen=GOOD, own_then=0.8, drift=0.03)


def _words(ratio: float = 0.5, **changes: Any) -> dict[str, str]:
    found = verdict.of(dataclasses.replace(SOUND, **changes), "TOK", "subject", ratio, True)
    return {finding.name: finding.word for finding in found.findings}


def test_a_good_training_is_clear_in_everything_and_asks_for_nothing() -> None:
    found = verdict.of(SOUND, "TOK", "subject", 0.5, True)
    assert {finding.word for finding in found.findings} == {"clear"}
    assert not [finding for finding in found.findings if finding.advice]
    assert found.title == "Verdict: it worked"
    assert set(found.metrics()) == {"verdict_learned", "verdict_own_word", "verdict_not_memorised", "verdict_drift"}
    assert len(found.lines()) == 4


def test_steps_that_were_enough_are_named_where_it_has_learned() -> None:
    def says(**changes: Any) -> str:
        return verdict.of(dataclasses.replace(SOUND, **changes), "TOK", "subject", 0.5, True).findings[0].says

    assert says(enough=600).endswith(" before the end: training_steps=600 would probably be enough.")
    assert "training_steps" not in says()
    assert "training_steps" not in says(enough=600, unseen=dataclasses.replace(GOOD, own=0.4))


def test_likeness_is_told_as_a_number_without_a_word_and_changes_no_verdict() -> None:
    found = verdict.of(dataclasses.replace(SOUND, likeness=1.3), "TOK", "subject", 0.5, True)
    assert found.title == "Verdict: it worked"
    assert found.lines()[-1].startswith("Likeness: 1.00. How much previews with TOK look like your pictures: 0 as")
    assert found.metrics()["verdict_likeness"] == 1
    assert found.record()["measured"]["likeness"] == 1.3


def test_each_weakness_is_named_with_what_to_do() -> None:
    def advice(name: str, ratio: float = 0.5, **changes: Any) -> str:
        found = verdict.of(dataclasses.replace(SOUND, **changes), "TOK", "subject", ratio, True)
        [finding] = [finding for finding in found.findings if finding.name == name]
        assert finding.word != "clear"
        return f"{finding.says} {finding.advice}"

    little = dataclasses.replace(GOOD, own=0.1)
    assert "more steps" in advice("learned", unseen=little, own_then=0.1)
    assert "lower learning_rate" in advice("learned", unseen=dataclasses.replace(GOOD, own=-1.0))
    everywhere = dataclasses.replace(GOOD, far=0.7, near=0.7)
    assert "preservation was off" in advice("own_word", ratio=0.0, unseen=everywhere)
    assert "firm" in advice("own_word", unseen=everywhere)
    assert "words that look like it" in advice("own_word", unseen=dataclasses.replace(GOOD, far=0.5, near=0.8))
    assert "preservation was off" in advice("kept", ratio=0.0, drift=0.6)
    assert "memorises" in advice("not_memorised", unseen=little, own_then=0.9)


def test_the_title_says_what_is_wrong_with_what_was_learned() -> None:
    everywhere = dataclasses.replace(GOOD, far=0.7, near=0.7)
    found = verdict.of(dataclasses.replace(SOUND, unseen=everywhere, drift=0.9), "TOK", "subject", 0.5, True)
    assert found.title == "Verdict: it learned, but other words call it too and it changes other prompts"


def test_of_more_steps_and_fewer_steps_one_alone_is_advised() -> None:
    poor = dataclasses.replace(GOOD, own=0.45)
    found = verdict.of(dataclasses.replace(SOUND, unseen=poor, own_then=0.9), "TOK", "subject", 0.5, True)
    told = " ".join(found.lines())
    assert "fewer steps" in told
    assert "more steps" not in told


def test_where_nothing_was_learned_nothing_is_said_of_its_own_word() -> None:
    little = Gains(own=0.2, far=0.1, near=0.1, noun=0.1)
    found = verdict.of(
        dataclasses.replace(SOUND, trained=little, unseen=None, own_then=None), "TOK", "subject", 0.5, True
    )
    assert [finding.name for finding in found.findings] == ["learned"]
    assert found.findings[0].advice.endswith(
        " Photographs are too much for the toy base, and need FLUX.1-dev on a GPU."
    )
    assert "verdict_own_word" not in found.metrics()


def test_a_style_gets_numbers_without_words() -> None:
    found = verdict.of(SOUND, "TOK", "style", 1.5, True)
    assert [finding.word for finding in found.findings] == ["", "", "clear"]
    assert found.title == "Verdict: no fault found; the previews show how well it learned"
    assert found.lines()[1].startswith("Learned: 0.80. With TOK")


LITTLE = Gains(own=0.08, far=0.02, near=0.04, noun=0.03)
"""Most of the base's loss on a photograph is chance, which no LoRA takes away."""
PHOTOGRAPHS = Measured(trained=dataclasses.replace(LITTLE, own=0.2), unseen=LITTLE, own_then=0.18, drift=0.01)


def _of_photographs(ratio: float = 0.5, **changes: Any) -> verdict.Verdict:
    return verdict.of(dataclasses.replace(PHOTOGRAPHS, **changes), "TOK", "subject", ratio, False)


def test_on_a_base_without_bounds_a_sound_training_is_not_called_a_failure() -> None:
    found = _of_photographs()
    assert {finding.word for finding in found.findings} == {""}
    assert not [finding for finding in found.findings if finding.advice]
    assert found.lines() == [
        "Verdict: no fault found; the previews show how well it learned",
        "Learned: 0.12. With TOK the loss is 8% below the base's on pictures that it had not seen.",
        "Its own word: 0.62. With other words in place of TOK the loss is 3% below the base's.",
    ]
    assert found.metrics() == {"verdict_learned": 0.12, "verdict_own_word": 0.625, "verdict_drift": 0.01}


def test_on_any_base_it_warns_of_what_needs_no_bounds() -> None:
    def faults(ratio: float = 0.5, **changes: Any) -> list[str]:
        return _of_photographs(ratio, **changes).lines()

    worse = dataclasses.replace(LITTLE, own=-0.2)
    assert faults(trained=worse, unseen=worse)[:2] == [
        "Verdict: not learned well yet",
        "Learned: none (0.00). With TOK the loss is not below the base's on pictures that it had not seen. The learning"
        " rate was too high and damaged the base: lower learning_rate.",
    ]
    assert faults(unseen=worse)[:3] == [
        "Verdict: no fault found; the previews show how well it learned",
        "Learned: 0.00. With TOK the loss is not below the base's on pictures that it had not seen. On those that it"
        " trained on it is 20% below the base's.",
        "Its own word: 0.85. With other words in place of TOK the loss is 3% below the base's.",
    ]
    alike = dataclasses.replace(LITTLE, far=0.075, near=0.078)
    assert faults(unseen=alike, ratio=0)[0] == "Verdict: it learned, but other words call it too"
    assert "They call the subject as TOK does. The input preservation was off" in faults(unseen=alike, ratio=0)[2]
    assert "set preservation to firm" in faults(unseen=alike)[2]
    assert "mixed up" in faults(unseen=dataclasses.replace(LITTLE, other=0.09))[2]
    assert faults(drift=0.9)[0] == "Verdict: it learned, but it changes other prompts"
    assert "nearly copies" in faults(repeated=0.9)[-1]


def test_pictures_that_are_copies_of_one_another_can_only_be_memorised() -> None:
    assert _words(repeated=0.9, unseen=None, own_then=None)["not_memorised"] == "none"
    assert _words(repeated=0.2)["not_memorised"] == "clear"


def test_of_the_base_it_speaks_only_where_much_has_changed() -> None:
    assert "kept" not in _words(drift=0.2)
    assert _words(drift=0.4)["kept"] == "weak"
    assert _words(drift=0.9)["kept"] == "none"


def test_without_held_out_pictures_nothing_is_said_of_memorising() -> None:
    found = verdict.of(dataclasses.replace(SOUND, unseen=None, own_then=None), "TOK", "style", 1.5, True)
    assert "not_memorised" not in {finding.name for finding in found.findings}
    assert "too few to hold one out" in found.findings[0].says


@pytest.mark.parametrize(("weak", "clear"), [(0.2, 0.6), (0.6, 0.2)])
def test_a_value_meets_the_words_at_their_bounds_whichever_way_is_better(weak: float, clear: float) -> None:
    assert verdict.scaled(weak, weak, clear) == pytest.approx(WEAK_FROM)
    assert verdict.scaled(clear, weak, clear) == pytest.approx(CLEAR_FROM)
    assert verdict.scaled(weak + 9 * (weak - clear), weak, clear) == 0
    assert verdict.scaled(clear + 9 * (clear - weak), weak, clear) == 1


def test_subjects_whose_words_are_mixed_up_are_told_apart_from_other_leaks() -> None:
    mixed = dataclasses.replace(GOOD, other=0.9)
    [finding] = [
        f
        for f in verdict.of(dataclasses.replace(SOUND, unseen=mixed), "ANNA or BOB", "subject", 0.5, True).findings
        if f.name == "own_word"
    ]
    assert finding.word == "none"
    assert finding.says == "The trigger words are mixed up: one calls the subject of another (ANNA or BOB)."
    assert _words(unseen=dataclasses.replace(GOOD, other=0.1))["own_word"] == "clear"
