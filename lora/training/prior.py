"""What the base draws by itself, for the training to hold on to.

A LoRA that only ever sees its own pictures makes every prompt look like them, and answers to any unknown word. So the
base first draws pictures of its own, for prompts without the trigger word, some of them with *another made-up word in
the trigger's place*, and every step of the drawing is kept: where it stood, and where the base wanted to go. Training
then asks the adapted model to go the same way. It is prior preservation (Ruiz et al. 2022, DreamBooth,
arXiv:2208.12242) against the base's own predictions instead of its pictures: the targets have no noise, and cost no
further pass through the base.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import flow
from lora.flux.encode import Text, in_host_memory, stack
from lora.training.words import COLOURS, THINGS, made_up_word, whole_word

_PLACES = ("", "", "", " on the left", " on the right", " at the top", " at the bottom")
_SIZES = ("", "", "", "small ", "large ")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prior:
    """One step of one drawing by the untouched base."""

    prompt: str
    size: tuple[int, int]
    """Latent cells, (height, width)."""
    noisy: Tensor
    """(S, 4C), where the drawing stood."""
    timestep: float
    until: float
    """The drawing's next time: the step stands for all between."""
    velocity: Tensor
    """(S, 4C), the base's prediction there."""


def prompts(captions: Sequence[str], trigger_word: str, count: int, seed: int, kinds: Sequence[str]) -> list[str]:
    """`count` prompts without the trigger word, of each kind in turn.

    "things" asks for ordinary things; "made-up words" for a made-up word in a thing's place or a style's; "captions"
    are the user's own with a made-up word where the trigger word stood; "captions of things" have a thing's name there,
    as prior preservation has the class noun (arXiv:2208.12242). Where an ordinary word is the trigger word, a made-up
    one stands for it in all of them.
    """
    rng = random.Random(seed)
    pattern = whole_word(trigger_word)
    chosen = []
    for i in range(count):
        match kinds[i % len(kinds)]:
            case "things":
                chosen.append(_ordinary(rng))
            case "made-up words":
                word = made_up_word(rng, trigger_word)
                chosen.append(
                    _ordinary(rng, thing=word) if rng.random() < 0.6 else f"{_ordinary(rng)}, in the style of {word}"
                )
            case "captions":
                word = made_up_word(rng, trigger_word)
                chosen.append(word.join(pattern.split(rng.choice(captions))))
            case "captions of things":
                chosen.append(rng.choice(THINGS).join(pattern.split(rng.choice(captions))))
            case kind:
                raise AssertionError(f"no kind of prompt: {kind!r}")
    return [pattern.sub(lambda _: made_up_word(rng, trigger_word), prompt) for prompt in chosen]


def _ordinary(rng: random.Random, thing: str | None = None) -> str:
    colour, ground = rng.sample(COLOURS, 2)
    noun = thing or f"{colour} {rng.choice(THINGS)}"
    what = f"{rng.choice(_SIZES)}{noun}"
    return f"{_article(what)} {what}{rng.choice(_PLACES)} on {_article(ground)} {ground} background"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@torch.no_grad()
def draw(
    transformer: FluxTransformer2DModel,
    texts: Mapping[str, Text],
    wanted: Sequence[str],
    size: tuple[int, int],
    scheduler: Mapping[str, Any],
    seed: int,
    guidance: float = flow.TRAINING_GUIDANCE,
    steps: int = 8,
    batch_size: int = 8,
) -> list[Prior]:
    """Draws one picture for each prompt of `wanted` and returns every step of each drawing.

    `size` is in latent cells; `scheduler` is the base's scheduler config. The transformer must be without an adapter,
    or have it switched off. `guidance` must be that of the training: an adapter that learns pictures at one and holds
    on to the base at another tells them apart by it instead of by the trigger word (measured in bench/NOTES.md).
    """
    device = next(transformer.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens, channels = size[0] * size[1] // 4, transformer.config.in_channels
    times = flow.sigmas(steps, tokens, scheduler)
    priors = []
    for start in range(0, len(wanted), batch_size):
        batch = list(wanted[start : start + batch_size])
        text = stack(texts, batch, device)
        dtype = text["prompt_embeds"].dtype
        x = torch.randn(len(batch), tokens, channels, generator=generator).to(device, dtype)
        for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            timesteps = torch.full((len(batch),), now, device=device)
            v = flow.velocity(transformer, x, timesteps, guidance, text, size)
            noisy, velocity = in_host_memory(x), in_host_memory(v)
            priors += [
                Prior(prompt=prompt, size=size, noisy=noisy[i], timestep=now, until=then, velocity=velocity[i])
                for i, prompt in enumerate(batch)
            ]
            x = x + (then - now) * v
    return priors
