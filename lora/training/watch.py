"""What a run tells while it runs: its stages, warnings, a line every few seconds, and looks at it between the steps."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from lora.result.curve import Curve
from lora.training import validation
from lora.training.fit import StepReport
from lora.training.tracker import Tracker

Log = Callable[[str], None]
Metric = Callable[[str, float], None]

SECONDS_BETWEEN_LINES = 3.0
RATE_OVER = 20
"""Lines, a minute of them: long enough for all sizes of pictures, short enough for a GPU that has just warmed up."""
WARNING = "warning: "
"""How a line of the log begins that the report repeats."""


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


@dataclass(frozen=True, kw_only=True)
class Audience:
    """All who are told how a training goes: the log, Replicate's metrics, the stages' seconds, Weights & Biases."""

    log: Log
    metric: Metric
    stage: Stages
    tracked: Tracker


def follow(reports: Iterator[StepReport], steps: int, watch: Callable[[int], bool], told: Audience) -> list[float]:
    """Runs the loop, with a line every few seconds; the loss of every step. `watch(step)` says when to stop.

    The rate is of the last RATE_OVER lines, and leaves out the first step, before which passes are recorded.
    Raises ValueError where the loss is no longer a number.
    """
    losses = []
    lines = deque[StepReport](maxlen=RATE_OVER)
    smooth = float("nan")
    for at in reports:
        losses.append(at.loss)
        if not lines or at.seconds - lines[-1].seconds >= SECONDS_BETWEEN_LINES or at.step == steps:
            loss = at.loss.item()
            if not torch.isfinite(at.loss):
                step, bad = next((i, float(loss)) for i, loss in enumerate(losses, 1) if not torch.isfinite(loss))
                raise ValueError(f"the loss at step {step} is {bad}: the training broke down; lower learning_rate")
            smooth = loss if smooth != smooth else 0.8 * smooth + 0.2 * loss
            measured = {"progress": at.step / steps, "loss": smooth}
            values = {"loss": loss, "prior_loss": at.prior_loss.item(), "learning_rate": at.learning_rate}
            pace = f"{at.seconds:.1f} s for the first"
            if lines:
                since = lines[0]
                values["seconds_per_step"] = rate = (at.seconds - since.seconds) / (at.step - since.step)
                measured["seconds_left"] = left = rate * (steps - at.step)
                pace = f"{rate:.3f} s/it, {int(left) // 60}:{int(left) % 60:02d} left"
            told.log(
                f"{bar(at.step, steps)}, loss {smooth:.4f}, prior {values['prior_loss']:.4f},"
                f" lr {at.learning_rate:.2g}, {pace}"
            )
            for name, value in measured.items():
                told.metric(name, value)
            told.tracked.numbers(at.step, values)
            lines.append(at)
        if watch(at.step):
            break
    return torch.stack(losses).tolist()


def bar(step: int, steps: int) -> str:
    """` 50%|#####     | 500/1000`: how tqdm shows progress, from which Replicate's clients read it.

    Their patterns: `Prediction.Progress` of replicate-python, `parseProgressFromLogs` of replicate-javascript.
    """
    share = step / steps
    return f"{int(100 * share):3d}%|{'#' * int(10 * share):<10}| {step}/{steps}"


class Watch:
    """What is looked at between the steps: the loss on fixed noise, a dozen times, and previews where asked for."""

    def __init__(
        self,
        steps: int,
        check: Callable[[], float],
        turn: validation.Turn | None,
        sketch: Callable[[], list[Image.Image]],
        asked: Sequence[str],
        preview_every: int,
        told: Audience,
    ) -> None:
        """`sketch` draws a picture for each prompt of `asked`, or none where it cannot."""
        self._steps, self._check, self._turn, self._sketch, self._asked = steps, check, turn, sketch, asked
        self._preview_every, self._told = preview_every, told
        self.checks = [(0, check())]
        self._drawn: dict[int, list[Image.Image]] = {}
        self.best: int | None = None
        """The step whose weights were put back, where an earlier one's were better than the last's."""

    def __call__(self, step: int) -> bool:
        """To be called after every step; True where the training is to stop."""
        told = self._told
        if step % -(-self._steps // validation.CHECKS) == 0 or step == self._steps:
            loss = self._check()
            self.checks.append((step, loss))
            told.log(f"step {step}/{self._steps}: {loss:.4f} on fixed noise, {self.checks[0][1]:.4f} before training")
            told.metric("validation_loss", loss)
            told.tracked.numbers(step, {"validation_loss": loss})
            if self._turn:
                turned = self._turn.has_come(step, loss)
                if turned or (step == self._steps and 0 < self._turn.step < step):
                    self._turn.go_back()
                    self.best = self._turn.step
                    why = "has turned, so the training stops" if turned else "was lowest before the end"
                    told.log(f"the held-out picture's loss {why}: the weights of step {self.best} are kept")
                    return True
        if self._preview_every and step % self._preview_every == 0 and step < self._steps:
            self._drawn[step] = self._sketch()
            told.tracked.pictures(self._asked, step, self._drawn[step])
        return False

    def drawn_before(self, step: int) -> dict[int, list[Image.Image]]:
        """What was drawn after fewer steps than these, where it could be drawn; one picture a prompt each time."""
        return {at: pictures for at, pictures in self._drawn.items() if at < step and pictures}

    def curve(self, losses: Sequence[float]) -> Curve:
        return Curve(losses=losses, checks=self.checks, held_out=self._turn is not None, best=self.best)
