"""A further rank for the tests: the trainer's own program, with another task or a fault. Also what both ranks do."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import adapter
from lora.flux.encode import Example, Text
from lora.flux.hardware import Plan
from lora.training import fit, learn, rank
from lora.training.fit import Settings
from lora.training.graphs import Passes
from lora.training.prior import Prior
from lora.training.ranks import World


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """A training without a base of files."""

    plan: Plan
    transformer: FluxTransformer2DModel
    examples: Sequence[Example]
    priors: Sequence[Prior]
    texts: Mapping[str, Text]
    settings: Settings
    threads: int


def gradient(lesson: Lesson, parameters: Sequence[Tensor], number: int) -> Tensor:
    """Of one picture, the `number`th example, with the noise of that rank."""
    passes = Passes(parameters, torch.Generator().manual_seed(lesson.settings.seed + number))
    example = lesson.examples[number]

    def loss(*given: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(lesson.settings.seed + number)
        return fit.picture_loss(lesson.transformer, example.size, generator, lesson.settings, *given)

    passes("a picture", loss, fit.rows_of_examples([example], [example.caption], lesson.texts))
    return torch.cat([one.flatten() for one in passes.gradients])


def learned(lesson: Lesson, join: Callable[[], World]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The mean gradient of a picture each, as every rank has it, and every rank's weights and losses of a training."""
    torch.set_num_threads(lesson.threads)
    parameters = adapter.attach(lesson.transformer, 4, seed=3)
    world = join()
    own = gradient(lesson, parameters, world.rank)
    world.average(own)
    reports = list(
        fit.fit(
            lesson.transformer, parameters, lesson.examples, lesson.priors, lesson.texts, lesson.settings, world=world
        )
    )
    after = [*(p.detach() for p in parameters), torch.stack([at.loss for at in reports]), reports[-1].skipped]
    found = world.gather([own]), world.gather([after])
    if world.rank:
        world.average(own)  # and rank 0 does not come: it is ended meanwhile
    return found


def runs_out() -> None:
    """From now on the memory runs out at the second step, unless blocks are recomputed."""
    real = fit.fit

    def short_of_memory(transformer: FluxTransformer2DModel, *arguments: Any) -> Iterator[fit.StepReport]:
        for at in real(transformer, *arguments):
            if at.step == 2 and not transformer.is_gradient_checkpointing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            yield at

    fit.fit = short_of_memory


if __name__ == "__main__":
    from tests.training import a_rank  # under the name by which rank 0 pickles a Lesson

    if sys.argv[1] == "runs out":
        a_rank.runs_out()
    else:
        learn.assist = a_rank.learned  # type: ignore[assignment]
    rank.main(sys.argv[2:])
