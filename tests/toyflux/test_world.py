"""The world's pictures and captions: deterministic, as said, and apart from what is kept for learning."""

import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toyflux import drawing, examples, world
from toyflux.world import COLOURS, PLACES, RADII, Creature, Item, Scene, Thing

RED_CIRCLE = Scene(items=(Item(look=Thing(shape="circle", colour="red")),), background="blue")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def near(image: Image.Image, colour: str) -> np.ndarray:
    return np.abs(pixels(image) - COLOURS[colour]).max(-1) < 30


def test_the_same_seed_draws_the_same_picture_and_another_moves_it() -> None:
    first, again, other = (drawing.draw(RED_CIRCLE, seed) for seed in (3, 3, 4))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert np.abs(pixels(first) - pixels(other)).mean() < 10


def test_a_picture_has_the_size_the_thing_and_the_background_that_were_asked_for() -> None:
    for size in (world.NATIVE, *world.SIZES):
        image = drawing.draw(RED_CIRCLE, 0, size)
        assert image.size == size
        assert image.mode == "RGB"
        centre = pixels(image)[size[1] // 2, size[0] // 2]
        assert np.abs(centre - COLOURS["red"]).max() < 12
        assert np.abs(pixels(image)[2, 2] - COLOURS["blue"]).max() < 12


@pytest.mark.parametrize("place", list(PLACES))
def test_a_thing_stands_whole_at_its_place(place: str) -> None:
    scene = replace(RED_CIRCLE, items=(replace(RED_CIRCLE.items[0], place=place),))
    ys, xs = np.nonzero(near(drawing.draw(scene, 1), "red"))
    sides = {"left": xs.mean() < 38, "right": xs.mean() > 58, "top": ys.mean() < 38, "bottom": ys.mean() > 58}
    assert sides.get(place, abs(xs.mean() - 48) < 4 and abs(ys.mean() - 48) < 4)
    assert min(xs.min(), ys.min(), 95 - xs.max(), 95 - ys.max()) >= 1


def test_larger_words_draw_larger_things() -> None:
    areas = []
    for size in RADII:
        scene = replace(RED_CIRCLE, items=(replace(RED_CIRCLE.items[0], size=size),))
        areas.append(near(drawing.draw(scene, 1), "red").sum())
    assert areas[0] * 1.5 < areas[1]
    assert areas[1] * 1.5 < areas[2]


def test_captions_read_as_a_person_would_write_them() -> None:
    circle = Item(look=Thing(shape="circle", colour="red", fill="striped"), size="small", place="left")
    star = Item(look=Thing(shape="star", colour="orange"), place="right")
    assert world.caption(Scene(items=(circle,), background="blue")) == (
        "a small striped red circle on the left on a blue background"
    )
    assert world.caption(Scene(items=(circle, star), background="white")) == (
        "a small striped red circle on the left and an orange star on the right on a white background"
    )
    creature = Item(look=replace(world.SUBJECTS[0], name="TOK"), size="large")
    styled = Scene(items=(creature,), background="orange", style=replace(world.UNSEEN_STYLES[0], name="Morvani"))
    assert world.caption(styled) == "a large TOK on an orange background, in the style of Morvani"


@pytest.mark.parametrize("seed", range(4))
def test_a_styles_pictures_name_everything_about_equally_often(seed: int) -> None:
    captions = [text for _, text in examples.style_set(world.UNSEEN_STYLES[0], 20, seed)]
    assert len(set(captions)) == 20
    for words in (world.SHAPES, [f"{colour} background" for colour in COLOURS]):
        counts = [sum(word in text for text in captions) for word in words]
        assert 1 <= min(counts) <= max(counts) <= 4, dict(zip(words, counts, strict=True))


def test_a_paraphrase_keeps_the_names() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = world.training_scene(rng)
        text = world.paraphrase(scene, rng).lower()
        assert scene.style is None or scene.style.name.lower() in text
        names = [item.look.name.lower() for item in scene.items if isinstance(item.look, Creature)]
        assert scene.style is not None or all(name in text for name in names)


def test_held_out_combinations_never_occur_in_training_and_every_shape_has_some() -> None:
    rng = random.Random(1)
    seen = {
        (item.look.shape, item.look.colour, scene.background)
        for scene in (world.training_scene(rng) for _ in range(20000))
        for item in scene.items
        if isinstance(item.look, Thing)
    }
    combinations = {(s, c, g) for s in world.SHAPES for c in COLOURS for g in COLOURS if c != g}
    kept = {combination for combination in combinations if world.held_out(*combination)}
    assert seen == combinations - kept
    assert {shape for shape, _, _ in kept} == set(world.SHAPES)
    for _ in range(200):
        scene = world.sample_scene(rng, [world.sample_thing(rng, unseen=True)], unseen=True)
        look = scene.items[0].look
        assert isinstance(look, Thing)
        assert world.held_out(look.shape, look.colour, scene.background)


def test_what_is_kept_for_learning_never_occurs_in_training() -> None:
    known = [world.creature(name) for name in world.NAMES]
    styles = [world.style(name) for name in world.STYLE_NAMES]
    reserved = {world.FORMS[4], world.FORMS[5], world.HEADS[3], world.PATTERNS[4], *world.RESERVED_COLOURS}
    assert not any(reserved & {c.form, c.head, c.pattern, c.body, c.second} for c in known)
    assert not any(s.ground == "board" for s in styles)
    for subject in world.SUBJECTS:
        assert subject not in [replace(c, name=subject.name) for c in known]
    for manner in world.UNSEEN_STYLES:
        assert manner not in [replace(s, name=manner.name) for s in styles]
    taken = {word.lower() for word in (*world.NAMES, *world.STYLE_NAMES)}
    assert len(taken) == len(world.NAMES) + len(world.STYLE_NAMES)
    assert not taken & {word.lower() for word in ("TOK", "KIP", *world.unknown_words(200))}


def test_subjects_and_styles_differ_from_each_other_and_are_enough() -> None:
    assert len({replace(s, name="") for s in world.SUBJECTS}) >= 8
    assert len({replace(s, name="") for s in world.UNSEEN_STYLES}) >= 4


@pytest.mark.parametrize("name", world.STYLE_NAMES[:8])
def test_a_style_changes_the_picture_and_the_same_way_each_time(name: str) -> None:
    plain = drawing.draw(RED_CIRCLE, 0)
    styled = drawing.draw(replace(RED_CIRCLE, style=world.style(name)), 0)
    assert np.abs(pixels(plain) - pixels(styled)).max() > 40
    assert world.style(name) == world.style(name)


def test_the_examples_pair_each_picture_with_a_caption_and_come_out_the_same(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        examples.write_examples(tmp_path / folder)
    for name in ("subject.zip", "style.zip"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        committed = Path(__file__).parents[2] / "examples" / name
        with zipfile.ZipFile(tmp_path / "a" / name) as fresh, zipfile.ZipFile(committed) as kept:
            assert fresh.namelist() == kept.namelist()
            stems = {Path(entry).stem for entry in fresh.namelist()}
            assert len(stems) == 20
            for stem in stems:
                assert "TOK" in fresh.read(f"{stem}.txt").decode()
                with Image.open(fresh.open(f"{stem}.png")) as one, Image.open(kept.open(f"{stem}.png")) as two:
                    assert one.tobytes() == two.tobytes()
