"""What every step of a job has at hand."""

import dataclasses
from pathlib import Path

from lora.flux.hardware import Gpu
from lora.request import Secrets, TrainRequest
from lora.training.watch import Metric, Remembering, Stages


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
    eye: str | None = None
    """What EYE names; see `lora.flux.eye.find`."""
    log: Remembering
    metric: Metric
    stage: Stages
    ranks: int = 1
    """Processes that train together, one a GPU."""
