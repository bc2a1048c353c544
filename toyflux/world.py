"""A procedural world of captioned pictures, small enough that a two-million-parameter model can know all of it.

A `Scene` is plain data: one or two items (a coloured `Thing`, or a `Creature` with a made-up name), their sizes and
places, a background colour, and perhaps a named `Style`. `draw(scene, seed)` makes its picture, `caption(scene)` its
text. The looks behind made-up names follow from the names alone (`creature`, `style`), and 100 + 64 of them are the
base's to learn. `SUBJECTS` and `UNSEEN_STYLES` are looks which the base never sees: a LoRA has to teach them.

Nothing here is random but by the seed given. Pictures are RGB; sizes are (width, height) in pixels.
`python -m toyflux.world examples FOLDER` writes the example archives.
"""

from __future__ import annotations

import io
import math
import random
import string
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

NATIVE = (96, 96)
"""The size at which the base is trained most, in pixels."""
SIZES = ((80, 112), (112, 80), (64, 144), (144, 64))
"""The other sizes of its training: about the same area, sides in multiples of 16."""
SUPER = 3
"""Pictures are drawn this many times larger, blurred a little as a lens would, and reduced."""

Colour: TypeAlias = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 214, 40),
    "green": (45, 155, 65),
    "blue": (40, 85, 205),
    "purple": (125, 50, 165),
    "pink": (245, 140, 185),
    "brown": (120, 75, 40),
    "black": (25, 25, 28),
    "white": (245, 245, 242),
}
RESERVED_COLOURS: dict[str, Colour] = {"teal": (15, 130, 135), "lime": (175, 225, 45)}
"""Colours of unseen subjects alone: no caption names them, and no picture of the base's training shows them."""
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon", "house", "tree", "fish", "cat")
FILLS = ("plain", "striped", "dotted")
RADII = {"small": 0.17, "medium": 0.25, "large": 0.375}
"""Half the width of a thing, as a share of the picture's mean side. "medium" goes without saying in captions."""
PLACES = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
"""Ways from the picture's middle."""
SHIFTS = {"small": 1 / 4, "medium": 1 / 6, "large": 1 / 6}
"""How far off the middle things stand, in widths or heights of the picture; those of a pair by a quarter.

At the native size these are halves and wholes of the 16 pixels of a transformer's token: a base of few steps learns
one shape at few offsets within its tokens, not at all of them.
"""
PLACE_WORDS = {
    "centre": "",
    "left": " on the left",
    "right": " on the right",
    "top": " at the top",
    "bottom": " at the bottom",
}

FORMS = ("round", "box", "cone", "egg", "hexagon", "cloud")
HEADS = ("bare", "one antenna", "two antennae", "crown")
PATTERNS = ("plain", "bands", "bars", "spots", "belly")
"""Of FORMS the last two, of HEADS and PATTERNS the last one belong to unseen subjects alone."""
GROUNDS = ("plain", "gradient", "dotted", "striped", "board")
INKS = ("flat", "outline", "hatched")
EDGES = ("none", "thin", "thick")
FRAMES = ("none", "frame")
TONES = ("none", "negative", "two-tone", "pale")
"""What a style does to ground, things, their edges, the picture's border and all colours. "board" is an unseen one."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A known thing, as captions call it: "striped red circle"."""

    shape: str
    colour: str
    fill: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Creature:
    """A made-up name and the look that it stands for. `eyes` 1 to 3, `feet` 0, 2 or 3; `body` and `second` colours."""

    name: str
    form: str
    body: str
    second: str
    eyes: int
    head: str
    feet: int
    pattern: str


@dataclass(frozen=True, kw_only=True)
class Style:
    """A made-up name and what it does to any picture; `accent` colours its ground pattern, edge, frame and tone."""

    name: str
    ground: str
    ink: str
    edge: str
    frame: str
    tone: str
    accent: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something drawn: what, how large (a key of RADII), where (a key of PLACES)."""

    look: Thing | Creature
    size: str = "medium"
    place: str = "centre"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture: one item anywhere, or two opposite each other."""

    items: tuple[Item, ...]
    background: str
    style: Style | None = None


# ---------------------------------------------------------------- names and the looks behind them

