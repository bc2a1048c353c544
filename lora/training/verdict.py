"""What a LoRA has learned, under which words, and what it costs the base; told by the flow loss, without drawing.

A diffusion model is a classifier: how well it predicts the noise in a picture under a caption says how well the caption
explains the picture (Li et al. 2023, arXiv:2303.16203). So the base and the LoRA look at the same pictures with the
same noise at the same timesteps: under the caption with the trigger word, under the same caption with another word in
its place, and under the class noun. And the LoRA's velocity is compared with the base's on prompts that no step was
trained on. `Measured` holds the numbers.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import flow
from lora.flux.encode import Example, Text, batched, stack
from lora.training import prompts, words
from lora.training.prior import Prior

TIMES = tuple((i + 0.5) / 10 for i in range(10))
"""Timesteps of the looks, evenly spread from 0 to 1."""
PICTURES = 4
"""Training pictures that are looked at, at most."""
HELD_OUT = 2
"""Held-out pictures that are looked at, at most."""
AT_ONCE = 10
"""Looks in a batch."""
PROMPTS = 6
"""Preservation prompts that no step is trained on."""
OTHERS = ("far", "near", "noun")
"""Words in the trigger word's place: a made-up one, one near the trigger word, the class noun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked beside the captions themselves, decided before the prompts are encoded."""

    captions: Mapping[str, Mapping[str, str]]
    """For each of OTHERS, by a caption with the trigger word, the same caption with that word."""
    apart: Sequence[str]
    """Prompts without the trigger word that no step is trained on."""

    def prompts(self) -> list[str]:
        """All that must be encoded."""
        return [*self.apart, *(said for of_kind in self.captions.values() for said in of_kind.values())]


def questions(
    captions: Sequence[str], trigger_word: str, class_noun: str | None, kinds: Sequence[str], seed: int
) -> Questions:
    """The questions for these captions. `kinds` are the recipe's preservation prompts; the seed is not theirs, so that
    what is asked is not what was trained."""
    rng = random.Random(f"verdict {seed}")
    pattern = words.whole_word(trigger_word)
    far = [words.made_up_word(rng, trigger_word) for _ in range(3)]
    near = words.near_words(trigger_word, rng, 3) or far
    noun = class_noun or "thing"
    instead = {"far": far, "near": near, "noun": [noun]}
    asked: dict[str, dict[str, str]] = {kind: {} for kind in OTHERS}
    for number, caption in enumerate(dict.fromkeys(captions)):
        for kind, choices in instead.items():
            asked[kind][caption] = choices[number % len(choices)].join(pattern.split(caption))
    apart = prompts.apart(captions, trigger_word, PROMPTS, rng.randrange(2**31), kinds, class_noun)
    return Questions(captions=asked, apart=apart)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A picture with its noise and timestep: the same for everything that is compared."""

    example: Example
    timestep: float
    noise: Tensor


def looks(examples: Sequence[Example], most: int, seed: int) -> list[Look]:
    """`most` of the examples at the smallest size there is, evenly chosen, each at every one of TIMES."""
    if not examples:
        return []
    tokens = min(len(example.mean) for example in examples)
    small = [example for example in examples if len(example.mean) == tokens]
    chosen = small[:: -(-len(small) // most)]
    generator = torch.Generator().manual_seed(seed)
    return [
        Look(
            example=example, timestep=time, noise=torch.randn(example.mean.shape, generator=generator).to(example.mean)
        )
        for example in chosen
        for time in TIMES
    ]


@torch.no_grad()
def losses(
    transformer: FluxTransformer2DModel, asked: Sequence[Look], captions: Sequence[str], texts: Mapping[str, Text]
) -> list[float]:
    """The flow loss of each look under its caption, by the transformer as it is."""
    device = next(transformer.parameters()).device
    found = torch.zeros(len(asked), device=device)
    by_size: dict[tuple[int, int], list[int]] = {}
    for number, look in enumerate(asked):
        by_size.setdefault(look.example.size, []).append(number)
    for size, numbers in by_size.items():
        for start in range(0, len(numbers), AT_ONCE):
            batch = numbers[start : start + AT_ONCE]
            latents = batched([asked[i].example.mean for i in batch], device)
            noise = batched([asked[i].noise for i in batch], device)
            timesteps = torch.tensor([asked[i].timestep for i in batch], device=device)
            text = stack(texts, [captions[i] for i in batch], device)
            noisy = flow.add_noise(latents, noise, timesteps)
            prediction = flow.velocity(transformer, noisy, timesteps, flow.TRAINING_GUIDANCE, text, size)
            wanted = (noise - latents).float()
            found[batch] = (prediction.float() - wanted).square().flatten(1).mean(1)
    return found.tolist()


@torch.no_grad()
def drift(transformer: FluxTransformer2DModel, apart: Sequence[Prior], texts: Mapping[str, Text]) -> list[float]:
    """For each state of the base's drawings, the squared change of the velocity over that of the base, 0 and more."""
    device = next(transformer.parameters()).device
    found = []
    by_size: dict[tuple[int, int], list[Prior]] = {}
    for one in apart:
        by_size.setdefault(one.size, []).append(one)
    for size, of_size in by_size.items():
        for start in range(0, len(of_size), AT_ONCE):
            batch = of_size[start : start + AT_ONCE]
            noisy, velocity = (batched([getattr(p, part) for p in batch], device) for part in ("noisy", "velocity"))
            timesteps = torch.tensor([p.timestep for p in batch], device=device)
            text = stack(texts, [p.prompt for p in batch], device)
            now = flow.velocity(transformer, noisy, timesteps, flow.TRAINING_GUIDANCE, text, size).float()
            change = (now - velocity.float()).square().flatten(1).mean(1)
            found += (change / velocity.float().square().flatten(1).mean(1)).tolist()
    return found


