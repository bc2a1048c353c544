"""Reads a picture of the world: what is drawn, where, in which colours, in what style, and whether it is drawn cleanly.

A small network, trained by `toyflux.train_judge` on true and spoilt pictures of the world; it never saw what a
generator made. Its accuracy on true pictures is measured there and stated in `base/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from toyflux import world

WEIGHTS = Path(__file__).with_name("judge.safetensors")
CLEAN = 0.5
"""From this probability on, a picture counts as drawn cleanly."""
SURE_OF_SUBJECT, SURE_OF_STYLE = 0.5, 0.35
"""From this geometric mean of the probabilities of all its traits on, a look counts as shown.

Set on true pictures: nearly all of a subject's and nine in ten of a style's pass, of other looks' next to none.
"""

COLOURS = (*world.COLOURS, *world.RESERVED_COLOURS)
_THING = {
    "what": (*world.SHAPES, "creature", "nothing"),
    "colour": COLOURS,
    "fill": world.FILLS,
    "size": tuple(world.RADII),
    "place": tuple(world.PLACES),
}
_CREATURE = {
    "form": world.FORMS,
    "body": COLOURS,
    "second": COLOURS,
    "eyes": (1, 2, 3),
    "head": world.HEADS,
    "feet": (0, 2, 3),
    "pattern": world.PATTERNS,
}
_STYLE = {
    "ground": world.GROUNDS,
    "ink": world.INKS,
    "edge": ("none", "edge"),
    "frame": world.FRAMES,
    "tone": world.TONES,
    "accent": tuple(world.COLOURS),
}
QUESTIONS: dict[str, tuple[str | int, ...]] = {
    **{f"{q} 1": a for q, a in _THING.items()},
    **{f"{q} 2": a for q, a in _THING.items()},
    **_CREATURE,
    **_STYLE,
    "background": tuple(world.COLOURS),
    "clean": ("no", "yes"),
}
"""What the network answers, and the answers in their order."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One item as read: a shape or "creature", its colour, fill, size and place."""

    what: str
    colour: str
    fill: str
    size: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A picture as read. `things`: up to two, left or top first. `traits`: the creature's and the style's traits.

    `probabilities` holds each question's answers' probabilities; `clean` is that of a cleanly drawn picture.
    """

    things: tuple[Seen, ...]
    background: str
    traits: Mapping[str, str | int]
    clean: float
    probabilities: Mapping[str, tuple[float, ...]]


class Judge(nn.Module):
    """Patches of four pixels, five convolutions down to a sixteenth; what is where, and what is there at all."""

    def __init__(self) -> None:
        super().__init__()

        def block(inner: int, outer: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.SiLU())

        self.see = nn.Sequential(
            nn.PixelUnshuffle(4),
            block(48, 48, 1),
            block(48, 64, 2),
            block(64, 96, 1),
            block(96, 128, 2),
            block(128, 128, 1),
        )
        self.place = nn.Conv2d(128, 16, 1)
        self.think = nn.Sequential(nn.Linear(16 * 36 + 2 * 128, 256), nn.SiLU())
        self.answer = nn.Linear(256, sum(map(len, QUESTIONS.values())))

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (n, 3, height, width) in [-1, 1], sides in multiples of 16 -> scores (n, all answers)."""
        seen = self.see(pictures)
        grid = F.adaptive_avg_pool2d(self.place(seen), 6).flatten(1)
        return self.answer(self.think(torch.cat([grid, seen.amax((2, 3)), seen.mean((2, 3))], dim=1)))


# ---------------------------------------------------------------- reading


@cache
def _load(path: Path = WEIGHTS) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def _to_tensor(images: Sequence[Image.Image]) -> Tensor:
    return (
        torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )


def _normal_size(image: Image.Image) -> Image.Image:
    """Scaled to about the native area, sides in multiples of 16, so that a judge trained there can read it."""
    scale = (world.NATIVE[0] * world.NATIVE[1] / (image.width * image.height)) ** 0.5
    size = (max(16, round(image.width * scale / 16) * 16), max(16, round(image.height * scale / 16) * 16))
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def read(images: Sequence[Image.Image]) -> list[Reading]:
    """What is in each picture (RGB, any size or proportions near the world's)."""
    judge = _load()
    ready = [_normal_size(image) for image in images]
    scores = torch.zeros(len(images), judge.answer.out_features)
    for size in {image.size for image in ready}:
        chosen = [i for i, image in enumerate(ready) if image.size == size]
        for part in torch.tensor(chosen).split(64):
            scores[part] = judge(_to_tensor([ready[i] for i in part.tolist()]))
    probabilities = [part.softmax(-1).tolist() for part in scores.split([len(a) for a in QUESTIONS.values()], dim=-1)]
    return [
        _reading({q: tuple(p[i]) for q, p in zip(QUESTIONS, probabilities, strict=True)}) for i in range(len(images))
    ]


