"""What a run tells while it runs."""

import re
from collections.abc import Sequence

import torch

from lora.training import tracker, watch
from lora.training.fit import StepReport
from lora.training.watch import Audience, Stages


def _followed(seconds: Sequence[float], steps: int) -> tuple[list[str], list[float]]:
    """The log's lines, and what was said of the time left, where the steps end after so many seconds."""
    nothing = torch.tensor(0.0)
    lines: list[str] = []
    told: list[tuple[str, float]] = []
    audience = Audience(
        log=lines.append,
        metric=lambda name, value: told.append((name, value)),
        stage=Stages(lines.append),
        tracked=tracker.Tracker(None, lines.append),
    )
    reports = (
        StepReport(
            step=step,
            loss=nothing,
            prior_loss=nothing,
            skipped=nothing,
            in_a_row=nothing,
            balance=None,
            learning_rate=1e-4,
            seconds=at,
        )
        for step, at in enumerate(seconds, 1)
    )
    watch.follow(reports, steps, lambda step: step == len(seconds), audience)
    return lines, [value for name, value in told if name == "seconds_left"]


def test_the_first_step_which_waits_for_recordings_does_not_count_into_the_rate_and_the_time_left() -> None:
    lines, left = _followed((120.0, 124.0, 128.0, 132.0), 30)
    assert lines[0] == "  3%|          | 1/30, loss 0.0000, lr 0.0001, 120.0 s for the first"
    assert lines[1].endswith("4.000 s/it, 1:52 left")
    assert lines[-1].endswith("4.000 s/it, 1:44 left")
    assert left == [112.0, 108.0, 104.0]


PYTHON = re.compile(r"^\s*(?P<percentage>\d+)%\s*\|.+?\|\s*(?P<current>\d+)\/(?P<total>\d+)")
JAVASCRIPT = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)")
"""What replicate-python (replicate/prediction.py) and replicate-javascript (lib/util.js) look for in a line."""


def test_replicates_clients_read_the_progress_from_the_log() -> None:
    lines, _ = _followed([4.0 * step for step in range(1, 31)], 30)
    for pattern in (PYTHON, JAVASCRIPT):
        read = [tuple(map(int, match.groups())) for line in lines if (match := pattern.match(line.strip()))]
        assert len(read) == 30
        assert read[0] == (3, 1, 30)
        assert read[-1] == (100, 30, 30)
        assert [done for _, done, _ in read] == list(range(1, 31))
    assert not PYTHON.match(watch.WARNING + "a line of another kind 3|4|5/6")


def test_the_rate_is_that_of_the_last_minute() -> None:
    """A GPU's first steps at each size are slow; they say nothing of the time that is left."""
    slow = [8.0 * step for step in range(1, 11)]
    quick = [80.0 + 4.0 * step for step in range(1, 31)]
    lines, left = _followed([*slow, *quick], 100)
    assert lines[9].endswith("8.000 s/it, 12:00 left")
    assert lines[-1].endswith("4.000 s/it, 4:00 left")
    assert left[-1] == 240.0