class Examination:
    """The looks of one training: first at the base, then at the LoRA as often as one likes."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        learned: Sequence[Example],
        unseen: Sequence[Example],
        asked: Questions,
        apart: Sequence[Prior],
        texts: Mapping[str, Text],
        seed: int,
    ) -> None:
        """`transformer` must still be without the LoRA; `apart` are states of the base's own drawings for
        `asked.apart`."""
        self._looks = looks(learned, PICTURES, seed)
        self._trained = len(self._looks)
        self._looks += looks(unseen, HELD_OUT, seed + 1)
        own = [look.example.caption for look in self._looks]
        self._captions = {"own": own} | {
            kind: [asked.captions[kind][caption] for caption in own] for kind in asked.captions
        }
        self._apart, self._texts = apart, texts
        self._base = self._losses(transformer)

    def _losses(self, transformer: FluxTransformer2DModel) -> dict[str, list[float]]:
        return {
            kind: losses(transformer, self._looks, captions, self._texts) for kind, captions in self._captions.items()
        }

    def measure(self, transformer: FluxTransformer2DModel) -> "Measured":
        """The same looks by the transformer as it is now, with the LoRA. It takes nothing from the training's own
        randomness and leaves nothing behind."""
        return Measured(
            base=self._base,
            lora=self._losses(transformer),
            trained=self._trained,
            drift=drift(transformer, self._apart, self._texts),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The flow losses, look by look; the first `trained` looks are at training pictures, the others at held-out ones.
    Each picture has len(TIMES) looks, in that order."""

    base: Mapping[str, Sequence[float]]
    """By the kind of word ("own" and OTHERS), the base's."""
    lora: Mapping[str, Sequence[float]]
    trained: int
    drift: Sequence[float]

    def gain(self, kind: str, held_out: bool = False) -> float | None:
        """The share of the base's loss that the LoRA takes away under captions with this kind of word, averaged over
        timesteps; None where no picture was held out. Below 0 where it is worse than the base."""
        part = slice(self.trained, None) if held_out else slice(0, self.trained)
        base, lora = self.base[kind][part], self.lora[kind][part]
        if not base:
            return None
        steps = len(TIMES)
        shares = [1 - sum(lora[i::steps]) / sum(base[i::steps]) for i in range(steps)]
        return sum(shares) / steps