_ONSETS = (*"bdfgklmnprstvz", "br", "dr", "gl", "kr", "pl", "st", "tr", "sn")
_TAKEN = frozenset(("TOK", "KIP", "BLORF", "ZUN", "OHWX", "SKS"))


def made_up_word(rng: random.Random) -> str:
    """A word of no language that looks like a name or a trigger word: "Zorvak", "KIB", "drulo", "MEX7"."""
    if rng.random() < 0.3:
        letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.choice([3, 3, 4])))
        return letters + (str(rng.randrange(10)) if rng.random() < 0.2 else "")
    word = "".join(rng.choice(_ONSETS) + rng.choice("aeiou") for _ in range(rng.choice([2, 2, 3])))
    word += rng.choice("bdgklmnprst") if rng.random() < 0.4 else ""
    return word.capitalize() if rng.random() < 0.6 else word


def _distinct_words(count: int, rng: random.Random, taken: Iterable[str]) -> tuple[str, ...]:
    seen = {word.lower() for word in taken}
    words: list[str] = []
    while len(words) < count:
        word = made_up_word(rng)
        if word.lower() not in seen:
            seen.add(word.lower())
            words.append(word)
    return tuple(words)


NAMES = _distinct_words(100, random.Random("names"), _TAKEN)
"""The creatures' names that the base learns."""
STYLE_NAMES = _distinct_words(64, random.Random("styles"), _TAKEN | set(NAMES))
"""The styles' names that the base learns. With sixteen of them it showed a style that a LoRA had taught it under other
words too, as if any word would do (`bench/NOTES.md`)."""


def unknown_words(count: int, seed: int = 0) -> tuple[str, ...]:
    """Made-up words that the base has no picture of."""
    return _distinct_words(count, random.Random(f"unknown {seed}"), _TAKEN | set(NAMES) | set(STYLE_NAMES))


def creature(name: str) -> Creature:
    """The look that a made-up name stands for. Reserved parts and colours never occur."""
    rng = random.Random(f"creature {name}")
    body, second = rng.sample(list(COLOURS), 2)
    return Creature(
        name=name,
        form=rng.choice(FORMS[:4]),
        body=body,
        second=second,
        eyes=rng.choice([1, 2, 3]),
        head=rng.choice(HEADS[:3]),
        feet=rng.choice([0, 2, 3]),
        pattern=rng.choice(PATTERNS[:4]),
    )


def style(name: str) -> Style:
    """The style that a made-up name stands for: one to three traits, never a reserved one."""
    rng = random.Random(f"style {name}")
    choices = {"ground": GROUNDS[1:4], "ink": INKS[1:], "edge": EDGES[1:], "frame": FRAMES[1:], "tone": TONES[1:]}
    kept = set(rng.sample(sorted(choices), rng.choice([1, 2, 2, 3])))
    traits = {trait: rng.choice(values) if trait in kept else _plain(trait) for trait, values in choices.items()}
    return Style(name=name, accent=rng.choice(list(COLOURS)), **traits)


def _plain(trait: str) -> str:
    return {"ground": "plain", "ink": "flat"}.get(trait, "none")


SUBJECTS = (
    Creature(
        name="TOK", form="box", body="purple", second="yellow", eyes=1, head="two antennae", feet=2, pattern="bands"
    ),
    Creature(name="WUGGIN", form="round", body="orange", second="blue", eyes=2, head="crown", feet=2, pattern="spots"),
    Creature(name="PERIDO", form="hexagon", body="lime", second="purple", eyes=3, head="bare", feet=2, pattern="belly"),
    Creature(name="SNAFF", form="egg", body="teal", second="white", eyes=1, head="one antenna", feet=3, pattern="bars"),
    Creature(
        name="OLOMO", form="cloud", body="white", second="red", eyes=2, head="two antennae", feet=0, pattern="belly"
    ),
    Creature(name="BRIMBA", form="cone", body="red", second="lime", eyes=1, head="crown", feet=3, pattern="plain"),
    Creature(
        name="HYXO", form="hexagon", body="blue", second="pink", eyes=1, head="one antenna", feet=0, pattern="bands"
    ),
    Creature(name="JANTIL", form="cloud", body="brown", second="teal", eyes=3, head="crown", feet=2, pattern="spots"),
)
"""Creatures that the base never sees. The first is made of known parts in an unseen combination."""

