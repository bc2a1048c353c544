"""It learns: what LoRAs of the examples, trained on the toy base with the defaults, draw, by the judge. Fixed seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image

from bench import quality
from lora import job
from lora.file import source
from lora.flux import base, generate
from lora.flux.generate import Lora
from toyflux import evaluate, examples, judge, world
from toyflux.world import Creature, Scene, Style

ROOT = Path(__file__).parent.parent
DRAWS = 200


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A LoRA of an example, and a pipeline that wears it."""

    look: Creature | Style
    shown: frozenset[str]
    """The captions that it was trained with."""
    file: Path
    pipeline: FluxPipeline


def draw(pipeline: FluxPipeline, scenes: Sequence[Scene], start: int) -> list[Image.Image]:
    captions = [world.caption(scene) for scene in scenes]
    return evaluate.generate(pipeline, captions, range(start, start + len(scenes)))


def put_on(pipeline: FluxPipeline, file: Path, scale: float) -> None:
    generate.put_on(pipeline, [Lora(name="lesson", file=file, scale=scale)], lambda line: None)


OWN = evaluate.held_out_scenes(DRAWS) + evaluate.named_scenes(DRAWS // 4) + evaluate.styled_scenes(DRAWS // 4)
"""Of the world's own captions."""


@pytest.fixture(scope="module")
def before() -> list[Image.Image]:
    """What the bare base draws of OWN."""
    return draw(evaluate.load(base.find(None, None).folder), OWN, 2000)


@pytest.fixture(scope="module", params=["subject", "style"])
def lesson(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    look = world.EXAMPLES[request.param]
    pipeline = evaluate.load(base.find(None, None).folder)
    folder = tmp_path_factory.mktemp(request.param)
    cell = quality.Cell(
        look=look.name, recipe="defaults", steps=1000, seed=1, pictures=20, draws=DRAWS, drawing_steps=28, base="toy"
    )
    archive = ROOT / "examples" / f"{request.param}.zip"
    wanted = quality.request_for(cell, archive, pipeline.transformer.inner_dim)
    tar = job.run(
        wanted, output=folder, flux_base=None, captioner=None, log=lambda line: None, metric=lambda name, value: None
    )
    file = source.fetch(str(tar), folder, "the tar")
    put_on(pipeline, file, 1.0)
    shown = frozenset(text for _, text in examples.example(request.param))
    return Lesson(look=look, shown=shown, file=file, pipeline=pipeline)


def scenes(lesson: Lesson, names: Sequence[str]) -> list[Scene]:
    """The look alone under each of these names, in places and on backgrounds other than its pictures'."""
    found = [s for s in quality.scenes_with(lesson.look, 5 * len(names), seed=7) if len(s.items) == 1]
    new = [s for s in found if world.caption(quality.with_name(s, lesson.look, "TOK")) not in lesson.shown]
    return [quality.with_name(scene, lesson.look, name) for scene, name in zip(new, names, strict=False)]


@pytest.fixture(scope="module")
def called(lesson: Lesson) -> list[Image.Image]:
    return draw(lesson.pipeline, scenes(lesson, ["TOK"] * DRAWS), 1000)


@pytest.fixture(scope="module")
def misnamed(lesson: Lesson) -> list[Image.Image]:
    return draw(lesson.pipeline, scenes(lesson, world.unknown_words(DRAWS, 5)), 1000)


def share_of_traits(pictures: Sequence[Image.Image], look: Creature | Style) -> float:
    traits = judge.traits_of(look).items()
    return float(np.mean([r.traits[trait] == value for r in judge.read(pictures) for trait, value in traits]))


def test_the_trigger_word_calls_the_traits_that_were_shown_and_another_word_does_not(
    lesson: Lesson, called: list[Image.Image], misnamed: list[Image.Image]
) -> None:
    with_it, without = (share_of_traits(pictures, lesson.look) for pictures in (called, misnamed))
    assert len(called) == len(misnamed) == DRAWS
    assert with_it >= 0.8
    assert with_it - without >= 0.4


def test_the_trigger_word_draws_what_was_shown_where_it_was_never_shown(
    lesson: Lesson, called: list[Image.Image]
) -> None:
    assert np.mean(judge.shows(called, lesson.look)) >= 0.85


def test_another_made_up_word_does_not_draw_it(lesson: Lesson, misnamed: list[Image.Image]) -> None:
    assert np.mean(judge.shows(misnamed, lesson.look)) <= 0.1


def test_without_the_trigger_word_the_base_still_draws_what_it_drew(lesson: Lesson, before: list[Image.Image]) -> None:
    after = draw(lesson.pipeline, OWN, 2000)
    was_right = [all(quality.right(s, p)) for s, p in zip(OWN, before, strict=True)]
    still = [all(quality.right(s, p)) for s, p, good in zip(OWN, after, was_right, strict=True) if good]
    assert len(still) >= 0.6 * len(OWN)
    assert np.mean(still) >= 0.95


def test_scale_0_draws_the_bases_pictures_exactly(lesson: Lesson, before: list[Image.Image]) -> None:
    some = slice(192, 256)  # of all three kinds; two whole batches of those before, for others may add up otherwise
    put_on(lesson.pipeline, lesson.file, 0.0)
    drawn = draw(lesson.pipeline, OWN[some], 2000 + some.start)
    put_on(lesson.pipeline, lesson.file, 1.0)
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in before[some]]
