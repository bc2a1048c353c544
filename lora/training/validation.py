"""The loss that can be compared from one moment to the next: always the same pictures, noise and timesteps.

The loss of a step cannot: every step sees other pictures, other noise, other timesteps. Here all of that is fixed, so
what moves is the model. Looked at on training pictures it says how well they are learned; on a picture that is held
out it also says when learning turns into memorising, and `Turn` then keeps the weights from before.
"""

import math
import random
from collections.abc import Mapping, Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import flow
from lora.flux.encode import Example, Text, batched, stack

CHECKS = 12
"""In a training, and one before it: some 1.5 % of its time, where it has 1000 steps."""
LOOKS = 8
"""Forward passes in a check, at timesteps evenly spread over 0 to 1."""
AT_ONCE = 4
"""Looks in a batch: one by one, a GPU waits for the host."""
FEWEST_TO_HOLD_OUT = 8
"""Pictures: of fewer, none can be spared."""
PATIENCE = 3
"""Checks in a row above the lowest."""


def hold_out(names: Sequence[str], seed: int) -> str | None:
    """The picture to keep out of the training, or None where there are fewer than FEWEST_TO_HOLD_OUT."""
    if len(names) < FEWEST_TO_HOLD_OUT:
        return None
    return random.Random(seed).choice(sorted(names))


def photo_of(example: Example) -> str:
    """The name of the photo that an example shows: `encode` names it "<photo> at <width>x<height>"."""
    return example.name.rpartition(" at ")[0]


def is_of(photo: str | None, example: Example) -> bool:
    """Whether the example shows this photo, at whatever size."""
    return photo_of(example) == photo


def smallest(examples: Sequence[Example], most: int = 4) -> list[Example]:
    """Up to `most` of the examples at the smallest size there is, evenly chosen: what a check looks at."""
    tokens = min(len(example.mean) for example in examples)
    small = [example for example in examples if len(example.mean) == tokens]
    return small[:: -(-len(small) // most)]


@torch.no_grad()
def loss(
    transformer: FluxTransformer2DModel, examples: Sequence[Example], texts: Mapping[str, Text], seed: int
) -> float:
    """The mean flow-matching loss over LOOKS fixed pairs of noise and timestep, the examples by turns.

    Takes nothing from the training's own randomness and leaves nothing behind: with or without it, the weights are the
    same.
    """
    device = next(transformer.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    by_size: dict[tuple[int, int], list[tuple[float, Example, Tensor]]] = {}
    for look in range(LOOKS):
        example = examples[look % len(examples)]
        noise = torch.randn(example.mean.shape, generator=generator).to(example.mean)
        by_size.setdefault(example.size, []).append(((look + 0.5) / LOOKS, example, noise))
    total = torch.zeros((), device=device)
    for size, looks in by_size.items():
        for start in range(0, len(looks), AT_ONCE):
            times, seen, drawn = zip(*looks[start : start + AT_ONCE], strict=True)
            latents, noise = batched([example.mean for example in seen], device), batched(drawn, device)
            timesteps = torch.tensor(times, device=device)
            noisy = flow.add_noise(latents, noise, timesteps)
            text = stack(texts, [example.caption for example in seen], device)
            prediction = flow.velocity(transformer, noisy, timesteps, flow.TRAINING_GUIDANCE, text, size)
            total += flow.flow_loss(prediction, latents, noise) * len(seen) / LOOKS
    return total.item()


class Turn:
    """Remembers the weights of the lowest loss, and says when it has turned: PATIENCE checks in a row above it."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._kept: list[Tensor] = []
        self._lowest = float("inf")
        self._above = 0
        self.step = 0
        """The step of the lowest loss so far."""

    def has_come(self, step: int, loss: float) -> bool:
        """Takes the check at `step` to account; what is no number counts for nothing: `watch.follow` ends that run."""
        if not math.isfinite(loss):
            return False
        if loss < self._lowest:
            self._lowest, self._above, self.step = loss, 0, step
            self._kept = [parameter.detach().clone() for parameter in self._parameters]
        else:
            self._above += 1
        return self._above >= PATIENCE

    @torch.no_grad()
    def go_back(self) -> None:
        """Puts the weights of the lowest loss back in place."""
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(kept)
