"""What is decided for a training."""

from pathlib import Path

from lora.flux import base
from lora.flux.hardware import GIB, Gpu
from lora.pictures import buckets
from lora.training import decide, prior
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


def test_the_plan_counts_a_recording_for_each_size_of_the_pictures_and_of_what_preserves_the_base() -> None:
    shapes, sides = [(1000, 1000), (1500, 1000), (1000, 1500)], (64, 96)
    sizes = {size for shape in shapes for size in buckets.buckets_for(*shape, sides)}
    asked = a_request(Path("pictures.zip"), resolution="64,96")
    gpu = Gpu(name="a GPU", memory=80 * GIB)
    found = decide.decide(asked, shapes, base.find(None, None), gpu, {}, lambda line: None)
    drawn = prior.shared_out([(high // 8, wide // 8) for wide, high in sizes], found.settings.prior_prompts)
    assert len(sizes) == len({*drawn}) == 6
    assert "to record 12 passes" in found.plan.reason
    alone = decide.decide(
        a_request(Path("pictures.zip"), resolution="64,96", preservation="off"),
        shapes,
        base.find(None, None),
        gpu,
        {},
        lambda line: None,
    )
    assert "to record 6 passes" in alone.plan.reason
