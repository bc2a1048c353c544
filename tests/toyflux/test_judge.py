"""The judge on true pictures, spoilt ones and look-alikes; it is fast and reads any size."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from toyflux import drawing, judge, train_judge, world


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return train_judge.measure(count=240)


@pytest.mark.parametrize(
    ("question", "least"),
    [("what 1", 0.92), ("colour 1", 0.87), ("background", 0.97), ("place 1", 0.96), ("size 1", 0.95)],
)
def test_true_pictures_are_read_right(measured: dict[str, float], question: str, least: float) -> None:
    assert measured[question] >= least


def test_true_pictures_count_as_clean_and_spoilt_ones_do_not(measured: dict[str, float]) -> None:
    assert measured["clean"] >= 0.95
    assert measured["spoilt pictures refused"] >= 0.82
    assert measured["blurred pictures refused"] >= 0.8


@pytest.mark.parametrize(("kind", "least"), [("subject", 0.95), ("style", 0.72)])
def test_a_look_is_known_again_and_others_are_not_taken_for_it(
    measured: dict[str, float], kind: str, least: float
) -> None:
    assert measured[f"{kind} known"] >= least
    assert measured[f"{kind}, another taken for it"] <= (0.02 if kind == "subject" else 0.1)


def test_a_subject_is_told_from_another_in_any_size_of_picture() -> None:
    rng = random.Random(5)
    for size in ((96, 96), (144, 64), (192, 192)):
        known, taken = [], []
        for subject, other in zip(world.SUBJECTS, world.SUBJECTS[1:], strict=False):
            images = [drawing.draw(world.sample_scene(rng, [subject]), i, size) for i in range(4)]
            known += judge.shows(images, subject)
            taken += judge.shows(images, other)
        assert np.mean(known) >= 0.7
        assert not any(taken)


def test_a_blurred_subject_is_not_shown() -> None:
    image = drawing.draw(world.Scene(items=(world.Item(look=world.SUBJECTS[0]),), background="green"), 0)
    assert (
        judge.shows([image.filter(ImageFilter.GaussianBlur(radius)) for radius in (3, 5)], world.SUBJECTS[0])
        == [False] * 2
    )


def test_two_things_are_both_read() -> None:
    rng = random.Random(2)
    scenes = [world.sample_scene(rng, [world.sample_thing(rng, plain=True) for _ in range(2)]) for _ in range(40)]
    readings = judge.read([drawing.draw(scene, i) for i, scene in enumerate(scenes)])
    right = [
        [(seen.what, seen.colour) for seen in reading.things]
        == [(item.look.shape, item.look.colour) for item in scene.items if isinstance(item.look, world.Thing)]
        for scene, reading in zip(scenes, readings, strict=True)
    ]
    assert np.mean(right) >= 0.4


def test_the_readings_do_not_depend_on_the_batch() -> None:
    rng = random.Random(3)
    images = [drawing.draw(train_judge.any_scene(rng), i, world.training_size(rng)) for i in range(9)]
    together = judge.read(images)
    for image, reading in zip(images, together, strict=True):
        alone = judge.read([image])[0]
        assert np.allclose(alone.probabilities["what 1"], reading.probabilities["what 1"], atol=1e-4)


def test_sharpness_falls_with_blur_and_not_with_place_or_seed() -> None:
    scene = world.Scene(items=(world.Item(look=world.Thing(shape="star", colour="red")),), background="white")
    moved = replace(scene, items=(replace(scene.items[0], place="left"),))
    image = drawing.draw(scene, 0)
    values = [judge.sharpness(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert values[2] < 0.7 * values[0]
    assert judge.sharpness(drawing.draw(moved, 5)) == pytest.approx(values[0], rel=0.1)
    assert judge.sharpness(Image.new("RGB", (96, 96), "red")) == 0


def test_a_hundred_pictures_are_read_within_seconds() -> None:
    images = [drawing.draw(world.Scene(items=(world.Item(look=world.SUBJECTS[0]),), background="green"), 0)] * 100
    started = time.monotonic()
    judge.read(images)
    assert time.monotonic() - started < 10
