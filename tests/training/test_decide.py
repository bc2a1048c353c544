"""What is decided for a training."""

from lora.training import decide


def test_the_largest_of_several_resolutions_trains_a_subject_half_as_often() -> None:
    bound, _ = decide.half_above("subject", (512, 768, 1024))
    assert (768 // 16) ** 2 < bound < (960 // 16) * (1024 // 16)
    assert decide.half_above("subject", (1024,))[0] == decide.half_above("style", (512, 1024))[0] == 0
