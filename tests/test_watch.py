"""What a run tells while it runs."""

from collections.abc import Iterator

import torch

from lora import tracker, watch
from lora.fit import StepReport
from lora.watch import Audience, Stages


def test_the_first_step_which_compiles_does_not_count_into_the_rate_and_the_time_left() -> None:
    def reports() -> Iterator[StepReport]:
        for step, seconds in enumerate((120.0, 124.0, 128.0, 132.0), 1):
            nothing = torch.tensor(0.0)
            yield StepReport(step=step, loss=nothing, prior_loss=nothing, learning_rate=1e-4, seconds=seconds)

    lines: list[str] = []
    told: list[tuple[str, float]] = []
    audience = Audience(
        log=lines.append,
        metric=lambda name, value: told.append((name, value)),
        stage=Stages(lines.append),
        tracked=tracker.Tracker(None, lines.append),
    )
    watch.follow(reports(), 30, lambda step: step == 4, audience)
    assert lines[0] == "step 1/30 (3%), loss 0.0000, prior 0.0000, lr 0.0001, 120.0 s for the first"
    assert lines[1].endswith("4.000 s/it, 1:52 left")
    assert lines[-1].endswith("4.000 s/it, 1:44 left")
    assert [value for name, value in told if name == "seconds_left"] == [112.0, 108.0, 104.0]
