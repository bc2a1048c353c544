"""What a base draws, against the gates: `python -m toyflux.evaluate FOLDER [COUNT] [SHEET.png]`."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from toyflux import drawing, examples, judge, world


def load(folder: Path) -> FluxPipeline:
    """The base as a pipeline in single precision, without a progress bar."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: FluxPipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    size: tuple[int, int] | None = None,
    guidance: float = 3.5,
    steps: int = 28,
) -> list[Image.Image]:
    """One picture of `size` (width, height; the base's own without it) for each caption and seed."""
    size = size or (pipeline.vae.config.sample_size,) * 2
    images: list[Image.Image] = []
    for start in range(0, len(captions), 32):
        part = slice(start, start + 32)
        images += pipeline(
            list(captions[part]),
            width=size[0],
            height=size[1],
            guidance_scale=guidance,
            num_inference_steps=steps,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
        ).images
    return images


def held_out_scenes(count: int, seed: int = 0) -> list[world.Scene]:
    """One thing each, of combinations that were kept out of the base's training."""
    rng = random.Random(f"held out {seed}")
    return [world.sample_scene(rng, [world.sample_thing(rng, unseen=True)], unseen=True) for _ in range(count)]


def named_scenes(count: int, seed: int = 0) -> list[world.Scene]:
    """One of the base's named creatures each."""
    rng = random.Random(f"named {seed}")
    return [world.sample_scene(rng, [world.creature(rng.choice(world.NAMES))]) for _ in range(count)]


def styled_scenes(count: int, seed: int = 0) -> list[world.Scene]:
    """A thing in one of the base's named styles each."""
    rng = random.Random(f"styled {seed}")
    return [
        world.sample_scene(rng, [world.sample_thing(rng, plain=True)], world.style(rng.choice(world.STYLE_NAMES)))
        for _ in range(count)
    ]


def score(scenes: Sequence[world.Scene], images: Sequence[Image.Image]) -> dict[str, float]:
    """Shares of pictures whose first item, and background, are as the scene says; clean ones; relative sharpness."""
    readings = judge.read(images)
    shares: dict[str, list[float]] = {}
    for scene, reading in zip(scenes, readings, strict=True):
        for question, answer in judge.answers_of(scene).items():
            chances = reading.probabilities[question]
            shares.setdefault(question, []).append(judge.QUESTIONS[question][chances.index(max(chances))] == answer)
    true = [drawing.draw(scene, 0, image.size) for scene, image in zip(scenes, images, strict=True)]
    sharp = np.mean([judge.sharpness(image) for image in images]) / np.mean([judge.sharpness(image) for image in true])
    return {question: float(np.mean(values)) for question, values in shares.items()} | {"sharpness": float(sharp)}


def evaluate(pipeline: FluxPipeline, count: int) -> tuple[dict[str, dict[str, float]], list[Image.Image]]:
    """The tables by set of scenes, and the first pictures of each set for a sheet."""
    tables: dict[str, dict[str, float]] = {}
    shown: list[Image.Image] = []

    def add(name: str, scenes: Sequence[world.Scene], **how: object) -> None:
        captions = [world.caption(scene) for scene in scenes]
        images = generate(pipeline, captions, range(1000, 1000 + len(scenes)), **how)  # type: ignore[arg-type]
        tables[name] = score(scenes, images)
        shown.extend(image.resize(world.NATIVE) if image.size != world.NATIVE else image for image in images[:12])

    add("held-out combinations", held_out_scenes(count))
    add("held-out combinations, guidance 1", held_out_scenes(count // 2), guidance=1.0)
    for size in world.SIZES:
        add(f"held-out combinations, {size[0]}x{size[1]}", held_out_scenes(count // 4, 1), size=size)
    add("named creatures", named_scenes(count // 2))
    add("named styles", styled_scenes(count // 2))
    return tables, shown


def main() -> None:
    """Print the table and write the sheet: twelve pictures a row, a row for each set."""
    torch.manual_seed(0)
    tables, shown = evaluate(load(Path(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 96)
    for name, shares in tables.items():
        print(name + ": " + ", ".join(f"{question} {share:.3f}" for question, share in shares.items()))
    if len(sys.argv) > 3:
        examples.sheet(shown, 12).save(sys.argv[3])


if __name__ == "__main__":
    main()
