"""What a LoRA has learned, under which words, and what it costs the base; told by the flow loss, without drawing.

A diffusion model is a classifier: how well it predicts the noise in a picture under a caption says how well the caption
explains the picture (Li et al. 2023, arXiv:2303.16203). So the base and the LoRA look at the same pictures with the
same noise at the same timesteps: under the caption with the trigger word, under the same caption with another word in
its place, and under the class noun. And the LoRA's velocity is compared with the base's on prompts that no step was
trained on. `lora.result.verdict` says what the numbers mean.
"""

import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import flow
from lora.flux.encode import Example, Text, batched, in_batches, stack
from lora.result.verdict import Gains, Measured
from lora.training import prompts, words
from lora.training.prior import Prior
from lora.trigger import Subject

LOOKS = 8
"""At training pictures, and as many at held-out ones: at timesteps evenly spread from LEAST_NOISE to 1, by turns."""
LEAST_NOISE = 0.3
"""Below it every picture is explained well without a caption: gains there told less of what the drawings show."""
PICTURES = 4
"""That are looked at, at most."""
AT_ONCE = 8
"""Looks in a batch: one by one, a GPU waits for the host."""
PROMPTS = 6
"""Preservation prompts that no step is trained on."""
STATES = 2
"""Steps of the base's drawing of each, that are compared."""
OTHERS = ("far", "near", "noun")
"""Words in the trigger word's place: a made-up one, one near the trigger word, the class noun. And where there are
several subjects "other": another's trigger word."""
CLOSE_UP = "//close-up"
"""Behind a photo's name: its close-up. No file has such a name."""
CONFUSED = 0.5
"""Of the difference that made-up words have; see `confusable`."""
HOLD_OUT = {8: 1, 16: 2}
"""From so many pictures on, how many are held out."""


def hold_out(names: Sequence[str], copies: Collection[str], seed: int) -> list[str]:
    """The pictures to keep out of the first part of the training; none where there are fewer than eight. One of
    `copies`, of which another picture is nearly a copy, is none that the LoRA has not seen."""
    count = max((many for least, many in HOLD_OUT.items() if len(names) >= least), default=0)
    single = sorted({*names} - {*copies})
    return random.Random(seed).sample(single, min(count, len(single)))


def smallest(examples: Sequence[Example]) -> list[Example]:
    """Every photo, and every close-up, at the smallest size that it has here, in their order. Photos of other shapes
    have other sizes: at one resolution those of FLUX.1-dev differ by up to a twentieth in tokens."""
    found: dict[str, Example] = {}
    for example in examples:
        best = found.setdefault(_shown(example), example)
        if len(example.mean) < len(best.mean):
            found[_shown(example)] = example
    return list(found.values())


def _by_shape(examples: Sequence[Example]) -> list[Sequence[Example]]:
    return [alike for _, alike in in_batches(examples, lambda example: example.size, max(1, len(examples)))]


def photo_of(example: Example) -> str:
    """The name of the photo that the example shows, whole or as a close-up, at whatever size: `encode` calls it
    "<photo> at <size>"."""
    return _shown(example).removesuffix(CLOSE_UP)


def _shown(example: Example) -> str:
    return example.name.rpartition(" at ")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked beside the captions themselves, decided before the prompts are encoded."""

    captions: Mapping[str, Mapping[str, str]]
    """For each of OTHERS, by a caption with its picture's trigger word, the same caption with that word."""
    apart: Sequence[str]
    """Prompts without the trigger word that no step is trained on."""
    near: Mapping[str, Sequence[str]]
    """By trigger word, words near it."""
    far: Sequence[str]
    """Made-up words."""

    def prompts(self, *groups: Sequence[Example]) -> list[str]:
        """All that must be encoded to look at each of these groups of pictures (`looks`)."""
        shown = [example for group in groups for example in looked_at(group)]
        alone = [f"a {word}" for own, near in self.near.items() for word in (own, *near)]
        alone += [f"a {word}" for word in self.far]
        return [
            *self.apart,
            *alone,
            *(of_kind[example.caption] for of_kind in self.captions.values() for example in shown),
        ]