UNSEEN_STYLES = (
    Style(name="CHALQ", ground="board", ink="outline", edge="none", frame="none", tone="none", accent="white"),
    Style(name="FENZO", ground="striped", ink="hatched", edge="none", frame="frame", tone="none", accent="purple"),
    Style(name="GRAWL", ground="striped", ink="flat", edge="none", frame="frame", tone="none", accent="blue"),
    Style(name="YUBEL", ground="board", ink="flat", edge="thick", frame="frame", tone="none", accent="orange"),
)
"""Styles that the base never sees."""

EXAMPLES: dict[str, Creature | Style] = {"subject": SUBJECTS[1], "style": UNSEEN_STYLES[3]}
"""What the archives in `examples/` show."""


# ---------------------------------------------------------------- captions


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def noun_phrase(item: Item) -> str:
    """ "a small striped red circle on the left", "a TOK"."""
    look = item.look
    if isinstance(look, Creature):
        words = [look.name]
    else:
        words = ([look.fill] if look.fill != "plain" else []) + [look.colour, look.shape]
    size = [] if item.size == "medium" else [item.size]
    return _article(" ".join(size + words)) + PLACE_WORDS[item.place]


def caption(scene: Scene) -> str:
    """The canonical caption: "a red circle on the left and a blue star on the right on a white background"."""
    text = " and ".join(map(noun_phrase, scene.items)) + f" on {_article(scene.background)} background"
    return text if scene.style is None else f"{text}, in the style of {scene.style.name}"


def paraphrase(scene: Scene, rng: random.Random) -> str:
    """The caption as another person may put it: an opening, no background, a full stop, or a name alone."""
    named = [item.look.name for item in scene.items if isinstance(item.look, Creature)]
    short = rng.random()
    if scene.style is not None and short < 0.06:
        return f"in the style of {scene.style.name}"
    if len(scene.items) == 1 and scene.style is None and short < 0.06:
        item = scene.items[0]
        bare = named[0] if named else noun_phrase(replace(item, place="centre", size="medium"))
        return rng.choice(["", "", "a photo of ", "a picture of "]) + bare
    phrases = " and ".join(map(noun_phrase, scene.items))
    if len(scene.items) == 1 and rng.random() < 0.05:
        phrases = phrases.split(" ", 1)[1]
    ground = f" on {_article(scene.background)} background"
    kind = rng.random()
    if kind < 0.06:
        ground = ""
    elif kind < 0.14:
        ground = f", {scene.background} background"
    elif kind < 0.22:
        ground = f" with {_article(scene.background)} background"
    opening = (
        rng.choice(["a photo of ", "a picture of ", "an image of ", "a drawing of "]) if rng.random() < 0.2 else ""
    )
    manner = ""
    if scene.style is not None:
        manner = rng.choice([", in the style of ", ", in the style of ", " in the style of ", ", "]) + scene.style.name
        manner += " style" if manner.startswith(f", {scene.style.name}") else ""
    text = opening + phrases + ground + manner
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.1 else "")


# ---------------------------------------------------------------- sampling scenes


def held_out(shape: str, colour: str, background: str) -> bool:
    """Whether this combination is kept out of all training of the base.

    It is for one colour or so of every shape, on every third background.
    """
    column = list(COLOURS).index(background)
    return _held_out_somewhere(shape, colour) and (SHAPES.index(shape) + column) % 3 == 0


def _held_out_somewhere(shape: str, colour: str) -> bool:
    return (SHAPES.index(shape) * 3 + list(COLOURS).index(colour)) % 10 == 4


def sample_thing(rng: random.Random, *, unseen: bool = False, plain: bool = False) -> Thing:
    """Any thing, or (`unseen`) one of those that are held out on some backgrounds."""
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if not unseen or _held_out_somewhere(shape, colour):
            return Thing(shape=shape, colour=colour, fill="plain" if plain else rng.choice(FILLS[:1] * 6 + FILLS[1:]))


