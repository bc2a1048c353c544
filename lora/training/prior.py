"""Prior preservation: what the base predicts for prompts without the trigger word, for the training to keep.

Before the training the base draws pictures for the prompts of `prompts`, and every step of each drawing is kept: where
it stood, and the velocity that the base predicted there. The training asks the adapted model for the same prediction.
It is prior preservation (Ruiz et al. 2022, DreamBooth, arXiv:2208.12242) against the base's own predictions instead of
its pictures: such a target has no noise of its own, and pictures as targets cost a LoRA its subject
(Nerogar/OneTrainer#862).
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import flow
from lora.flux.encode import Example, Text, batched, in_batches, in_host_memory, stack
from lora.training.prompts import Asked


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prior:
    """One step of one drawing by the untouched base."""

    prompt: str
    size: tuple[int, int]
    """Latent cells, (height, width)."""
    noisy: Tensor
    """(S, 4C), where the drawing stood."""
    timestep: float
    since: float
    until: float
    """It stands for all timesteps between these: of a drawing, from its own to its next."""
    velocity: Tensor
    """(S, 4C), the base's prediction there."""


def shared_out(sizes: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """A size in latent cells for each of `count` drawings, from the sizes that are trained at.

    Two thirds are drawn at the smallest resolution, a quarter at those between, the others at the largest: a LoRA that
    is held at one size alone can learn the size as a sign of its own pictures. Within a resolution the photographs'
    own shapes come by turns.
    """
    tiers = resolutions(sizes)
    large = count // 12 if len(tiers) > 1 else 0
    middle = count // 4 if len(tiers) > 2 else 0
    between = [size for tier in tiers[1:-1] for size in tier]
    parts = ((tiers[0], count - middle - large), (between, middle), (tiers[-1], large))
    return [part[i % len(part)] for part, many in parts for i in range(many)]


def resolutions(sizes: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The sizes in latent cells by resolution, the smallest first: those whose areas differ by less than a third count
    as one, for photographs of other shapes have a few cells more or fewer."""
    tiers: list[list[tuple[int, int]]] = []
    for size in sorted(set(sizes), key=lambda size: (size[0] * size[1], size)):
        if tiers and size[0] * size[1] < 4 / 3 * tiers[-1][0][0] * tiers[-1][0][1]:
            tiers[-1].append(size)
        else:
            tiers.append([size])
    return tiers


STATES = 4
"""Of each picture under each prompt; their timesteps lie in as many equal parts of 0 to 1."""
RESOLUTIONS = (0, 0, 1, 0, 0, 2)
"""Which resolution of the pictures with a caption, from the smallest, is taken by turns: most at the smallest."""


@torch.no_grad()
def noised(
    transformer: FluxTransformer2DModel,
    texts: Mapping[str, Text],
    asked: Sequence[Asked],
    examples: Sequence[Example],
    seed: int,
    guidance: float = flow.TRAINING_GUIDANCE,
    batch_size: int = 8,
    rank: int = 0,
    ranks: int = 1,
) -> list[Prior]:
    """The user's own pictures with noise as the states, each under its caption with another word than the trigger word.

    Nothing is drawn, and the states are those that the pictures themselves train at: how ostris' ai-toolkit preserves
    (`diff_output_preservation`), and Nerogar/OneTrainer#505. STATES for each of `asked`, whose captions must be those
    of examples. The transformer must be without an adapter. With several `ranks` the batches are shared out, as `draw`
    does.
    """
    device = next(transformer.parameters()).device
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    by_caption: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: len(example.mean)):
        by_caption.setdefault(example.caption, []).append(example)
    states: list[tuple[str, Example, float]] = []
    for number, one in enumerate(asked):
        assert one.caption is not None
        mine = by_caption[one.caption]
        tiers = resolutions(example.size for example in mine)
        sizes = tiers[min(RESOLUTIONS[number % len(RESOLUTIONS)], len(tiers) - 1)]
        example = rng.choice([example for example in mine if example.size in sizes])
        states += [(one.prompt, example, (part + rng.random()) / STATES) for part in range(STATES)]
    priors = []
    for number, (size, batch) in enumerate(in_batches(states, lambda state: state[1].size, batch_size)):
        prompts, shown, times = zip(*batch, strict=True)
        latents = batched([example.mean for example in shown], device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        if number % ranks != rank:
            continue
        timesteps = torch.tensor(times, device=device)
        noisy = flow.add_noise(latents, noise, timesteps)
        velocity = flow.velocity(transformer, noisy, timesteps, guidance, stack(texts, prompts, device), size)
        noisy, velocity = in_host_memory(noisy), in_host_memory(velocity)
        for i, (prompt, time) in enumerate(zip(prompts, times, strict=True)):
            low, high = int(time * STATES) / STATES, (int(time * STATES) + 1) / STATES
            priors.append(
                Prior(
                    prompt=prompt, size=size, noisy=noisy[i], timestep=time, since=high, until=low, velocity=velocity[i]
                )
            )
    return priors


@torch.no_grad()
def draw(
    transformer: FluxTransformer2DModel,
    texts: Mapping[str, Text],
    wanted: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    scheduler: Mapping[str, Any],
    seed: int,
    guidance: float = flow.TRAINING_GUIDANCE,
    drawing_guidance: float | None = None,
    steps: int = 8,
    batch_size: int = 8,
    rank: int = 0,
    ranks: int = 1,
) -> list[Prior]:
    """Draws one picture for each prompt of `wanted` and returns every step of each drawing.

    `sizes` has the size of each drawing in latent cells; `scheduler` is the base's scheduler config. The transformer
    must be without an adapter, or have it switched off. The velocities that are kept are those at `guidance`, which
    must be that of the training: an adapter that learns pictures at one and holds on to the base at another tells them
    apart by it instead of by the trigger word. The drawing itself goes by `drawing_guidance`, where that is another: at
    guidance 1 FLUX.1-dev draws pictures that nobody asks it for, and each step then costs a second pass.

    With several `ranks` the batches are shared out: this one draws every `ranks`-th, from `rank` on, as it would look
    if one process drew them all.
    """
    generator = torch.Generator().manual_seed(seed)
    drawing_guidance = guidance if drawing_guidance is None else drawing_guidance
    channels = transformer.config.in_channels
    priors = []
    drawings = zip(wanted, sizes, strict=True)
    for number, (size, drawn) in enumerate(in_batches(drawings, lambda drawing: drawing[1], batch_size)):
        batch = [prompt for prompt, _ in drawn]
        noise = torch.randn(len(batch), size[0] * size[1] // 4, channels, generator=generator)
        if number % ranks == rank:
            priors += _batch(transformer, texts, batch, size, scheduler, noise, guidance, drawing_guidance, steps)
    return priors


def _batch(
    transformer: FluxTransformer2DModel,
    texts: Mapping[str, Text],
    batch: Sequence[str],
    size: tuple[int, int],
    scheduler: Mapping[str, Any],
    noise: Tensor,
    guidance: float,
    drawing_guidance: float,
    steps: int,
) -> list[Prior]:
    """Every step of a batch of drawings of one size, from `noise` (B, S, 4C)."""
    device = next(transformer.parameters()).device
    times = flow.sigmas(steps, noise.shape[1], scheduler).tolist()
    text = stack(texts, batch, device)
    x = noise.to(device, text["prompt_embeds"].dtype)
    priors = []
    for now, then in itertools.pairwise(times):
        timesteps = torch.full((len(batch),), now, device=device)
        kept = ahead = flow.velocity(transformer, x, timesteps, guidance, text, size)
        if drawing_guidance != guidance:
            ahead = flow.velocity(transformer, x, timesteps, drawing_guidance, text, size)
        noisy, velocity = in_host_memory(x), in_host_memory(kept)
        priors += [
            Prior(prompt=prompt, size=size, noisy=noisy[i], timestep=now, since=now, until=then, velocity=velocity[i])
            for i, prompt in enumerate(batch)
        ]
        x = x + (then - now) * ahead
    return priors