def questions(captions: Mapping[str, Subject], kinds: Sequence[str], seed: int) -> Questions:
    """The questions for these captions, each with the subject of its picture. `kinds` are the recipe's preservation
    prompts; the seed is not theirs, so that what is asked is not what was trained."""
    rng = random.Random(f"verdict {seed}")
    own = list(dict.fromkeys(subject.word for subject in captions.values()))
    far = [words.made_up_word(rng, own[0]) for _ in range(3)]
    near = {word: words.near_words(word, rng, 4, prompts.NEAR) or far for word in own}
    asked: dict[str, dict[str, str]] = {kind: {} for kind in (*OTHERS, *(["other"] if len(own) > 1 else []))}
    for number, (caption, subject) in enumerate(captions.items()):
        foreign = [word for word in own if word != subject.word]
        instead = {"far": far, "near": near[subject.word], "noun": [subject.class_noun or "thing"], "other": foreign}
        for kind, of_kind in asked.items():
            word = instead[kind][number % len(instead[kind])]
            of_kind[caption] = word.join(words.whole_word(subject.word).split(caption))
    apart = prompts.apart(captions, PROMPTS, rng.randrange(2**31), kinds)
    return Questions(captions=asked, apart=[one.prompt for one in apart], near=near, far=far)


def confusable(asked: Questions, texts: Mapping[str, Text]) -> list[str]:
    """Words near the trigger word that the base's text encoders hardly tell from it: in CLIP's pooled embedding of "a
    <word>" they differ from it by less than CONFUSED of what made-up words differ by.

    On the toy base a LoRA on TOK showed its subject under TIK, POK and TOKO (.25 to .5 of the difference) in nearly
    every drawing, under KIP and SKS (.65, .8) less often."""

    def apart(own: str, word: str) -> float:
        one, other = (texts[f"a {called}"]["pooled"].float() for called in (own, word))
        return 1 - torch.cosine_similarity(one, other, dim=0).item()

    found = []
    for own, near in asked.near.items():
        usual = sum(apart(own, word) for word in asked.far) / len(asked.far)
        found += [word for word in near if apart(own, word) < CONFUSED * usual]
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A picture with its noise and timestep: the same for everything that is compared."""

    example: Example
    timestep: float
    noise: Tensor


def looked_at(examples: Sequence[Example]) -> list[Example]:
    """Up to PICTURES of the pictures, each at its smallest size. They are of the commonest shape, so that they go in
    one batch, and of the next ones where it has fewer."""
    small: list[Example] = []
    for of_shape in sorted(_by_shape(smallest(examples)), key=len, reverse=True):
        small += of_shape if len(small) < PICTURES else []
    return small[:: max(1, -(-len(small) // PICTURES))]


def looks(examples: Sequence[Example], seed: int) -> list[Look]:
    """LOOKS at some of the pictures by turns; none where there is no example."""
    chosen = looked_at(examples)
    if not chosen:
        return []
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(LOOKS):
        example = chosen[number % len(chosen)]
        noise = torch.randn(example.mean.shape, generator=generator).to(example.mean)
        timestep = LEAST_NOISE + (1 - LEAST_NOISE) * (number + 0.5) / LOOKS
        found.append(Look(example=example, timestep=timestep, noise=noise))
    return found


@torch.no_grad()
def losses(
    transformer: FluxTransformer2DModel, asked: Sequence[Look], captions: Sequence[str], texts: Mapping[str, Text]
) -> list[float]:
    """The flow loss of each look under its caption, by the transformer as it is."""
    device = next(transformer.parameters()).device
    found = torch.zeros(len(asked), device=device)
    numbered = list(enumerate(zip(asked, captions, strict=True)))
    for size, batch in in_batches(numbered, lambda one: one[1][0].example.size, AT_ONCE):
        numbers = [number for number, _ in batch]
        shown, said = [look for _, (look, _) in batch], [caption for _, (_, caption) in batch]
        latents = batched([look.example.mean for look in shown], device)
        noise = batched([look.noise for look in shown], device)
        timesteps = torch.tensor([look.timestep for look in shown], device=device)
        noisy = flow.add_noise(latents, noise, timesteps)
        text = stack(texts, said, device)
        prediction = flow.velocity(transformer, noisy, timesteps, flow.TRAINING_GUIDANCE, text, size)
        error = (prediction.float() - (noise - latents).float()).square()
        weights = [look.example.weights for look in shown if look.example.weights is not None]
        if weights:  # all have them, or none; see `encode.encode_pictures`
            error = error * batched(weights, device)[..., None]
        found[numbers] = error.flatten(1).mean(1)
    return found.tolist()


@torch.no_grad()
def drift(transformer: FluxTransformer2DModel, apart: Sequence[Prior], texts: Mapping[str, Text]) -> list[float]:
    """For each state of the base's drawings, the squared change of the velocity over that of the base, 0 and more."""
    device = next(transformer.parameters()).device
    found = []
    for size, batch in in_batches(apart, lambda one: one.size, AT_ONCE):
        noisy, velocity = (batched([getattr(p, part) for p in batch], device) for part in ("noisy", "velocity"))
        timesteps = torch.tensor([p.timestep for p in batch], device=device)
        text = stack(texts, [p.prompt for p in batch], device)
        now = flow.velocity(transformer, noisy, timesteps, flow.TRAINING_GUIDANCE, text, size).float()
        change = (now - velocity.float()).square().flatten(1).mean(1)
        found += (change / velocity.float().square().flatten(1).mean(1)).tolist()
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glance:
    """A short look at the LoRA between two steps."""

    loss: float
    """Of the training pictures under their captions, on fixed noise."""
    own: float
    """The share of the base's loss that the LoRA takes away there."""
    unseen: float | None
    """The same for held-out pictures, while they are."""
    drift: float
    """How far the velocity has moved on prompts that no step was trained on, over its length, squared."""


