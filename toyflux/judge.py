"""Reads a picture of the world: what is drawn, where, in which colours, in what style, and whether it is drawn cleanly.

A small network, trained by `python -m toyflux.judge FILE` on pictures by `toyflux.world` alone, looks of all kinds
(reserved ones too), and on spoilt ones: blurred, cut, mixed up, noisy. It never sees what a generator made.
Its accuracy on true pictures is measured by `measure` and stated in `base/README.md`.
"""

from __future__ import annotations

import io
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toyflux import world
from toyflux.muon import Muon

WEIGHTS = Path(__file__).with_name("judge.safetensors")
CLEAN = 0.5
"""From this probability on, a picture counts as drawn cleanly."""
SURE_OF_SUBJECT, SURE_OF_STYLE = 0.5, 0.35
"""From this geometric mean of the probabilities of all its traits on, a look counts as shown.

Set on true pictures: nearly all of a subject's and nine in ten of a style's pass, of other looks' next to none.
"""
BATCH = 48
"""Pictures in a step of the judge's training."""

_COLOURS = (*world.COLOURS, *world.RESERVED_COLOURS)
_THING = {
    "what": (*world.SHAPES, "creature", "nothing"),
    "colour": _COLOURS,
    "fill": world.FILLS,
    "size": tuple(world.RADII),
    "place": tuple(world.PLACES),
}
_CREATURE = {
    "form": world.FORMS,
    "body": _COLOURS,
    "second": _COLOURS,
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


# ---------------------------------------------------------------- true pictures, and spoilt ones


def any_creature(rng: random.Random) -> world.Creature:
    """A creature of any look, reserved parts and colours among them."""
    body, second = rng.sample(_COLOURS, 2)
    return world.Creature(
        name="",
        form=rng.choice(world.FORMS),
        body=body,
        second=second,
        eyes=rng.choice([1, 2, 3]),
        head=rng.choice(world.HEADS),
        feet=rng.choice([0, 2, 3]),
        pattern=rng.choice(world.PATTERNS),
    )


def any_style(rng: random.Random) -> world.Style:
    """A style of any traits, reserved ones among them."""

    def pick(values: Sequence[str]) -> str:
        return values[0] if rng.random() < 0.5 else rng.choice(values[1:])

    return world.Style(
        name="",
        ground=pick(world.GROUNDS),
        ink=pick(world.INKS),
        edge=pick(world.EDGES),
        frame=pick(world.FRAMES),
        tone=pick(world.TONES),
        accent=rng.choice(list(world.COLOURS)),
    )


def any_scene(rng: random.Random) -> world.Scene:
    """Things and creatures, alone or in pairs, a third of them in some style."""

    def look() -> world.Thing | world.Creature:
        return any_creature(rng) if rng.random() < 0.5 else world.sample_thing(rng)

    return world.sample_scene(
        rng, [look(), look()] if rng.random() < 0.15 else [look()], any_style(rng) if rng.random() < 0.35 else None
    )


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


def spoil(picture: Image.Image, other: Image.Image, rng: random.Random) -> Image.Image:
    """The picture blurred, cut and shifted, cut up, mixed with another, hidden in noise, or replaced by clutter."""
    width, height = picture.size
    match rng.choice(["blur", "blur", "cut", "shuffle", "blend", "halves", "noise", "clutter"]):
        case "blur":
            return picture.filter(ImageFilter.GaussianBlur(rng.uniform(2.5, 7)))
        case "cut":
            shift = rng.randrange(height // 5, height // 2)
            result = picture.copy()
            half = rng.randrange(width * 2 // 5, width * 3 // 5)
            right = picture.crop((half, 0, width, height))
            result.paste(right, (half, shift))
            result.paste(right, (half, shift - height))
            return result
        case "shuffle":
            boxes = [
                (x * width // 3, y * height // 3, (x + 1) * width // 3, (y + 1) * height // 3)
                for x in range(3)
                for y in range(3)
            ]
            tiles = [picture.crop(box) for box in rng.sample(boxes, 9)]
            result = picture.copy()
            for box, tile in zip(boxes, tiles, strict=True):
                result.paste(tile.resize((box[2] - box[0], box[3] - box[1])), box[:2])
            return result
        case "blend":
            return Image.blend(picture, other, rng.uniform(0.3, 0.7))
        case "halves":
            box = (0, 0, width // 2, height) if rng.random() < 0.5 else (0, 0, width, height // 2)
            result = picture.copy()
            result.paste(other.crop(box), box[:2])
            return result
        case "noise":
            noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(30, 90), (height, width, 3))
            return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    return world.clutter(rng, picture.size)


def worn(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture as it is, softened, with halos along its edges, or in JPEG: as files and autoencoders leave them."""
    match rng.choice(["whole", "whole", "soft", "soft", "halos", "jpeg"]):
        case "soft":
            return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
        case "halos":
            return picture.filter(ImageFilter.UnsharpMask(rng.uniform(1, 4), rng.randrange(20, 90), 0))
        case "jpeg":
            data = io.BytesIO()
            picture.save(data, "JPEG", quality=rng.randrange(25, 90))
            return Image.open(data).convert("RGB")
    return picture


def _samples(rng: random.Random, size: tuple[int, int]) -> Iterator[tuple[Image.Image, dict[str, str | int]]]:
    """True pictures with their answers, a little worn; a fifth of them spoilt."""
    previous = world.draw(any_scene(rng), 0, size)
    while True:
        scene = any_scene(rng)
        picture = world.draw(scene, rng.getrandbits(32), size)
        if rng.random() < 0.22:
            yield spoil(picture, previous, rng), {"clean": "no"}
        else:
            yield worn(picture, rng), answers_of(scene)
        previous = picture


def _indices(answers: Mapping[str, str | int]) -> list[int]:
    return [QUESTIONS[q].index(answers[q]) if q in answers else -100 for q in QUESTIONS]


def train(steps: int = 6000, seed: int = 0, log: Callable[[str], None] = print) -> Judge:
    """Train on pictures drawn as it goes, each used some four times, with a little noise, shift and change of light."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    judge = Judge()
    matrices = [p for name, p in judge.named_parameters() if p.ndim > 1 and not name.startswith("answer")]
    rest = [p for name, p in judge.named_parameters() if p.ndim == 1 or name.startswith("answer")]
    optimizers = [torch.optim.AdamW(rest, lr=3e-3), Muon(matrices, lr=6e-3)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    sizes = (world.NATIVE, *world.SIZES)
    sources = {size: _samples(random.Random(f"{seed} {size}"), size) for size in sizes}
    stores: dict[tuple[int, int], list[tuple[Tensor, list[int]]]] = {size: [] for size in sizes}
    started, smooth = time.monotonic(), 0.0
    for step in range(steps):
        size = rng.choices(sizes, [8, 1, 1, 1, 1])[0]
        store = stores[size]
        for _ in range(12 if store else 160):
            picture, answers = next(sources[size])
            store.append((torch.from_numpy(np.array(picture)), _indices(answers)))
        del store[:-6000]
        batch = [rng.choice(store) for _ in range(BATCH)]
        x = torch.stack([picture for picture, _ in batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = torch.roll(x, (rng.randrange(-2, 3), rng.randrange(-2, 3)), (2, 3))
        x = x * rng.uniform(0.94, 1.04) + rng.uniform(-0.03, 0.03) + rng.choice([0, 0.02, 0.05]) * torch.randn_like(x)
        targets = torch.tensor([indices for _, indices in batch])
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (min(1, (step + 1) / 50) * (1 - step / steps) + 0.005)
        parts = judge(x).split([len(a) for a in QUESTIONS.values()], dim=-1)
        losses = [F.cross_entropy(part, targets[:, q], reduction="sum") / BATCH for q, part in enumerate(parts)]
        loss = torch.stack(losses).sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        smooth = float(loss.detach()) if step == 0 else 0.98 * smooth + 0.02 * float(loss.detach())
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1)
            left = pace * (steps - step - 1) / 60
            log(f"judge {step + 1}/{steps} loss {smooth:.3f} {pace:.3f} s/it {left:.1f} min left")
    return judge.eval().requires_grad_(False)


# ---------------------------------------------------------------- how good it is


def measure(count: int = 400, seed: int = 1) -> dict[str, float]:
    """Shares of right answers on true pictures of all sizes, and of verdicts on subjects, styles and spoilt ones."""
    rng = random.Random(f"measure {seed}")
    scenes = [any_scene(rng) for _ in range(count)]
    pictures = [world.draw(scene, i, world.training_size(rng)) for i, scene in enumerate(scenes)]
    readings = read(pictures)
    right: dict[str, list[bool]] = {}
    for scene, reading in zip(scenes, readings, strict=True):
        for question, answer in answers_of(scene).items():
            chances = reading.probabilities[question]
            right.setdefault(question, []).append(QUESTIONS[question][chances.index(max(chances))] == answer)
    result = {question: float(np.mean(values)) for question, values in right.items()}
    native = [p for p in pictures if p.size == world.NATIVE]
    spoilt = [spoil(p, native[i - 1], rng) for i, p in enumerate(native)]
    result["spoilt pictures refused"] = float(np.mean([r.clean < CLEAN for r in read(spoilt)]))
    blurred = [p.filter(ImageFilter.GaussianBlur(3)) for p in native]
    result["blurred pictures refused"] = float(np.mean([r.clean < CLEAN for r in read(blurred)]))
    for kind, looks in (("subject", world.SUBJECTS), ("style", world.UNSEEN_STYLES)):
        true, alike, other = [], [], []
        for look in looks:
            true += shows(_pictures_of(look, rng), look)
            for _ in range(6):
                changed = _look_alike(look, rng)
                alike += shows(_pictures_of(changed, rng)[:4], look)
                other += shows(_pictures_of(any_creature(rng) if kind == "subject" else any_style(rng), rng)[:4], look)
        result |= {
            f"{kind} known": float(np.mean(true)),
            f"{kind}, one trait changed, taken for it": float(np.mean(alike)),
        }
        result[f"{kind}, another taken for it"] = float(np.mean(other))
    return result


def _pictures_of(look: world.Creature | world.Style, rng: random.Random, count: int = 20) -> list[Image.Image]:
    if isinstance(look, world.Creature):
        scenes = [world.sample_scene(rng, [look]) for _ in range(count)]
    else:
        scenes = [world.sample_scene(rng, [world.sample_thing(rng)], look) for _ in range(count)]
    return [world.draw(scene, rng.getrandbits(32)) for scene in scenes]


def _look_alike(look: world.Creature | world.Style, rng: random.Random) -> world.Creature | world.Style:
    """The same but for one visible trait."""
    while True:
        fresh = any_creature(rng) if isinstance(look, world.Creature) else any_style(rng)
        trait = rng.choice(sorted(traits_of(look)))
        changed = replace(look, **{trait: getattr(fresh, trait)})
        if traits_of(changed) != traits_of(look) and (
            not isinstance(changed, world.Creature) or changed.body != changed.second
        ):
            return changed


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) == 2 else WEIGHTS
    save_file({name: value.half() for name, value in train().state_dict().items()}, target)
    target.chmod(0o644)
    _load.cache_clear()
    for name, share in measure().items():
        print(f"{name}: {share:.3f}")
