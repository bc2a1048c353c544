"""Whether a training has learned enough before its end: fewer steps would then do the next time. It only says so."""

from collections.abc import Sequence

from lora.result import verdict
from lora.training.examine import Glance

TENTHS = (6, 8)
"""Of the steps, after which it is asked."""
UNSEEN, TRAINED = 0.8, 0.85
"""Gain from which on it may be enough: where pictures are held out the top of the verdict's scale, where none is its
bound of clear."""
STILL = 0.04
"""How much the gain may have risen in the last two evaluations. Toy: 10 of 14 trainings of subjects said so at 60 %;
trained for so many steps alone they were shown in .89 of the drawings, with all steps in .88 (docs/experiments.md)."""


def learned(glances: Sequence[Glance]) -> tuple[float, float] | None:
    """The gain that the verdict goes by at the last of these looks, and how much it rose over the best look but the
    last two, where that says that the training has learned enough; None where not."""
    unseen: float | None = None
    gains = []
    for glance in glances:
        unseen = unseen if glance.unseen is None else glance.unseen
        gains.append(verdict.explained(glance.own, unseen))
    if len(gains) < 3:
        return None
    rise = gains[-1] - max(gains[:-2])
    return (gains[-1], rise) if gains[-1] >= (TRAINED if unseen is None else UNSEEN) and rise < STILL else None
