"""The optimizer and the loop: a generator, so that whoever runs it decides what to do between steps."""

import dataclasses
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora import flow, prior
from lora.encode import Example, Text, batched, stack
from lora.prior import Prior

FLUX_WIDTH = 3072
LEARNING_RATES = {"subject": 4e-4, "style": 8e-4}
"""At FLUX.1-dev's width, for rank 16 and AdamW; 4e-4 is what ostris/flux-dev-lora-trainer uses on Replicate. Twice that
for a style is what the lab showed on the toy base (bench/NOTES.md)."""
HELD = {"subject": 0.5, "style": 0.0}
"""Share of the training in which the rate stays at its peak. A subject learns faster so, and nothing else suffers; a
style at its higher rate needs the long decay (bench/NOTES.md)."""
TIMESTEP_MEANS = {"subject": 0.0, "style": 2.5}
"""Of the logit-normal. A style shows in layout, ground and colours, which much noise decides: near what
arXiv:2411.14793 found for styles on FLUX.1-dev (3.0), and what the lab showed on the toy base (bench/NOTES.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; every value decided, nothing left to guess.

    By the fields with a default the lab compares recipes (`bench/quality.py`); some `lora.job` decides by `lora_type`.
    """

    steps: int
    batch_size: int
    learning_rate: float
    caption_dropout_rate: float
    prior_loss_weight: float
    seed: int
    timestep_mean: float = 0.0
    """Of the logit-normal; see `flow.sample_timesteps`."""
    uniform_timesteps: bool = False
    """Every time from 0 to 1 alike, instead of the logit-normal."""
    guidance: float = flow.TRAINING_GUIDANCE
    """What the transformer's guidance input is given, with the pictures and with the base's own draws."""
    held: float = 0.0
    """Share of the training in which the learning rate stays at its peak; see `learning_rate_at`."""
    weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    ema_decay: float = 0.0
    """Share of itself that the running mean of the weights keeps at each step; the training ends with that mean in
    their place. 0: no mean, the last weights."""
    prior_kinds: tuple[str, ...] = prior.KINDS["subject"]
    """What is asked of the base for its own draws, in turn; see `prior.prompts`."""
    prior_prompts: int = prior.DRAWINGS["subject"]
    """How many drawings of the base's own there are."""
    prior_every: int = 3
    """Every how many steps the base's own draws are looked at; they weigh as many times as much then."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepReport:
    step: int
    """From 1."""
    loss: Tensor
    """A scalar still on its device: reading it waits for the GPU, so read it only where it is shown."""
    prior_loss: Tensor
    """Of the last step that looked at the base's own draws; 0 before."""
    learning_rate: float
    seconds: float
    """Since the loop began."""


def at_width(rate: float, width: int) -> float:
    """A learning rate for FLUX.1-dev's width, brought to a base of another.

    Adam's steps have the same size for every weight, so a layer of n inputs moves its output by n times as much where
    they all pull together (muP, arXiv:2203.03466), by sqrt(n) times where they do not. The power is between the two:
    on the toy base ten times the rate learned no less than five times and more than twenty times (bench/NOTES.md).
    """
    return rate * (FLUX_WIDTH / width) ** 0.75


def default_learning_rate(lora_type: str, width: int) -> tuple[float, str]:
    """The learning rate for a type on a base of this width, and why."""
    reason = f"{LEARNING_RATES[lora_type]:.2g} for a {lora_type} at FLUX.1-dev's width"
    if width != FLUX_WIDTH:
        reason += f" {FLUX_WIDTH}, times ({FLUX_WIDTH}/{width})^0.75"
    return at_width(LEARNING_RATES[lora_type], width), reason


