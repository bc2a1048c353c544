"""What the steps of a job hand one another: what every one has at hand, and what each leaves for the next."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captioner.text import Caption, Rules
from lora.file.names import Pair
from lora.flux.base import Base
from lora.flux.hardware import Gpu
from lora.pictures.photos import Photo
from lora.pictures.views import Box
from lora.request import Secrets, TrainRequest
from lora.training.decide import Decided
from lora.training.state import Keeper
from lora.training.watch import Metric, Remembering, Stages
from lora.training.work import Material
from lora.trigger import Subject


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Desk:
    """What was asked, on which machine, and who is told."""

    request: TrainRequest
    secrets: Secrets
    flux_base: str | None
    captioner: str | None
    gpu: Gpu | None
    work: Path
    """A folder for everything that is gone afterwards."""
    states: str | None = None
    """The folder for states of unfinished trainings, which CHECKPOINTS names."""
    eye: str | None = None
    """What EYE names; see `lora.flux.eye.find`."""
    log: Remembering
    metric: Metric
    stage: Stages
    ranks: int = 1
    """Processes that train together, one a GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gathered:
    """What a training begins with: pictures, base, decisions, and the LoRA that it goes on from."""

    found: Sequence[Photo]
    sizes: Mapping[str, tuple[int, int]]
    """Width and height of each photo, upright, by its name."""
    copies: frozenset[str]
    """The photos of which another one is nearly a copy."""
    data: str
    """SHA-256 of pictures and captions."""
    flux: Base
    modules: Sequence[str]
    """Names of the layers to train."""
    rules: Mapping[str, Rules]
    """Of the captions, by trigger word."""
    decided: Decided
    keeper: Keeper
    """Has the state of the same request, where it was interrupted."""
    start: Mapping[str, Pair] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Captioned:
    """A caption for every picture, by its name."""

    captions: Mapping[str, Caption]
    subjects: Mapping[str, Subject]
    """By trigger word; with the class noun that its folder's name has or the captioning model saw."""
    boxes: Mapping[str, Box]
    """Where the subject is in each picture, where the model was asked and said so."""
    warnings: Sequence[str] = ()
    """What was warned of meanwhile."""

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def of(told: Mapping[str, Any]) -> "Captioned":
        """From what `record` gave."""
        return Captioned(
            captions={name: Caption(**own) for name, own in told["captions"].items()},
            subjects={word: Subject(**own) for word, own in told["subjects"].items()},
            boxes=told["boxes"],
            warnings=told["warnings"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """What is trained on, and how each picture looks."""

    material: Material
    thumbnails: Mapping[str, bytes]
    decided: Decided
    """With what was decided meanwhile."""
