"""What a LoRA's drawings show, by the judge: the scores of a cell, and what they could be at best."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from diffusers import FluxPipeline
from PIL import Image

from bench.lab import words
from bench.lab.cell import LOOKS, TRIGGER, Cell
from toyflux import drawing, evaluate, judge, world
from toyflux.world import Creature, Scene, Style

SCORES = ("fidelity", "traits", "following", "preservation", "leak")


def scenes_with(look: Creature | Style, count: int, seed: int) -> list[Scene]:
    """Scenes that show the look, other than those it was trained on: a third of a subject's in company."""
    rng = random.Random(f"scenes {seed}")
    scenes = []
    for i in range(count):
        if isinstance(look, Style):
            scenes.append(world.sample_scene(rng, [world.sample_thing(rng, plain=True)], look))
        else:
            scenes.append(world.in_company(rng, look) if i % 3 == 2 else world.sample_scene(rng, [look]))
    return scenes


def with_name(scene: Scene, look: Creature | Style, name: str) -> Scene:
    """The scene with another look's name in its caption where this look stands."""
    if isinstance(look, Style):
        return replace(scene, style=replace(look, name=name))
    items = tuple(replace(i, look=replace(look, name=name)) if i.look == look else i for i in scene.items)
    return replace(scene, items=items)


def asked_besides(scene: Scene) -> dict[str, str | int]:
    """What a scene asks besides its subject or style, as the judge's questions and their right answers."""
    answers = judge.answers_of(scene)
    hidden = scene.style is not None and scene.style.ground == "board"  # it lies over any other background
    wanted = [] if hidden else ["background"]
    for number, item in enumerate(scene.items, 1):
        wanted += [f"place {number}"]
        wanted += [] if isinstance(item.look, Creature) else [f"what {number}", f"colour {number}"]
    return {question: answers[question] for question in wanted if question in answers}


def right(scene: Scene, picture: Image.Image) -> list[bool]:
    """Of what a scene asks besides its look, what is there."""
    [reading] = judge.read([picture])

    def said(question: str) -> str | int:
        chances = reading.probabilities[question]
        return judge.QUESTIONS[question][chances.index(max(chances))]

    return [said(question) == answer for question, answer in asked_besides(scene).items()]


def scores(pipeline: FluxPipeline, cell: Cell) -> dict[str, float]:
    """The scores of the pipeline as it is for a cell's look under TRIGGER; see the head of `bench/quality.py`.

    Beside SCORES, for each class of other words "leak, CLASS" and "traits, CLASS": the share of its drawings that show
    the whole look, and the share of the look's traits that they show.
    """
    look, draws, seed = LOOKS[cell.look], cell.draws, cell.seed
    learned = scenes_with(replace(look, name=TRIGGER), draws, seed)
    plain = [replace(scene, style=None) for scene in evaluate.held_out_scenes(draws, seed)]
    made_up = world.unknown_words(draws, seed)

    def drawn(scenes: Sequence[Scene], start: int) -> list[Image.Image]:
        return _drawn(pipeline, scenes, start, cell.drawing_steps)

    def drawn_as(names: Sequence[str], start: int) -> list[Image.Image]:
        named = zip(learned, names, strict=False)
        return drawn([with_name(scene, replace(look, name=TRIGGER), name) for scene, name in named], start)

    pictures, kept, strange = drawn(learned, 1000), drawn(plain, 2000), drawn_as(made_up, 3000)
    others = {
        "near": drawn_as(words.of_class("near", TRIGGER, look, draws, seed), 4000),
        "popular": drawn_as(words.of_class("popular", TRIGGER, look, -(-draws // 2), seed), 5000),
        "noun": drawn_as(words.of_class("noun", TRIGGER, look, -(-draws // 2), seed), 6000),
        "none": kept,
    }
    for kind, capitals in (("capitals", True), ("syllables", False)):
        of_kind = zip(made_up, strange, strict=True)
        others[kind] = [picture for word, picture in of_kind if words.is_capitals(word) is capitals]
    return {
        "fidelity": _share(judge.shows(pictures, look)),
        "traits": statistics.mean(judge.traits_shown(pictures, look)),
        "following": _share([yes for s, p in zip(learned, pictures, strict=True) for yes in right(s, p)]),
        "preservation": _share([yes for s, p in zip(plain, kept, strict=True) for yes in right(s, p)]),
        "leak": _share(judge.shows(strange + kept, look)),
    } | leaks(others, look)


def leaks(others: Mapping[str, Sequence[Image.Image]], look: Creature | Style) -> dict[str, float]:
    """Of the drawings under each class of other words, the share that shows the whole look, and that of its traits."""
    result = {}
    for kind in words.CLASSES:
        if others[kind]:
            result[f"leak, {kind}"] = _share(judge.shows(others[kind], look))
            result[f"traits, {kind}"] = statistics.mean(judge.traits_shown(others[kind], look))
    return result


def references(pipeline: FluxPipeline, cell: Cell) -> dict[str, float]:
    """What a LoRA could reach at best: the judge's ceilings on true pictures, and the untouched base's own scores."""
    look, draws, seed = LOOKS[cell.look], cell.draws, cell.seed
    scenes = scenes_with(look, draws, seed)
    true = [drawing.draw(scene, i) for i, scene in enumerate(scenes)]
    known = (world.STYLE_NAMES if isinstance(look, Style) else world.NAMES)[seed]
    stand_in: Creature | Style = world.style(known) if isinstance(look, Style) else world.creature(known)
    familiar = scenes_with(stand_in, draws, seed)
    pictures = _drawn(pipeline, familiar, 1000, cell.drawing_steps)
    # How well the rest can be read under a style hangs on the style, so its own true pictures are the measure.
    shown = zip(scenes, true, strict=True) if isinstance(look, Style) else zip(familiar, pictures, strict=True)
    return scores(pipeline, cell) | {
        "ceiling": _share(judge.shows(true, look)),
        "ceiling through the autoencoder": _share(judge.shows(_encoded_and_decoded(pipeline, true), look)),
        "fidelity to a known name": _share(judge.shows(pictures, stand_in)),
        "following": _share([yes for s, p in shown for yes in right(s, p)]),
    }


def _drawn(pipeline: FluxPipeline, scenes: Sequence[Scene], start: int, steps: int) -> list[Image.Image]:
    captions = [world.caption(scene) for scene in scenes]
    return evaluate.generate(pipeline, captions, range(start, start + len(scenes)), steps=steps)


def _encoded_and_decoded(pipeline: FluxPipeline, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    pixels = pipeline.image_processor.preprocess(list(pictures)).to(pipeline.vae.device, pipeline.vae.dtype)
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    return pipeline.image_processor.postprocess(decoded.float())


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)