def batches(examples: Sequence[Example], batch_size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Endless full batches of one size each, in which every example comes equally often.

    Every round takes each example once, in a new order; where a size is left with fewer than a batch, they wait for the
    next round. A smaller batch would be a step like any other, and its pictures would weigh several times as much.
    """
    waiting: dict[tuple[int, int], list[Example]] = {}
    while True:
        ready = []
        for example in rng.sample(examples, len(examples)):
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


def step_loss(
    transformer: FluxTransformer2DModel,
    batch: Sequence[Example],
    captions: Sequence[str],
    texts: Mapping[str, Text],
    generator: torch.Generator,
    settings: Settings,
) -> Tensor:
    """The flow-matching loss of one batch of examples under `captions`, a scalar with a gradient."""
    device = generator.device
    mean = batched([example.mean for example in batch], device)  # (B, S, 4C)
    std = batched([example.std for example in batch], device)

    def randn() -> Tensor:
        return torch.randn(mean.shape, generator=generator, device=device).to(mean)

    latents = mean + std * randn()
    noise = randn()
    if settings.uniform_timesteps:
        timesteps = torch.rand(len(batch), generator=generator, device=device)
    else:
        timesteps = flow.sample_timesteps(len(batch), generator, settings.timestep_mean)
    noisy = flow.add_noise(latents, noise, timesteps)
    text = stack(texts, captions, device)
    prediction = flow.velocity(transformer, noisy, timesteps, settings.guidance, text, batch[0].size)
    return flow.flow_loss(prediction, latents, noise)


def prior_loss(
    transformer: FluxTransformer2DModel, batch: Sequence[Prior], texts: Mapping[str, Text], guidance: float
) -> Tensor:
    """How far the adapted model has gone from the base on steps of the base's own drawings, a scalar."""
    device = next(transformer.parameters()).device
    noisy = batched([p.noisy for p in batch], device)
    timesteps = torch.tensor([p.timestep for p in batch]).to(device, non_blocking=True)
    text = stack(texts, [p.prompt for p in batch], device)
    prediction = flow.velocity(transformer, noisy, timesteps, guidance, text, batch[0].size)
    return F.mse_loss(prediction.float(), batched([p.velocity for p in batch], device).float())


def fit(
    transformer: FluxTransformer2DModel,
    parameters: Sequence[torch.nn.Parameter],
    examples: Sequence[Example],
    priors: Sequence[Prior],
    texts: Mapping[str, Text],
    settings: Settings,
) -> Iterator[StepReport]:
    """Trains `parameters` in place, a StepReport a step.

    `texts` must hold every caption, the empty one, and every prior's prompt. The same arguments on the same machine
    give the same weights, bit for bit on a CPU. Raises RuntimeError where the first step has no gradient, which an
    error in a compiler can do (pytorch/pytorch#180642), for it would train nothing and say so nowhere.
    """
    rng = random.Random(settings.seed)
    device = parameters[0].device
    # On the training's own device: noise that comes from elsewhere would make every step wait for the one before.
    generator = torch.Generator(device).manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        eps=settings.adam_epsilon,
        fused=True,
    )
    means = [p.detach().clone() for p in parameters] if settings.ema_decay else []
    # Half of the looks at the base's own draws are at the pictures' times, where other words must be told from the
    # trigger; half at any time, for all of a drawing must stay (bench/NOTES.md).
    shares = [
        flow.share_of_timesteps(p.until, p.timestep, settings.timestep_mean) + p.timestep - p.until for p in priors
    ]
    source = batches(examples, settings.batch_size, rng)
    kept = torch.zeros((), device=device)
    started = time.monotonic()
    for step in range(1, settings.steps + 1):
        batch = next(source)
        captions = ["" if rng.random() < settings.caption_dropout_rate else example.caption for example in batch]
        rate = learning_rate_at(step, settings.steps, settings.learning_rate, settings.held)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(transformer, batch, captions, texts, generator, settings)
        loss.backward()
        if priors and settings.prior_loss_weight > 0 and step % settings.prior_every == 0:
            drawn = rng.choices(priors, shares, k=settings.batch_size)
            kept = prior_loss(transformer, drawn, texts, settings.guidance)
            (settings.prior_loss_weight * settings.prior_every * kept).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if step == 1 and norm == 0:
            raise RuntimeError(f"no gradient reaches the LoRA: torch {torch.__version__} does not train this model")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if means:
            with torch.no_grad():
                for mean, parameter in zip(means, parameters, strict=True):
                    mean.lerp_(parameter, 1 - settings.ema_decay)
                    if step == settings.steps:
                        parameter.copy_(mean)
        yield StepReport(
            step=step,
            loss=loss.detach(),
            prior_loss=kept.detach(),
            learning_rate=rate,
            seconds=time.monotonic() - started,
        )
