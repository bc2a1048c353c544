"""What is decided for a training."""

from pathlib import Path

from lora.flux import base
from lora.training import decide
from tests.test_request import a_request


def test_the_largest_of_several_resolutions_trains_a_subject_half_as_often() -> None:
    bound, _ = decide.half_above("subject", (512, 768, 1024))
    assert (768 // 16) ** 2 < bound < (960 // 16) * (1024 // 16)
    assert decide.half_above("subject", (1024,))[0] == decide.half_above("style", (512, 1024))[0] == 0


def test_steps_are_suggested_for_a_subject_as_the_user_counts_them_where_they_were_not_asked_for() -> None:
    flux = base.find(None, None)

    def decided(steps: int | None, lora_type: str = "subject", ranks: int = 1) -> tuple[int | None, int]:
        asked = a_request(Path("pictures.zip"), training_steps=steps, lora_type=lora_type)
        found = decide.decide(asked, [(96, 96)] * 20, flux, None, {}, lambda line: None, ranks)
        return found.suggested_steps, found.settings.steps

    assert decided(None) == (1000, 1000)
    assert decided(None, ranks=8) == (1000, 125)
    assert decided(1000) == (None, 1000)
    assert decided(None, "style")[0] is None
