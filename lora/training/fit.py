"""The optimizer and the loop: a generator, so that its caller decides what to do between steps."""

import dataclasses
import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import flow
from lora.flux.encode import Example, Text
from lora.training.balance import Balance
from lora.training.graphs import Pass, Passes
from lora.training.masters import Masters, Mover
from lora.training.prior import Prior
from lora.training.ranks import ALONE, World


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; every value decided, nothing left to guess.

    Made from the request and a row of `recipe` by `decide`; the lab (`script/bench quality`) changes single fields.
    """

    steps: int
    batch_size: int
    learning_rate: float
    caption_dropout_rate: float
    prior_ratio: float
    """Norm of the preservation's gradient over that of the pictures', in a step that looks at both
    (`balance.Balance`); 0: no preservation."""
    seed: int
    timestep_mean: float = 0.0
    """Of the logit-normal; see `flow.sample_timesteps`."""
    uniform_share: float = 0.0
    """Share of the times that are drawn from 0 to 1 evenly, instead of by the logit-normal."""
    guidance: float = flow.TRAINING_GUIDANCE
    """What the transformer's guidance input is given, with the pictures and with the base's own draws."""
    held: float = 0.0
    """Share of the training in which the learning rate stays at its peak; see `learning_rate_at`."""
    weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    ema_decay: float = 0.0
    """Share of itself that the running mean of the weights keeps at each step; the training ends with that mean in
    their place. 0: no mean, the last weights."""
    half_above: int = 0
    """Image tokens above which an example comes half as often as the others; 0: all come equally often."""
    prior_kinds: tuple[str, ...] = ()
    """What is asked of the base for its own draws, in turn; see `prompts.apart`."""
    prior_prompts: int = 0
    """How many drawings of the base's own there are."""
    prior_every: int = 1
    """Every how many steps the preservation prompts are looked at."""
    late_from: float = 0.7
    """Share of the steps after which the held-out pictures are trained on too."""
    prior_of_pictures: bool = False
    """Whether the states of prompts that come from captions are the pictures with noise, instead of drawings."""
    prior_guidance: float = flow.TRAINING_GUIDANCE
    """Of the drawings; the predictions that are kept are those at `guidance`."""
    prior_weight: float = 0.5
    """Of their gradient at the first look; it is steered from there."""
    stop_overfitted: bool = True
    """Whether a training whose gain on held-out pictures falls is stopped, or only warned of."""
    full: bool = False
    """Whether the layers' own weights are trained, by Adafactor, and the LoRA is made of their change
    (`lora.training.full`). Then nothing of Adam's and no running mean has a meaning."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepReport:
    step: int
    """From 1."""
    loss: Tensor
    """A scalar still on its device: reading it waits for the GPU, so read it only where it is shown."""
    prior_loss: Tensor
    """Of the last step that looked at the preservation prompts; 0 before."""
    skipped: Tensor
    """Steps so far whose gradient was not finite: they changed nothing."""
    in_a_row: Tensor
    """Of these the last ones without a sound step between."""
    balance: Balance | None
    """Weight and norms of the preservation at the last look; None where there is none."""
    learning_rate: float
    seconds: float
    """Since the loop began."""
    state: Callable[[], dict[str, Any]] = dict
    """All that a training needs to go on after this step, by `fit`'s `saved`; to be called before the next."""


def batches(
    examples: Sequence[Example], batch_size: int, rng: random.Random, half_above: int = 0
) -> Iterator[list[Example]]:
    """Endless full batches of one size each, in which every example comes equally often; those of more than
    `half_above` image tokens, where that is not 0, half as often.

    Every round takes each example once, in a new order, and of the large ones every second, the others in the next.
    Where a size is left with fewer than a batch, they wait for the next round. A smaller batch would be a step like any
    other, and its pictures would weigh several times as much.
    """
    large = [example for example in examples if half_above and len(example.mean) > half_above]
    usual = [example for example in examples if example not in large]
    halves = itertools.cycle([large[::2], large[1::2]])
    waiting: dict[tuple[int, int], list[Example]] = {}
    while True:
        ready = []
        due = [*usual, *next(halves)]
        for example in rng.sample(due, len(due)):
            batch = waiting.setdefault(example.size, [])
            batch.append(example)
            if len(batch) == batch_size:
                ready.append(waiting.pop(example.size))
        yield from rng.sample(ready, len(ready))


