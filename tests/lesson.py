"""A LoRA of an example, trained on the toy base with the defaults, and what it draws, as the judge reads it.

The work of `tests/test_learning.py`, each lesson in a process of its own with one thread: small matrix products gain
little from two threads, and two lessons at once use two cores.
"""

import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from bench.lab import scores, training, words
from bench.lab.cell import TRIGGER, Cell
from lora import job
from lora.file import source
from lora.flux import base, generate
from lora.flux.generate import Lora
from toyflux import evaluate, examples, judge, world
from toyflux.world import Creature, Scene, Style

ROOT = Path(__file__).parent.parent
KINDS = ("subject", "style")
CALLED, OTHERS = 100, {"made up": 200, "near": 48, "popular": 24, "noun": 24}
"""How many drawings with the trigger word, and under other words. Most are made-up words, whose bound is the nearest
to what is measured."""
OWN = evaluate.held_out_scenes(200) + evaluate.named_scenes(50) + evaluate.styled_scenes(50)
"""Scenes of the world's own captions."""
PARTS = (slice(0, 160), slice(160, 300))
"""Of OWN, each drawn by one process; whole batches (`evaluate.generate` draws 32 at once)."""
EXACT = slice(192, 256)
"""Of OWN: of all three kinds, whole batches, since others may add up otherwise."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Of some drawings: whether each shows the whole look, and which share of its traits."""

    whole: list[bool]
    traits: list[float]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a LoRA of an example draws."""

    called: Shown
    """With the trigger word, where it was never shown."""
    others: Mapping[str, Shown]
    """With other words in its place, by class: those of OTHERS, and "capitals" and "syllables" of those made up."""
    own: list[bool]
    """Of OWN, whether each drawing has what its caption says."""
    exact: list[bytes]
    """The pixels of OWN[EXACT] at scale 0."""


@dataclass(frozen=True, kw_only=True)
class Before:
    """What the bare base draws of OWN: as in Lesson."""

    own: list[bool]
    exact: list[bytes]


def learn_all() -> tuple[dict[str, Lesson], Before]:
    """Both lessons, and the bare base's own drawings; two processes at a time."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        lessons = {kind: pool.submit(learn, kind) for kind in KINDS}
        parts = [result.result() for result in [pool.submit(before, part) for part in PARTS]]
        whole = Before(own=[yes for p in parts for yes in p.own], exact=[image for p in parts for image in p.exact])
        return {kind: lesson.result() for kind, lesson in lessons.items()}, whole


def before(part: slice) -> Before:
    """A part of OWN by the bare base."""
    pictures = _draw(_pipeline(), OWN[part], 2000 + part.start)
    first, last = (min(max(end - part.start, 0), len(pictures)) for end in (EXACT.start, EXACT.stop))
    return Before(own=_right(OWN[part], pictures), exact=[picture.tobytes() for picture in pictures[first:last]])


def learn(kind: str) -> Lesson:
    """Trains on an example by the job itself, as `script/train` does with the defaults, and draws."""
    look = world.EXAMPLES[kind]
    with tempfile.TemporaryDirectory(prefix="lesson-") as folder:
        pipeline, file = _pipeline(), _train(kind, look, Path(folder))
        _put_on(pipeline, file, 1.0)
        shown = {text for _, text in examples.example(kind)}

        def drawn(names: Sequence[str]) -> list[Image.Image]:
            return _draw(pipeline, _scenes(look, shown, names), 1000)

        called = drawn([TRIGGER] * CALLED)
        made_up = world.unknown_words(OTHERS["made up"], 5)
        others = {"made up": drawn(made_up)}
        for word_class, count in OTHERS.items():
            if word_class not in others:
                others[word_class] = drawn(words.of_class(word_class, TRIGGER, look, count, seed=5))
        for word_class, capitals in (("capitals", True), ("syllables", False)):
            of_all = zip(made_up, others["made up"], strict=True)
            others[word_class] = [picture for word, picture in of_all if words.is_capitals(word) is capitals]
        own = _draw(pipeline, OWN, 2000)
        _put_on(pipeline, file, 0.0)
        exact = _draw(pipeline, OWN[EXACT], 2000 + EXACT.start)
    return Lesson(
        called=_shown(called, look),
        others={word_class: _shown(pictures, look) for word_class, pictures in others.items()},
        own=_right(OWN, own),
        exact=[picture.tobytes() for picture in exact],
    )


def _train(kind: str, look: Creature | Style, folder: Path) -> Path:
    cell = Cell(look=look.name, recipe="defaults", steps=1000, seed=1, pictures=20, draws=0, drawing_steps=28, base="")
    flux = base.find(None, None)
    wanted = training.request_for(cell, ROOT / "examples" / f"{kind}.zip", flux.width)
    tar = job.run(
        wanted, output=folder, flux_base=None, captioner=None, log=lambda line: None, metric=lambda name, value: None
    )
    return source.fetch(str(tar), folder, "the tar")


def _pipeline() -> FluxPipeline:
    return evaluate.load(base.find(None, None).folder)


def _put_on(pipeline: FluxPipeline, file: Path, scale: float) -> None:
    generate.put_on(pipeline, [Lora(name="lesson", file=file, scale=scale)], lambda line: None)


def _draw(pipeline: FluxPipeline, scenes: Sequence[Scene], start: int) -> list[Image.Image]:
    captions = [world.caption(scene) for scene in scenes]
    return evaluate.generate(pipeline, captions, range(start, start + len(scenes)))


def _scenes(look: Creature | Style, shown: set[str], names: Sequence[str]) -> list[Scene]:
    """The look alone under each of these names, in places and on backgrounds other than its pictures'."""
    found = [scene for scene in scores.scenes_with(look, 5 * len(names), seed=7) if len(scene.items) == 1]
    new = [scene for scene in found if world.caption(scores.with_name(scene, look, TRIGGER)) not in shown]
    assert len(new) >= len(names)
    return [scores.with_name(scene, look, name) for scene, name in zip(new, names, strict=False)]


def _shown(pictures: Sequence[Image.Image], look: Creature | Style) -> Shown:
    return Shown(whole=judge.shows(pictures, look), traits=judge.traits_shown(pictures, look))


def _right(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> list[bool]:
    return [all(scores.right(scene, picture)) for scene, picture in zip(scenes, pictures, strict=True)]


def told(lesson: Lesson) -> str:
    """The whole look and its traits under the trigger word and under each class of other words, in a line."""
    parts = {"trigger word": lesson.called, **lesson.others}
    return "; ".join(f"{name} {np.mean(s.whole):.2f}, {np.mean(s.traits):.2f}" for name, s in parts.items())
