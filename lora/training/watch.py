"""What a run tells while it runs: its stages, warnings, a line every few seconds, and looks at it between the steps."""

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora.training import enough
from lora.training.checkpoints import LOOKED_AT, Checkpoints
from lora.training.examine import Examination, Glance
from lora.training.fit import StepReport
from lora.training.tracker import Tracker
from lora.training.work import Material

Log = Callable[[str], None]
Metric = Callable[[str, float], None]

SECONDS_BETWEEN_LINES = 3.0
RATE_OVER = 20
"""Lines, a minute of them: long enough for all sizes of pictures, short enough for a GPU that has just warmed up."""
MOST_IN_A_ROW = 5
"""Steps without a finite gradient, one after the other, before a training counts as broken down."""
WARNING = "warning: "
"""How a line of the log begins that the report repeats."""


class BrokeDown(ValueError):
    """The training has no finite gradient any more."""

    def __init__(self, losses: Sequence[float]) -> None:
        self.losses = list(losses)
        bad = [step for step, loss in enumerate(self.losses, 1) if not math.isfinite(loss)]
        step = bad[0] if bad else len(self.losses)
        super().__init__(
            f"the loss at step {step} is {self.losses[step - 1]}: the training broke down; lower learning_rate"
        )


class Remembering:
    """A log that also keeps the warnings that went through it, for the report."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.warnings: list[str] = []

    def __call__(self, line: str) -> None:
        self._log(line)
        if line.startswith(WARNING):
            self.warnings.append(line.removeprefix(WARNING))


class Stages:
    """Names each stage in the log as it begins, and remembers its seconds."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._log(f"== {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def table(self) -> str:
        parts = [f"{name} {seconds:.1f}" for name, seconds in self.seconds.items()]
        return f"seconds: {', '.join(parts)}; {sum(self.seconds.values()):.1f} in all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audience:
    """All who are told how a training goes: the log, Replicate's metrics, the stages' seconds, Weights & Biases."""

    log: Log
    metric: Metric
    stage: Stages
    tracked: Tracker


def follow(
    reports: Iterator[StepReport],
    steps: int,
    watch: Callable[[int], bool],
    told: Audience,
    before: Sequence[float] = (),
    between: Callable[[StepReport, Sequence[Tensor]], object] = lambda report, losses: None,
) -> list[float]:
    """Runs the loop, with a line every few seconds; the loss of every step. `watch(step)` says when to stop.

    `before` are the losses of the steps before the first of `reports`; `between` is given each report and the losses
    since then, still on their device, when `watch` has seen it.

    The rate is of the last RATE_OVER lines, and leaves out the first step, before which passes are recorded.
    A few steps without a finite gradient are skipped by `fit`, and told at the end. Raises BrokeDown where there are
    more than MOST_IN_A_ROW one after the other.
    """
    losses: list[Tensor] = []
    last: StepReport | None = None
    lines = deque[StepReport](maxlen=RATE_OVER)
    smooth = float("nan")
    for at in reports:
        last = at
        losses.append(at.loss)
        if not lines or at.seconds - lines[-1].seconds >= SECONDS_BETWEEN_LINES or at.step == steps:
            loss = at.loss.item()
            if at.in_a_row > MOST_IN_A_ROW:
                raise BrokeDown(all_of(before, losses))
            if math.isfinite(loss):
                smooth = loss if smooth != smooth else 0.8 * smooth + 0.2 * loss
            values = _numbers(at)
            measured = {"progress": at.step / steps, "loss": smooth}
            pace = f"{at.seconds:.1f} s for the first"
            if lines:
                since = lines[0]
                values["seconds_per_step"] = rate = (at.seconds - since.seconds) / (at.step - since.step)
                measured["seconds_left"] = left = rate * (steps - at.step)
                pace = f"{rate:.3f} s/it, {int(left) // 60}:{int(left) % 60:02d} left"
            told.log(f"{bar(at.step, steps)}, loss {smooth:.4f}, {_in_words(values)}, {pace}")
            for name, value in measured.items():
                if math.isfinite(value):
                    told.metric(name, value)
            told.tracked.numbers(at.step, values)
            lines.append(at)
        if watch(at.step):
            break
        between(at, losses)
    if last and (skipped := int(last.skipped.item())):
        done = len(before) + len(losses)
        told.log(f"{WARNING}{skipped} of {done} steps had a gradient that was not finite and were skipped")
    return _without_gaps(all_of(before, losses))


def all_of(before: Sequence[float], losses: Sequence[Tensor]) -> list[float]:
    """The losses of earlier steps and of these, which are read from their device at once."""
    return [*before, *(torch.stack(list(losses)).tolist() if losses else ())]


def _numbers(at: StepReport) -> dict[str, float]:
    """What a step tells, read from its device."""
    values = {"loss": at.loss.item(), "prior_loss": at.prior_loss.item(), "learning_rate": at.learning_rate}
    if at.balance:
        values["gradient_norm"] = at.balance.pictures.item()
        values["prior_gradient_norm"] = at.balance.preservation.item()
        values["prior_weight"] = at.balance.weight.item()
    return values


def _in_words(values: Mapping[str, float]) -> str:
    told = f"lr {values['learning_rate']:.2g}"
    if "prior_weight" in values:
        told = f"prior {values['prior_loss']:.4f} (weight {values['prior_weight']:.2g}), {told}"
    return told


def _without_gaps(losses: Sequence[float]) -> list[float]:
    """The losses, each that is not finite as the one before it: a curve can be drawn of them."""
    filled: list[float] = []
    for loss in losses:
        filled.append(loss if math.isfinite(loss) else filled[-1] if filled else 0.0)
    return filled


def bar(step: int, steps: int) -> str:
    """` 50%|#####     | 500/1000`: how tqdm shows progress, from which Replicate's clients read it.

    Their patterns: `Prediction.Progress` of replicate-python, `parseProgressFromLogs` of replicate-javascript.
    """
    share = step / steps
    return f"{int(100 * share):3d}%|{'#' * int(10 * share):<10}| {step}/{steps}"


def preview_due(step: int, steps: int, every: int) -> bool:
    """Whether previews are drawn after this step, one of `every` (0: never); the last step's are drawn at the end."""
    return every > 0 and step % every == 0 and step < steps


class Watch:
    """What is looked at between the steps: the LoRA on fixed noise, ten times, and previews where asked for."""

    def __init__(
        self,
        steps: int,
        held_out_until: float,
        examination: Examination,
        checkpoints: Checkpoints,
        sketch: Callable[[], list[Image.Image]],
        material: Material,
        told: Audience,
    ) -> None:
        """`held_out_until` is the share of the steps for which held-out pictures are kept out; `sketch` draws a picture
        for each of the previews' prompts, or none where it cannot."""
        self._steps, self._held_out_until = steps, int(held_out_until * steps)
        self._examination, self._checkpoints = examination, checkpoints
        self._sketch, self._asked, self._preview_every = sketch, material.asked, material.preview_every
        self._suggested_steps, self._told = material.suggested_steps, told
        self.checks = [(0, examination.start())]
        self._glances: list[Glance] = []
        self.enough: int | None = None
        """The training_steps after which enough was learned."""
        self._drawn: dict[int, list[Image.Image]] = {}

    def looks(self, step: int) -> bool:
        """Whether there is anything to see at this step."""
        return step in self._checkpoints.due or preview_due(step, self._steps, self._preview_every)

    def __call__(self, step: int) -> bool:
        """To be called after every step; True where the training is to stop."""
        told = self._told
        if step in self._checkpoints.due:
            glance = self._examination.glance(unseen=step <= self._held_out_until, moved=self._checkpoints.keeps(step))
            self.checks.append((step, glance.loss))
            self._glances.append(glance)
            self._checkpoints.keep(step, glance)
            values = {"validation_loss": glance.loss, "gain": glance.own}
            values |= {"drift": glance.drift} if self._checkpoints.keeps(step) else {}
            before = self.checks[0][1]
            line = f"step {step}/{self._steps}: loss on fixed noise {glance.loss:.4f}, before training {before:.4f}"
            if glance.unseen is not None:
                values["gain_unseen"] = glance.unseen
                line += (
                    f"; below the base's by {glance.own:.0%} on training pictures, {glance.unseen:.0%} on held-out ones"
                )
            told.log(line)
            self._tell_whether_enough(step)
            if step == max(due for due in self._checkpoints.due if due <= max(self._held_out_until, 1)):
                self._examination.last_look_at_unseen(glance)
            told.metric("validation_loss", glance.loss)
            told.tracked.numbers(step, values)
            if step < self._steps and (best := self._checkpoints.overfitted()):
                since = f"the loss on held-out pictures was lowest at step {best.step}, and has risen since"
                if self._checkpoints.stop_overfitted:
                    told.log(f"overfitting: {since}; the training stops")
                    return True
                told.log(f"{WARNING}perhaps overfitting: {since}; with checkpoints=all you get that step's LoRA too")
        if preview_due(step, self._steps, self._preview_every):
            self._drawn[step] = self._sketch()
            told.tracked.pictures(self._asked, step, self._drawn[step])
        return False

    def state(self) -> dict[str, Any]:
        """What was seen so far, as plain values; for `go_on`."""
        drawn = {step: [np.asarray(picture) for picture in pictures] for step, pictures in self._drawn.items()}
        tensors = {step: [torch.from_numpy(pixels.copy()) for pixels in each] for step, each in drawn.items()}
        glances = [dataclasses.asdict(glance) for glance in self._glances]
        seen = {"glances": glances, "enough": self.enough, "unseen": self._examination.state()}
        return {"checks": self.checks, "drawn": tensors, **seen}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.checks = [tuple(check) for check in state["checks"]]
        self._drawn = {
            step: [Image.fromarray(pixels.numpy()) for pixels in each] for step, each in state["drawn"].items()
        }
        self._glances = [Glance(**glance) for glance in state["glances"]]
        self.enough = state["enough"]
        self._examination.go_on(state["unseen"])

    def _tell_whether_enough(self, step: int) -> None:
        """Where the number of steps was decided for the user."""
        due = [round(self._steps * tenths / LOOKED_AT) for tenths in enough.TENTHS]
        if self._suggested_steps is None or self.enough or step not in due:
            return
        if found := enough.learned(self._glances):
            gain, rise = found
            self.enough = round(self._suggested_steps * step / self._steps)
            self._told.log(
                f"learned enough at step {step} of {self._steps}: with the trigger word the loss is {gain:.0%} below"
                f" the base's, and was {gain - max(rise, 0):.0%} two evaluations before; training_steps={self.enough}"
                " would probably be enough"
            )

    def drawn_before(self, step: int) -> dict[int, list[Image.Image]]:
        """What was drawn after fewer steps than these, where it could be drawn; one picture a prompt each time."""
        return {at: pictures for at, pictures in self._drawn.items() if at < step and pictures}
