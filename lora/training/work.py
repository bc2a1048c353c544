"""What a training is given: the pictures and prompts, encoded, and how to train on them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora.file.names import Pair
from lora.flux.base import Base
from lora.flux.encode import Example, Text
from lora.flux.hardware import Plan
from lora.training import state
from lora.training.examine import Questions
from lora.training.fit import Settings
from lora.training.prompts import Asked


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What is trained, and on what, encoded once: it stays as it is when the training has to begin again."""

    modules: Sequence[str]
    rank: int
    resolutions: Sequence[int]
    learned: Sequence[Example]
    unseen: Sequence[Example]
    """Of the pictures that are held out of the first part of the training."""
    questions: Questions
    """What the verdict asks."""
    texts: Mapping[str, Text]
    asked: Sequence[str]
    """The previews' prompts."""
    preview_every: int
    """Steps; 0: previews at the end alone."""
    apart: Sequence[Asked]
    """The preservation prompts."""
    start: Mapping[str, Pair] | None
    """The LoRA to go on from."""
    suggested_steps: int | None = None
    """Of `decide.Decided`."""
    all_checkpoints: bool = False
    """Whether the kept checkpoints that are not returned are handed out too."""

    def made_of(self, settings: Settings, ranks: int) -> str:
        """A hash of what a training is made of: only one that is made of the same can go on from another's state."""
        shown = [(example.name, example.size, example.caption) for example in (*self.learned, *self.unseen)]
        asked = (self.apart, self.asked, self.preview_every)
        return state.settings_of(settings, ranks, self.modules, self.rank, self.resolutions, shown, *asked)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What every rank is given."""

    material: Material
    flux: Base
    plan: Plan
    settings: Settings
    threads: int
    """Of the CPU, the same for all: a sum over a tensor can depend on how many add it up."""
    keeps: bool
    """Whether the training's state is saved now and then."""
    saved: Mapping[str, Any] | None
    """The state that it goes on from, as `fit` gave it."""
