"""How the judge is trained and measured: `python -m toyflux.train_judge FILE`.

It sees true pictures of all kinds of looks, reserved ones too, and spoilt ones: blurred, cut, mixed up, noisy. It never
sees what a generator made.
"""

from __future__ import annotations

import io
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

from toyflux import drawing, judge, world
from toyflux.judge import CLEAN, COLOURS, QUESTIONS, WEIGHTS, Judge, answers_of, read, shows, traits_of
from toyflux.muon import Muon

BATCH = 48
"""Pictures in a step of the judge's training."""


def any_creature(rng: random.Random) -> world.Creature:
    """A creature of any look, reserved parts and colours among them."""
    body, second = rng.sample(COLOURS, 2)
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
    return drawing.clutter(rng, picture.size)


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
    previous = drawing.draw(any_scene(rng), 0, size)
    while True:
        scene = any_scene(rng)
        picture = drawing.draw(scene, rng.getrandbits(32), size)
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
    pictures = [drawing.draw(scene, i, world.training_size(rng)) for i, scene in enumerate(scenes)]
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
    return [drawing.draw(scene, rng.getrandbits(32)) for scene in scenes]


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
    judge._load.cache_clear()
    for name, share in measure().items():
        print(f"{name}: {share:.3f}")