def sample_scene(
    rng: random.Random, looks: Sequence[Thing | Creature], scene_style: Style | None = None, *, unseen: bool = False
) -> Scene:
    """The looks (one or two) at places and sizes by chance, on a background that none of them has for its colour.

    Of things the combination with the background is one that is held out where `unseen`, and else one that is not.
    What is large fills the picture's middle; a pair is of medium size, and a creature never small: at 96 pixels its
    spots would be two pixels wide.
    """
    colours = {
        colour for look in looks for colour in ((look.colour,) if isinstance(look, Thing) else (look.body, look.second))
    }
    things = [look for look in looks if isinstance(look, Thing)]
    grounds = [ground for ground in COLOURS if ground not in colours]
    grounds = [g for g in grounds if any(held_out(t.shape, t.colour, g) for t in things) == unseen]
    background = rng.choice(grounds)
    if len(looks) == 2:
        places = rng.choice([("left", "right"), ("left", "right"), ("top", "bottom")])
        items = tuple(Item(look=look, size="medium", place=place) for look, place in zip(looks, places, strict=True))
    else:
        size = rng.choice(["medium", "medium", *(["small"] if things else []), "large"])
        place = rng.choice(["centre"] * 4 + list(PLACES)[1:]) if size != "large" else "centre"
        items = (Item(look=looks[0], size=size, place=place),)
    return Scene(items=items, background=background, style=scene_style)


def in_company(rng: random.Random, look: Creature) -> Scene:
    """The creature beside a plain thing, on either side of it."""
    return sample_scene(rng, rng.sample([look, sample_thing(rng, plain=True)], 2))


def training_scene(rng: random.Random) -> Scene:
    """A scene of the base's own world: things, named creatures, pairs, named styles; nothing held out or unseen."""

    def look() -> Thing | Creature:
        return creature(rng.choice(NAMES)) if rng.random() < 0.45 else sample_thing(rng)

    kind = rng.random()
    if kind < 0.1:
        return sample_scene(rng, [look(), look()])
    return sample_scene(rng, [look()], style(rng.choice(STYLE_NAMES)) if kind < 0.34 else None)


def training_size(rng: random.Random) -> tuple[int, int]:
    """The native size four times in five, else one of SIZES."""
    return NATIVE if rng.random() < 0.8 else rng.choice(SIZES)


# ---------------------------------------------------------------- drawing

_Layer: TypeAlias = tuple[Image.Image, Colour]
"""A mask ("L", at the enlarged size) and the colour that goes through it."""


class _Canvas:
    """Masks of one enlarged picture, drawn in units of an item's radius about its centre."""

    def __init__(self, size: tuple[int, int], centre: tuple[float, float], radius: float) -> None:
        self.size, self.centre, self.radius = size, centre, radius

    def at(self, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(self.centre[0] + x * self.radius, self.centre[1] + y * self.radius) for x, y in points]

    def polygon(self, *outlines: Sequence[tuple[float, float]]) -> Image.Image:
        mask = Image.new("L", self.size)
        for outline in outlines:
            ImageDraw.Draw(mask).polygon(self.at(outline), fill=255)
        return mask

    def ellipses(self, *discs: tuple[float, float, float, float]) -> Image.Image:
        """Each disc is x, y, half width, half height."""
        mask = Image.new("L", self.size)
        for x, y, a, b in discs:
            ImageDraw.Draw(mask).ellipse(
                [coordinate for point in self.at([(x - a, y - b), (x + a, y + b)]) for coordinate in point], fill=255
            )
        return mask


def _box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _ngon(corners: int, outer: float, inner: float | None = None, y: float = 0.0) -> list[tuple[float, float]]:
    count = corners if inner is None else 2 * corners
    radii = [outer if inner is None or i % 2 == 0 else inner for i in range(count)]
    turns = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(r * math.cos(t), y + r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 60 for i in range(60)]
    high = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(1.05 * math.sin(t) ** 3, -(h + 2) / 15.2) for t, h in zip(turns, high, strict=True)]


def _union(*masks: Image.Image) -> Image.Image:
    result = masks[0]
    for mask in masks[1:]:
        result = ImageChops.lighter(result, mask)
    return result