def _reading(probabilities: dict[str, tuple[float, ...]]) -> Reading:
    best = {q: QUESTIONS[q][max(range(len(p)), key=p.__getitem__)] for q, p in probabilities.items()}
    items = [Seen(**{q: str(best[f"{q} {number}"]) for q in _THING}) for number in (1, 2)]
    return Reading(
        things=tuple(item for item in items if item.what != "nothing"),
        background=str(best["background"]),
        traits={q: best[q] for q in (*_CREATURE, *_STYLE)},
        clean=probabilities["clean"][1],
        probabilities=probabilities,
    )


def likeness(reading: Reading, look: world.Creature | world.Style) -> float:
    """The geometric mean of the probabilities of a look's traits, 0 where the picture is not clean."""
    if reading.clean < CLEAN:
        return 0.0
    wanted = traits_of(look)
    chances = [reading.probabilities[q][QUESTIONS[q].index(value)] for q, value in wanted.items()]
    if isinstance(look, world.Creature):
        chances.append(max(reading.probabilities[f"what {n}"][_THING["what"].index("creature")] for n in (1, 2)))
    return float(np.exp(np.mean(np.log(np.maximum(chances, 1e-6)))))


def traits_of(look: world.Creature | world.Style) -> dict[str, str | int]:
    """What can be seen of a look: a style's accent only where it colours something."""
    if isinstance(look, world.Creature):
        return {trait: getattr(look, trait) for trait in _CREATURE}
    traits: dict[str, str | int] = {
        "ground": look.ground,
        "ink": look.ink,
        "edge": "none" if look.edge == "none" else "edge",
        "frame": look.frame,
        "tone": look.tone,
    }
    if (
        look.frame != "none"
        or look.edge != "none"
        or look.ground in ("gradient", "dotted", "striped")
        or look.tone == "two-tone"
    ):
        traits["accent"] = look.accent
    return traits


def shows(images: Sequence[Image.Image], look: world.Creature | world.Style) -> list[bool]:
    """Whether each picture cleanly shows this creature, or is in this style."""
    sure = SURE_OF_SUBJECT if isinstance(look, world.Creature) else SURE_OF_STYLE
    return [likeness(reading, look) >= sure for reading in read(images)]


def traits_shown(images: Sequence[Image.Image], look: world.Creature | world.Style) -> list[float]:
    """Of a look's traits, the share that each picture shows, cleanly drawn or not."""
    traits = traits_of(look)
    return [float(np.mean([r.traits[trait] == value for trait, value in traits.items()])) for r in read(images)]


def sharpness(image: Image.Image) -> float:
    """How steep the steepest edges are: the mean of the largest 3 % of colour steps between neighbours, 0 to 255."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    steps = [np.abs(np.diff(pixels, axis=axis)).mean(-1).ravel() for axis in (0, 1)]
    ordered = np.sort(np.concatenate(steps))
    return float(ordered[-max(1, len(ordered) * 3 // 100) :].mean())


def answers_of(scene: world.Scene) -> dict[str, str | int]:
    """What can be read off a scene's picture; a question is missing where the style hides the answer."""
    manner = scene.style
    answers: dict[str, str | int] = {"clean": "yes"}
    colours_show = manner is None or manner.tone == "none"
    for number, item in enumerate(scene.items, 1):
        look = item.look
        answers |= {f"what {number}": look.shape if isinstance(look, world.Thing) else "creature"}
        answers |= {f"size {number}": item.size, f"place {number}": item.place}
        if colours_show:
            answers[f"colour {number}"] = look.colour if isinstance(look, world.Thing) else look.body
        if isinstance(look, world.Thing) and (manner is None or manner.ink == "flat"):
            answers[f"fill {number}"] = look.fill
    if len(scene.items) == 1:
        answers["what 2"] = "nothing"
    creatures = [item.look for item in scene.items if isinstance(item.look, world.Creature)]
    if len(creatures) == 1 and (manner is None or manner.ink == "flat"):
        traits = traits_of(creatures[0])
        answers |= traits if colours_show else {q: a for q, a in traits.items() if q not in ("body", "second")}
    if colours_show and (manner is None or manner.ground != "board"):
        answers["background"] = scene.background
    plain = world.Style(name="", ground="plain", ink="flat", edge="none", frame="none", tone="none", accent="red")
    return answers | traits_of(manner or plain)
