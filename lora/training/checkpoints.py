"""The LoRA's weights at some steps of the training, and which of them is returned."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.file import weights
from lora.file.names import Pair
from lora.flux import adapter
from lora.flux.adapter import FILE_DTYPE
from lora.training.examine import Glance

LOOKED_AT = 10
"""Times that the training is looked at, evenly spread."""
KEPT_FROM = 0.5
"""Share of the steps after which weights are kept: 50, 60, … 100 %."""
BETTER_BY = 0.02
"""How much better an earlier checkpoint must be to be returned in the last one's place. Looks at a few pictures tell
no smaller difference (docs/quality.md)."""
TURNED_BY = 0.1
"""How much the gain on held-out pictures must fall below its best, two looks in a row, before the training is stopped.

On the toy base 19 sound trainings fell by up to .17 in one look and by .04 in two in a row; a training of 8 pictures,
2000 steps at a high rate without preservation fell by .12 and .17."""


def due(steps: int) -> list[int]:
    """The steps after which a training is looked at."""
    return sorted({max(1, round(steps * i / LOOKED_AT)) for i in range(1, LOOKED_AT + 1)})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    step: int
    glance: Glance
    weights: Sequence[Tensor]
    """In bf16 on the CPU, as the file holds them."""

    @property
    def score(self) -> float:
        """What it explains of the pictures, less what it moved the base by."""
        return self.glance.own - self.glance.drift


class Checkpoints:
    """Keeps the weights of a training at some steps."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], steps: int, stop_overfitted: bool = True) -> None:
        self._parameters = parameters
        self.stop_overfitted = stop_overfitted
        self.due = due(steps)
        self._from = KEPT_FROM * steps
        self.kept: list[Checkpoint] = []

    def keeps(self, step: int) -> bool:
        """Whether the weights of this step are kept."""
        return step >= self._from

    def keep(self, step: int, glance: Glance) -> None:
        """Keeps the weights of a step that is past half, where they are sound: where the loss is a number."""
        if self.keeps(step) and math.isfinite(glance.loss):
            copies = [parameter.detach().to("cpu", FILE_DTYPE, copy=True) for parameter in self._parameters]
            self.kept.append(Checkpoint(step=step, glance=glance, weights=copies))

    def best(self) -> tuple[Checkpoint, str]:
        """The checkpoint to return, and why."""
        best = self.overfitted() if self.stop_overfitted else None
        return (best, "the loss on held-out pictures was lowest there") if best else self.choose()

    def choose(self) -> tuple[Checkpoint, str]:
        """The last checkpoint, unless one before was better by BETTER_BY; and why."""
        last, best = self.kept[-1], max(self.kept, key=lambda kept: kept.score)
        if best.score >= last.score + BETTER_BY:
            return best, (
                f"its loss on the pictures is {best.glance.own:.0%} below the base's and it changes other prompts by"
                f" {best.glance.drift:.0%}; step {last.step}: {last.glance.own:.0%} and {last.glance.drift:.0%}"
            )
        return last, "no earlier one was better"

    def overfitted(self) -> Checkpoint | None:
        """The checkpoint with the best gain on held-out pictures, where the last two looks were below it by TURNED_BY;
        None where they were not, or where no picture is held out."""
        seen = [(kept.glance.unseen, kept) for kept in self.kept if kept.glance.unseen is not None]
        if len(seen) < 3:
            return None
        gain, best = max(seen, key=lambda pair: pair[0])
        return best if max(unseen for unseen, _ in seen[-2:]) < gain - TURNED_BY else None

    def state(self) -> list[dict[str, Any]]:
        """The kept ones, as plain values; for `go_on`."""
        return [
            {"step": kept.step, "glance": dataclasses.asdict(kept.glance), "weights": list(kept.weights)}
            for kept in self.kept
        ]

    def go_on(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Takes up what `state` gave."""
        self.kept = [
            Checkpoint(step=kept["step"], glance=Glance(**kept["glance"]), weights=kept["weights"]) for kept in state
        ]

    def all_but(self, best: Checkpoint, transformer: FluxTransformer2DModel) -> dict[int, dict[str, Pair]]:
        """The LoRA at the other kept steps; leaves one of them in the transformer."""
        others = {}
        for kept in self.kept:
            if kept is not best:
                self.put_back(kept)
                others[kept.step] = adapter.trained(transformer)
        return others

    @torch.no_grad()
    def put_back(self, checkpoint: Checkpoint) -> None:
        """Puts the checkpoint's weights in place of those of the last step."""
        for parameter, kept in zip(self._parameters, checkpoint.weights, strict=True):
            parameter.copy_(kept)


def write(folder: Path, others: Mapping[int, Mapping[str, Pair]], header: Mapping[str, str]) -> list[Path]:
    """Writes the weights of each step to `step-0500.safetensors` in a new folder, with that step in the header; their
    paths. Nothing where there are none."""
    files = []
    for step, pairs in sorted(others.items()):
        folder.mkdir(exist_ok=True)
        files.append(folder / f"step-{step:04}.safetensors")
        weights.write(files[-1], pairs, {**header, "ss_steps": str(step)})
    return files