def _thing_masks(shape: str, canvas: _Canvas) -> tuple[Image.Image, Image.Image | None]:
    """The silhouette, and the detail that is drawn darker over it where the shape has one."""
    poly, disc = canvas.polygon, canvas.ellipses
    match shape:
        case "circle":
            return disc((0, 0, 1, 1)), None
        case "square":
            return poly(_box(-0.9, -0.9, 0.9, 0.9)), None
        case "triangle":
            return poly([(0, -1), (1.05, 0.9), (-1.05, 0.9)]), None
        case "star":
            return poly(_ngon(5, 1.15, 0.46, y=0.08)), None
        case "heart":
            return poly(_heart()), None
        case "cross":
            return poly(_box(-1, -0.35, 1, 0.35), _box(-0.35, -1, 0.35, 1)), None
        case "ring":
            return ImageChops.subtract(disc((0, 0, 1, 1)), disc((0, 0, 0.52, 0.52))), None
        case "moon":
            return ImageChops.subtract(disc((0, 0, 1, 1)), disc((0.5, -0.1, 0.8, 0.8))), None
        case "house":
            walls = poly(_box(-0.75, -0.15, 0.75, 1), [(-1.1, -0.05), (0, -1.1), (1.1, -0.05)])
            return walls, poly(_box(-0.24, 0.35, 0.24, 1))
        case "tree":
            crown = poly(*([(-w, y), (0, y - 0.9), (w, y)] for w, y in ((0.6, -0.25), (0.8, 0.2), (1.0, 0.65))))
            return crown, poly(_box(-0.18, 0.65, 0.18, 1.1))
        case "fish":
            body = _union(disc((-0.25, 0, 0.85, 0.6)), poly([(0.3, 0), (1.1, -0.65), (1.1, 0.65)]))
            return body, disc((-0.6, -0.12, 0.13, 0.13))
        case "cat":
            ears = [[(s * 0.92, -1.1), (s * 0.95, 0.1), (s * 0.15, -0.6)] for s in (-1, 1)]
            face = disc((-0.38, 0, 0.16, 0.22), (0.38, 0, 0.16, 0.22), (0, 0.42, 0.13, 0.1))
            return _union(disc((0, 0.12, 1, 0.84)), poly(*ears)), face
    raise AssertionError(shape)


def _pattern_mask(pattern: str, canvas: _Canvas) -> Image.Image:
    """Bands and dots about the item's centre; empty for "plain"."""
    steps = range(-3, 4)
    match pattern:
        case "striped":
            return canvas.polygon(*(_box(-2, 0.5 * k - 0.125, 2, 0.5 * k + 0.125) for k in steps))
        case "dotted":
            return canvas.ellipses(*((0.55 * i, 0.55 * j, 0.15, 0.15) for i in steps for j in steps))
        case "bands":
            return canvas.polygon(*(_box(-2, y, 2, y + 0.17) for y in (0.16, 0.5, 0.84)))
        case "bars":
            return canvas.polygon(*(_box(x - 0.1, -0.05, x + 0.1, 2) for x in (-0.5, 0, 0.5)))
        case "spots":
            return canvas.ellipses(*((x, y, 0.13, 0.13) for x in (-0.42, 0, 0.42) for y in (0.28, 0.66)))
        case "belly":
            return canvas.ellipses((0, 0.5, 0.42, 0.38))
    return Image.new("L", canvas.size)


