"""Draws a scene of the world, and pictures of nothing in it.

Nothing is random but by the seed given. Pictures are RGB; sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from toyflux.world import (
    COLOURS,
    NATIVE,
    PLACES,
    RADII,
    RESERVED_COLOURS,
    SHIFTS,
    Colour,
    Creature,
    Scene,
    Style,
    Thing,
)

SUPER = 3
"""Pictures are drawn this many times larger, blurred a little as a lens would, and reduced."""

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