class _Pictures:
    """The looks at some pictures, under every kind of caption, and the base's losses there."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        examples: Sequence[Example],
        asked: Questions,
        texts: Mapping[str, Text],
        seed: int,
    ) -> None:
        self._transformer, self._texts = transformer, texts
        self._looks = looks(examples, seed)
        own = [look.example.caption for look in self._looks]
        others = {kind: [of_kind[caption] for caption in own] for kind, of_kind in asked.captions.items()}
        self._captions = {"own": own} | others
        self.base = {kind: self.losses(kind) for kind in self._captions}

    def losses(self, kind: str) -> list[float]:
        return losses(self._transformer, self._looks, self._captions[kind], self._texts)

    def gains(self) -> Gains:
        return Gains(**{kind: gain(base, self.losses(kind)) for kind, base in self.base.items()})


class Examination:
    """The looks of one training: first at the base, then at the LoRA as often as one likes.

    It takes nothing from the training's own randomness and leaves nothing behind: with or without it, the weights are
    the same.
    """

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
        """`transformer` must still be without the LoRA; `apart` are states of the base's drawings for `asked.apart`."""
        self._transformer, self._texts, self._apart = transformer, texts, apart
        self._learned = _Pictures(transformer, learned, asked, texts, seed)
        self._unseen = _Pictures(transformer, unseen, asked, texts, seed + 1) if unseen else None
        self._last: tuple[float, Gains] | None = None

    def start(self) -> float:
        """The loss of the training pictures as the training begins: the base's, or that of the LoRA it goes on from."""
        losses = self._learned.losses("own")
        return sum(losses) / len(losses)

    def glance(self, unseen: bool, moved: bool = True) -> Glance:
        """The transformer as it is now; at held-out pictures only where `unseen`, for they may be trained on by now; at
        the drift only where `moved`, for it costs looks of its own: else it is 0."""
        losses = self._learned.losses("own")
        own = gain(self._learned.base["own"], losses)
        held = gain(self._unseen.base["own"], self._unseen.losses("own")) if unseen and self._unseen else None
        return Glance(loss=sum(losses) / LOOKS, own=own, unseen=held, drift=self._drift() if moved else 0.0)

    def last_look_at_unseen(self, glance: Glance) -> None:
        """To be called right after `glance`, while held-out pictures are still so: remembers all gains there."""
        if self._unseen:
            self._last = glance.own, self._unseen.gains()

    def state(self) -> dict[str, Any] | None:
        """What the last look at held-out pictures saw, as plain values; for `go_on`."""
        return self._last and {"own": self._last[0], "gains": dataclasses.asdict(self._last[1])}

    def go_on(self, state: Mapping[str, Any] | None) -> None:
        """Takes up what `state` gave."""
        self._last = (state["own"], Gains(**state["gains"])) if state else None

    def measure(self) -> Measured:
        """All looks at the transformer as it is now. Where the training ended before held-out pictures joined it, they
        are still unseen."""
        if self._unseen and self._last is None:
            self._last = gain(self._learned.base["own"], self._learned.losses("own")), self._unseen.gains()
        own_then, unseen = self._last or (None, None)
        return Measured(
            trained=self._learned.gains(),
            unseen=unseen,
            own_then=own_then,
            drift=self._drift(),
        )

    def _drift(self) -> float:
        moved = drift(self._transformer, self._apart, self._texts)
        return sum(moved) / len(moved)


def gain(base: Sequence[float], lora: Sequence[float]) -> float:
    """The share of the base's loss that the LoRA takes away, averaged over the looks; below 0 where it is worse."""
    return sum(1 - after / before for before, after in zip(base, lora, strict=True)) / len(base)


def thinned(priors: Sequence[Prior]) -> list[Prior]:
    """STATES of each drawing's steps, evenly chosen: what `drift` looks at."""
    times = sorted({prior.timestep for prior in priors}, reverse=True)
    chosen = times[1 :: max(1, (len(times) - 1) // STATES)][:STATES] or times[:1]
    return [prior for prior in priors if prior.timestep in chosen]