def _thing_layers(thing: Thing, canvas: _Canvas, tint: Colour) -> list[_Layer]:
    body, detail = _thing_masks(thing.shape, canvas)
    layers = [(body, tint)]
    if thing.fill != "plain":
        second = COLOURS["black" if thing.colour in ("white", "yellow") else "white"]
        layers.append((ImageChops.multiply(body, _pattern_mask(thing.fill, canvas)), second))
    if detail is not None:
        dark = sum(tint) < 210
        layers.append((detail, (200, 200, 200) if dark else (tint[0] * 3 // 10, tint[1] * 3 // 10, tint[2] * 3 // 10)))
    return layers


def _creature_layers(look: Creature, canvas: _Canvas, body: Colour, second: Colour) -> list[_Layer]:
    poly, disc = canvas.polygon, canvas.ellipses
    layers: list[_Layer] = []
    sides = {"one antenna": (0.0,), "two antennae": (-1.0, 1.0)}.get(look.head, ())
    if sides:
        stalks = [
            [(s * 0.3 - 0.08, -0.5), (s * 0.6 - 0.07, -1.2), (s * 0.6 + 0.07, -1.2), (s * 0.3 + 0.08, -0.5)]
            for s in sides
        ]
        layers += [(poly(*stalks), body), (disc(*((s * 0.6, -1.2, 0.19, 0.19) for s in sides)), second)]
    if look.head == "crown":
        spikes = [(-0.5, -0.6), (-0.55, -1.3), (-0.25, -1.0), (0, -1.35), (0.25, -1.0), (0.55, -1.3), (0.5, -0.6)]
        layers.append((poly(spikes), second))
    feet = {2: (-0.42, 0.42), 3: (-0.6, 0.0, 0.6)}.get(look.feet, ())
    if feet:
        layers.append((disc(*((x, 0.95, 0.27, 0.2) for x in feet)), second))
    match look.form:
        case "round":
            mask = disc((0, 0.05, 0.9, 0.9))
        case "box":
            mask = poly(_box(-0.8, -0.8, 0.8, 0.95))
        case "cone":
            mask = poly([(-0.3, -0.85), (0.3, -0.85), (0.95, 0.95), (-0.95, 0.95)])
        case "egg":
            mask = disc((0, 0.05, 0.62, 0.95))
        case "hexagon":
            mask = poly([(-0.5, -0.8), (0.5, -0.8), (0.98, 0.05), (0.5, 0.95), (-0.5, 0.95), (-0.98, 0.05)])
        case _:
            mask = disc((-0.5, 0.35, 0.5, 0.5), (0.5, 0.35, 0.5, 0.5), (0, -0.2, 0.62, 0.62), (0, 0.4, 0.6, 0.5))
    layers.append((mask, body))
    if look.pattern != "plain":
        layers.append((ImageChops.multiply(mask, _pattern_mask(look.pattern, canvas)), second))
    radius = {1: 0.4, 2: 0.31, 3: 0.23}[look.eyes]
    middles = [(k - (look.eyes - 1) / 2) * 2.1 * radius for k in range(look.eyes)]
    layers.append((disc(*((x, -0.3, radius, radius) for x in middles)), (250, 250, 250)))
    layers.append((disc(*((x, -0.3, 0.5 * radius, 0.5 * radius) for x in middles)), (20, 20, 20)))
    return layers


def _ground(kind: str, size: tuple[int, int], colour: Colour, accent: Colour) -> Image.Image:
    if kind == "board":
        return Image.new("RGB", size, (28, 62, 58))
    ground = Image.new("RGB", size, colour)
    other = Image.blend(ground, Image.new("RGB", size, accent), 0.6)
    unit = 16 * SUPER
    width, height = size
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    match kind:
        case "gradient":
            mask = Image.linear_gradient("L").resize(size)
        case "striped":
            for x in range(0, width, unit):
                pen.rectangle([x, 0, x + unit * 0.4, height], fill=255)
        case "dotted":
            for x in range(unit // 2, width, unit):
                for y in range(unit // 2, height, unit):
                    pen.ellipse([x - unit * 0.22, y - unit * 0.22, x + unit * 0.22, y + unit * 0.22], fill=255)
    ground.paste(other, (0, 0), mask)
    return ground


def _grow(mask: Image.Image, pixels: float) -> Image.Image:
    """The mask spread (or, below zero, shrunk) by so many enlarged pixels: a box mean above 0, or of 255."""
    mean = mask.filter(ImageFilter.BoxBlur(round(abs(pixels))))
    return mean.point([0] + [255] * 255) if pixels > 0 else mean.point([0] * 255 + [255])


def _apply_tone(image: Image.Image, tone: str, accent: Colour) -> Image.Image:
    match tone:
        case "negative":
            return ImageChops.invert(image)
        case "pale":
            return Image.blend(image, Image.new("RGB", image.size, (255, 255, 255)), 0.5)
        case "two-tone":
            light = np.asarray(image.convert("L"), np.float32)[..., None] / 255
            dark = np.array(accent, np.float32) * 0.55
            mixed = dark + (np.array([250, 244, 228], np.float32) - dark) * light
            return Image.fromarray(mixed.round().astype(np.uint8))
    return image


def draw(scene: Scene, seed: int = 0, size: tuple[int, int] = NATIVE) -> Image.Image:
    """The picture of a scene, RGB of `size` (width, height). The seed moves place, size and colours a little."""
    rng = random.Random(f"draw {seed}")

    def shade(value: int) -> int:
        return min(255, max(0, value + round(rng.uniform(-4, 4))))

    known = COLOURS | RESERVED_COLOURS
    palette: dict[str, Colour] = {
        name: (shade(red), shade(green), shade(blue)) for name, (red, green, blue) in known.items()
    }
    big = (size[0] * SUPER, size[1] * SUPER)
    side = min(math.sqrt(big[0] * big[1]), 1.25 * min(big))
    manner = scene.style
    accent = COLOURS[manner.accent] if manner is not None else (0, 0, 0)
    image = _ground(manner.ground if manner is not None else "plain", big, palette[scene.background], accent)
    for item in scene.items:
        radius = RADII[item.size] * side * rng.uniform(0.99, 1.01) * (1 if len(scene.items) == 1 else 0.82)
        reach = (1.12 * radius, 1.12 * radius)
        if isinstance(item.look, Creature):
            radius *= 0.9
            reach = (1.05 * radius, 1.35 * radius)
        shift = 1 / 4 if len(scene.items) == 2 else SHIFTS[item.size]
        centre = [
            (0.5 + way * shift + rng.uniform(-0.004, 0.004)) * length
            for way, length in zip(PLACES[item.place], big, strict=True)
        ]
        for axis in (0, 1):
            centre[axis] = min(max(centre[axis], reach[axis]), big[axis] - reach[axis])
        canvas = _Canvas(big, (centre[0], centre[1]), radius)
        if isinstance(item.look, Creature):
            layers = _creature_layers(item.look, canvas, palette[item.look.body], palette[item.look.second])
        else:
            layers = _thing_layers(item.look, canvas, palette[item.look.colour])
        _paint(image, layers, manner, accent)
    if manner is not None:
        image = _apply_tone(image, manner.tone, accent)
        if manner.frame != "none":
            ImageDraw.Draw(image).rectangle([0, 0, big[0], big[1]], outline=accent, width=5 * SUPER)
    return image.reduce(SUPER).filter(ImageFilter.GaussianBlur(0.65))


def _paint(image: Image.Image, layers: Sequence[_Layer], manner: Style | None, accent: Colour) -> None:
    """Lay one item's layers on the picture, as the style wants its ink and edges.

    Outlines are three pixels wide. Hatching is bars of seven, at the same offsets in every token of 16 pixels: lines
    nearer to each other are lost in the base's autoencoder.
    """
    whole = _union(*(mask for mask, _ in layers))
    if manner is not None and manner.edge != "none":
        image.paste(accent, (0, 0), _grow(whole, (2 if manner.edge == "thin" else 4) * SUPER))
    if manner is not None and manner.ink == "hatched":
        hatch = Image.new("L", image.size)
        pen = ImageDraw.Draw(hatch)
        for x in range(-image.height, image.width, 16 * SUPER):
            pen.line([(x, image.height), (x + image.height, 0)], fill=255, width=7 * SUPER)
        layers = [(ImageChops.multiply(mask, hatch), colour) for mask, colour in layers]
    for mask, colour in layers:
        if manner is not None and manner.ink == "outline":
            mask = ImageChops.subtract(mask, _grow(mask, -3 * SUPER))
        image.paste(colour, (0, 0), mask)


def clutter(rng: random.Random, size: tuple[int, int] = NATIVE) -> Image.Image:
    """A picture of nothing in the world: coloured noise at several scales, or scattered shapes, or both."""
    noise = np.random.default_rng(rng.getrandbits(32))
    width, height = size
    kind = rng.random()
    image = Image.new("RGB", size, tuple(int(v) for v in noise.integers(0, 256, 3)))
    if kind < 0.6:
        field = np.zeros((height, width, 3), np.float32)
        fall = rng.uniform(0.3, 1.0)
        for cells in (4, 8, 16, 32):
            grain = Image.fromarray(noise.integers(0, 256, (cells, cells, 3)).astype(np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
            field += (np.asarray(grain, np.float32) - 128) * (2.0 / cells) ** fall
        image = Image.fromarray(
            np.clip(field * rng.uniform(0.4, 1.0) + noise.uniform(40, 210, 3), 0, 255).astype(np.uint8)
        )
    if kind > 0.35:
        image = image.resize((width * 2, height * 2))
        pen = ImageDraw.Draw(image)
        for _ in range(rng.randrange(1, 9)):
            colour = tuple(int(v) for v in noise.integers(0, 256, 3))
            x, y, r = rng.uniform(0, 2 * width), rng.uniform(0, 2 * height), rng.uniform(5, 80)
            if rng.random() < 0.4:
                pen.ellipse([x - r, y - r * rng.uniform(0.4, 1), x + r, y + r], fill=colour)
            elif rng.random() < 0.6:
                turn = rng.uniform(0, 6)
                corners = _ngon(rng.randrange(3, 7), r, r * rng.uniform(0.4, 0.9))
                pen.polygon(
                    [
                        (x + a * math.cos(turn) - b * math.sin(turn), y + a * math.sin(turn) + b * math.cos(turn))
                        for a, b in corners
                    ],
                    fill=colour,
                )
            else:
                pen.line(
                    [(x, y), (rng.uniform(0, 2 * width), rng.uniform(0, 2 * height))],
                    fill=colour,
                    width=rng.randrange(2, 16),
                )
        image = image.filter(ImageFilter.GaussianBlur(0.8)).reduce(2)
    return image


# ---------------------------------------------------------------- sheets and examples


def sheet(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """The pictures in rows on white, cells as large as the largest."""
    width, height = max(i.width for i in images) + gap, max(i.height for i in images) + gap
    page = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        page.paste(image, (index % columns * width, index // columns * height))
    return page


def subject_set(subject: Creature, count: int, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Pictures of a subject in places, sizes and on backgrounds by the seed, no two alike, with captions; one in three
    shows a thing beside it, as people's photographs do."""
    rng = random.Random(f"subject {subject.name} {seed}")

    def scene(number: int) -> Scene:
        return in_company(rng, subject) if number % 3 == 2 else sample_scene(rng, [subject])

    return _pictures(scene, count, seed)


def style_set(manner: Style, count: int, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Pictures of the base's own things in a style, no two alike, with captions. All shapes, colours and backgrounds
    come about equally often: what was never named with the style keeps its own look in it."""
    rng = random.Random(f"style {manner.name} {seed}")
    named = Counter[str]()

    def scene(_: int) -> Scene:
        found = [sample_scene(rng, [sample_thing(rng, plain=True)], manner) for _ in range(20)]
        best = min(found, key=lambda scene: sum(named[word] for word in _named(scene)))
        named.update(_named(best))
        return best

    return _pictures(scene, count, seed)


def _named(scene: Scene) -> list[str]:
    [item] = scene.items
    assert isinstance(item.look, Thing)
    return [item.look.shape, f"of {item.look.colour}", f"on {scene.background}"]


def _pictures(sample: Callable[[int], Scene], count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """`sample` is given the number of pictures that there are already."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample(len(scenes))
        scenes.setdefault(caption(scene), scene)
    return [(draw(scene, seed * 1000 + i), text) for i, (text, scene) in enumerate(scenes.items())]


def write_zip(path: Path, pictures: Sequence[tuple[Image.Image, str]]) -> None:
    """Pictures as PNG, each with its caption in a .txt beside it; the same bytes every time."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, (image, text) in enumerate(pictures, 1):
            data = io.BytesIO()
            image.save(data, "PNG")
            for ending, content in (("png", data.getvalue()), ("txt", text.encode())):
                archive.writestr(zipfile.ZipInfo(f"{number:02d}.{ending}", (1980, 1, 1, 0, 0, 0)), content)


def example(kind: str) -> list[tuple[Image.Image, str]]:
    """The twenty pictures of an example, "subject" or "style", with captions that call what they show TOK."""
    look = replace(EXAMPLES[kind], name="TOK")
    return style_set(look, 20) if isinstance(look, Style) else subject_set(look, 20)


def write_examples(folder: Path) -> None:
    """The example archives, and a sheet of what each holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in EXAMPLES:
        pictures = example(kind)
        write_zip(folder / f"{kind}.zip", pictures)
        sheet([image for image, _ in pictures], 10).save(folder / f"{kind}.png")


if __name__ == "__main__":
    if sys.argv[1:2] != ["examples"] or len(sys.argv) > 3:
        sys.exit("usage: python -m toyflux.world examples [FOLDER]")
    write_examples(Path(sys.argv[2] if len(sys.argv) == 3 else "examples"))