def learning_rate_at(step: int, steps: int, peak: float, held: float) -> float:
    """Linear warm-up over the first 2 % (50 steps at most), the peak until a share `held` of the rest is over, then
    half a cosine to a tenth of the peak; step from 1. With `held` 1 the peak throughout, without warm-up."""
    if held == 1:
        return peak
    warm_up = min(50, max(1, steps // 50))
    if step < warm_up:
        return peak * step / warm_up
    progress = max(0.0, (step - warm_up) / max(1, steps - warm_up) - held) / (1 - held)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def of_one_size(priors: Sequence[Prior], shares: Sequence[float], count: int, rng: random.Random) -> list[Prior]:
    """`count` of the priors by their shares, all of the size of the first one drawn."""
    [first] = rng.choices(priors, shares)
    same = [(prior, share) for prior, share in zip(priors, shares, strict=True) if prior.size == first.size]
    others, theirs = zip(*same, strict=True)
    return [first, *rng.choices(others, theirs, k=count - 1)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """What one step trains on, all ranks together."""

    step: int
    """From 1."""
    examples: Sequence[Example]
    """Of one size."""
    captions: Sequence[str]
    """One for each example: its own, or the empty one."""
    drawings: Sequence[Prior]
    """States of the base's drawings, of one size; none where the step looks at none."""


def turns(
    examples: Sequence[Example], late: Sequence[Example], priors: Sequence[Prior], settings: Settings, count: int
) -> Iterator[Turn]:
    """What every step of a training looks at, `count` pictures and as many drawings: it depends on the seed alone, so
    that a training that goes on finds its place by counting."""
    rng = random.Random(settings.seed)
    shares = shares_of(priors, settings.timestep_mean)
    source = batches(examples, count, rng, settings.half_above)
    for step in range(1, settings.steps + 1):
        if late and step == int(settings.late_from * settings.steps) + 1:
            source = batches([*examples, *late], count, rng, settings.half_above)
        batch = next(source)
        captions = ["" if rng.random() < settings.caption_dropout_rate else example.caption for example in batch]
        looks = priors and step % settings.prior_every == 0
        drawings = of_one_size(priors, shares, count, rng) if looks else []
        yield Turn(step=step, examples=batch, captions=captions, drawings=drawings)


def picture_loss(
    transformer: FluxTransformer2DModel,
    size: tuple[int, int],
    generator: torch.Generator,
    settings: Settings,
    mean: Tensor,
    std: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """The flow-matching loss of a batch of examples of one size in latent cells, a scalar with a gradient.

    `mean` and `std` are (B, S, 4C), `weights` (B, S), `prompt_embeds` (B, T, D) and `pooled` (B, P), as in Example and
    Text.
    """

    def randn() -> Tensor:
        return torch.randn(mean.shape, generator=generator, device=mean.device).to(mean)

    latents = mean + std * randn()
    noise = randn()
    timesteps = flow.sample_timesteps(len(mean), generator, settings.timestep_mean, settings.uniform_share)
    noisy = flow.add_noise(latents, noise, timesteps)
    text = {"prompt_embeds": prompt_embeds, "pooled": pooled}
    prediction = flow.velocity(transformer, noisy, timesteps, settings.guidance, text, size)
    return flow.flow_loss(prediction, latents, noise, weights)


def prior_loss(
    transformer: FluxTransformer2DModel,
    size: tuple[int, int],
    guidance: float,
    noisy: Tensor,
    timesteps: Tensor,
    velocity: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
) -> Tensor:
    """How far the adapted model has gone from the base on a batch of steps of the base's own drawings, a scalar; the
    tensors are those of Prior and Text."""
    text = {"prompt_embeds": prompt_embeds, "pooled": pooled}
    prediction = flow.velocity(transformer, noisy, timesteps, guidance, text, size)
    return F.mse_loss(prediction.float(), velocity.float())


def rows_of_examples(
    batch: Sequence[Example], captions: Sequence[str], texts: Mapping[str, Text]
) -> list[list[Tensor]]:
    """What `picture_loss` is given of each example under its caption: weights where the examples have them, which all
    or none do."""
    return [
        [example.mean, example.std, *_embeddings(texts, caption), *_present(example.weights)]
        for example, caption in zip(batch, captions, strict=True)
    ]


def rows_of_priors(batch: Sequence[Prior], texts: Mapping[str, Text]) -> list[list[Tensor]]:
    """What `prior_loss` is given of each."""
    times = torch.tensor([prior.timestep for prior in batch])
    return [
        [prior.noisy, time, prior.velocity, *_embeddings(texts, prior.prompt)]
        for prior, time in zip(batch, times, strict=True)
    ]


def _present(weights: Tensor | None) -> list[Tensor]:
    return [] if weights is None else [weights]


def _embeddings(texts: Mapping[str, Text], prompt: str) -> tuple[Tensor, Tensor]:
    return texts[prompt]["prompt_embeds"], texts[prompt]["pooled"]


def shares_of(priors: Sequence[Prior], timestep_mean: float) -> list[float]:
    """How often each state is looked at: half of the looks are where the logit-normal has most pictures, for
    there other words must be told from the trigger word; half at any time, for all of a drawing must stay."""
    return [flow.share_of_timesteps(prior.until, prior.since, timestep_mean, uniform_share=0.5) for prior in priors]


def _masters(
    parameters: Sequence[torch.nn.Parameter], passes: Passes, settings: Settings, rows: int, world: World
) -> Masters:
    return Masters(
        parameters,
        passes,
        world,
        rows=rows,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        epsilon=settings.adam_epsilon,
        ema_decay=settings.ema_decay,
    )


def _go_on(
    saved: Mapping[str, Any], mover: Mover, balance: Balance | None, generator: torch.Generator, world: World
) -> tuple[int, Tensor]:
    """Takes up what `_state` gave; the steps that are done, and the last loss of the preservation."""
    mover.go_on(saved["mover"])
    generator.set_state(saved["generators"][world.rank])
    if balance:
        balance.weight = saved["weight"].to(generator.device)
    return saved["step"], saved["kept"].to(generator.device)


def _state(
    step: int,
    mover: Mover,
    balance: Balance | None,
    kept: Tensor,
    noise: Sequence[Tensor],
    generator: torch.Generator,
) -> dict[str, Any]:
    """`noise` are the states of all ranks' generators; of one that trains alone it is taken when it is asked for."""
    return {
        "step": step,
        "mover": mover.state(),
        "weight": balance and balance.weight,
        "kept": kept,
        "generators": list(noise) or [generator.get_state()],
    }


def fit(
    transformer: FluxTransformer2DModel,
    parameters: Sequence[torch.nn.Parameter],
    examples: Sequence[Example],
    priors: Sequence[Prior],
    texts: Mapping[str, Text],
    settings: Settings,
    record: bool = False,
    late: Sequence[Example] = (),
    world: World = ALONE,
    saved: Mapping[str, Any] | None = None,
    shared_at: Collection[int] = (),
    mover: Mover | None = None,
) -> Iterator[StepReport]:
    """Trains `parameters` in place, a StepReport a step; on a GPU by recordings, where asked (`lora.training.graphs`).

    `texts` must hold every caption, the empty one, and every prior's prompt. Examples in `late` are trained on once
    `settings.late_from` of the steps are over. A step whose gradient is not finite is skipped on the device, without
    waiting for it, and counted. With several ranks in `world` each trains its rows of a batch of `settings.batch_size`
    for each of them, and all move their weights by the same mean gradient; losses are means too. The same arguments on
    the same machine give the same weights, bit for bit on a CPU; also where the training goes on from `saved`, a
    report's `state()`, which several ranks can give after the steps `shared_at` alone. Raises RuntimeError where the
    first step has no gradient, for it would train nothing and say so nowhere; and CannotRecord. With a `mover` that
    moves something else than the parameters (`lora.training.full`) nothing is recorded.
    """
    device = parameters[0].device
    # On the training's own device: noise that comes from elsewhere would make every step wait for the one before.
    generator = torch.Generator(device).manual_seed(settings.seed + world.rank)
    balance = None
    if priors and settings.prior_ratio:
        balance = Balance(settings.prior_ratio, settings.prior_weight, device)
    if mover is None:
        mover = _masters(parameters, Passes(parameters, generator), settings, 2 if balance else 1, world)
    started = time.monotonic()

    def of_pictures(batch: Sequence[Example], captions: Sequence[str]) -> Pass:
        loss = functools.partial(picture_loss, transformer, batch[0].size, generator, settings)
        return ("pictures", batch[0].size), loss, rows_of_examples(batch, captions, texts)

    def of_priors(batch: Sequence[Prior]) -> Pass:
        loss = functools.partial(prior_loss, transformer, batch[0].size, settings.guidance)
        return ("drawings", batch[0].size), loss, rows_of_priors(batch, texts)

    if record and isinstance(mover, Masters):
        by_size = {example.size: [example] * settings.batch_size for example in [*examples, *late]}
        drawn = {prior.size: [prior] * settings.batch_size for prior in priors if balance}
        every = [of_pictures(batch, [example.caption for example in batch]) for batch in by_size.values()]
        every += [of_priors(batch) for batch in drawn.values()]
        mover.passes.record(every)
    done, kept = _go_on(saved, mover, balance, generator, world) if saved else (0, torch.zeros((), device=device))
    planned = turns(examples, late, priors if balance else (), settings, settings.batch_size * world.size)
    for turn in itertools.islice(planned, done, None):
        step = turn.step
        rate = learning_rate_at(step, settings.steps, settings.learning_rate, settings.held)
        pictures = of_pictures(world.rows(turn.examples), world.rows(turn.captions))
        preservation = of_priors(world.rows(turn.drawings)) if turn.drawings else None
        loss, looked, norm = mover.move(pictures, preservation, rate, balance, last=step == settings.steps)
        kept = kept if looked is None else looked
        if step == 1 and norm == 0:
            raise RuntimeError(f"no gradient reaches the LoRA: torch {torch.__version__} does not train this model")
        noise = world.gather([generator.get_state()]) if world.size > 1 and step in shared_at else []
        yield StepReport(
            step=step,
            loss=loss,
            prior_loss=kept,
            skipped=mover.skipped,
            in_a_row=mover.in_a_row,
            balance=balance,
            learning_rate=rate,
            seconds=time.monotonic() - started,
            state=functools.partial(_state, step, mover, balance, kept, noise, generator),
        )
