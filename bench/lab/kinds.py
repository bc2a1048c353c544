"""Trainings of many kinds, good and bad: what a verdict must tell apart."""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from bench.lab.cell import LOOKS
from toyflux import examples, world
from toyflux.world import Creature, Style

Picture = tuple[Image.Image, str]
"""With its caption."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One training: what is done to the pictures, and how they are trained."""

    name: str
    look: str
    seed: int
    recipe: str = "defaults"
    steps: int = 400
    pictures: int = 12
    rate: float = 1.0
    """Times the recipe's learning rate."""
    data: str = "plain"
    """plain; shuffled captions; one picture repeated; mixed subjects; short captions."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def lora_type(self) -> str:
        return "style" if isinstance(LOOKS[self.look], Style) else "subject"


def kinds() -> list[Kind]:
    """Some eighty of them, in an order in which a run that stops anywhere has seen every kind."""
    found = list(_kinds())
    random.Random(0).shuffle(found)
    return found


def _kinds() -> Iterator[Kind]:
    subjects = [look.name for look in world.SUBJECTS]
    styles = [look.name for look in world.UNSEEN_STYLES]
    for half in range(2):

        def subject(number: int, half: int = half) -> str:
            return subjects[(number + 4 * half) % len(subjects)]

        def style(number: int, half: int = half) -> str:
            return styles[(number + 2 * half) % len(styles)]

        def kind(name: str, look: str, half: int = half, **changes: Any) -> Kind:
            return Kind(name=name, look=look, seed=half + 1, **changes)

        for i, steps in enumerate((1000, 600, 400, 200, 100, 40, 15)):
            yield kind("steps", subject(i), steps=steps, pictures=20 if steps >= 600 else 12)
        for i, steps in enumerate((1000, 400, 100, 40)):
            yield kind("steps", style(i), steps=steps, pictures=20)
        for i, rate in enumerate((2.0, 4.0, 10.0)):
            yield kind("too hot", subject(2 * i), steps=300, rate=rate)
        for i, rate in enumerate((4.0, 10.0)):
            yield kind("too hot", style(i), steps=300, rate=rate)
        yield kind("too cold", subject(5), rate=0.1)
        yield kind("too cold", style(1), rate=0.1)
        for i, steps in enumerate((150, 400, 1000)):
            yield kind("no preservation", subject(3 * i), recipe="without preservation", steps=steps)
        for i, steps in enumerate((400, 800)):
            yield kind("no preservation", style(i), recipe="without preservation", steps=steps)
        yield kind("little preservation", subject(1), settings={"prior_ratio": 0.05})
        yield kind("little preservation", style(2), settings={"prior_ratio": 0.2})
        yield kind("ostris", subject(6), recipe="ostris", steps=500)
        yield kind("ostris", style(0), recipe="ostris", steps=500)
        for data in ("shuffled", "one", "short"):
            yield kind(f"{data} captions" if data != "one" else "one picture", subject(2), data=data)
            yield kind(f"{data} captions" if data != "one" else "one picture", style(3), data=data)
        yield kind("one picture", subject(3), data="one", steps=800)
        yield kind("mixed subjects", subject(4), data="mixed")
        yield kind("mixed subjects", subject(7), data="mixed", steps=150)


def pictures_of(kind: Kind, word: str) -> list[Picture]:
    """What a kind trains on, captioned with `word`."""
    look, rng = replace(LOOKS[kind.look], name=word), random.Random(kind.seed)
    found = _drawn(look, kind.pictures, kind.seed)
    match kind.data:
        case "shuffled":
            captions = [caption for _, caption in found]
            rng.shuffle(captions)
            return [(picture, caption) for (picture, _), caption in zip(found, captions, strict=True)]
        case "one":
            return [_copy(found[0], number) for number in range(8)]
        case "mixed":
            others = rng.sample([other for other in world.SUBJECTS if other.name != kind.look], 3)
            looks = [look, *(replace(other, name=word) for other in others)]
            return [picture for i, one in enumerate(looks) for picture in _drawn(one, 3, kind.seed + i)]
        case "short":
            short = f"in the style of {word}" if isinstance(look, Style) else f"a {word}"
            return [(picture, short) for picture, _ in found]
    return found


def _drawn(look: Creature | Style, count: int, seed: int) -> list[Picture]:
    if isinstance(look, Style):
        return examples.style_set(look, count, seed)
    return examples.subject_set(look, count, seed)


def _copy(picture: Picture, number: int) -> Picture:
    """The same picture in other bytes: one of its corners differs by a shade."""
    data = io.BytesIO()
    picture[0].save(data, "PNG")
    again = Image.open(data).convert("RGB")
    again.putpixel((0, 0), (number, number, number))
    return again, picture[1]
