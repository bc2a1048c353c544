"""A procedural world of captioned pictures, small enough that a two-million-parameter model can know all of it.

A `Scene` is plain data: one or two items (a coloured `Thing`, or a `Creature` with a made-up name), their sizes and
places, a background colour, and perhaps a named `Style`. `caption(scene)` makes its text, `toyflux.drawing` its
picture. The looks behind made-up names follow from the names alone (`creature`, `style`), and 100 + 64 of them are the
base's to learn. `SUBJECTS` and `UNSEEN_STYLES` are looks which the base never sees: a LoRA has to teach them.

Nothing here is random but by the seed given. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

NATIVE = (96, 96)
"""The size at which the base is trained most, in pixels."""
SIZES = ((80, 112), (112, 80), (64, 144), (144, 64))
"""The other sizes of its training: about the same area, sides in multiples of 16."""

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
