"""A first look at all the pictures, before any model is loaded: the damaged ones, and what will train badly.

Damage is an error, and so is a blank picture; everything else is a warning, for a user may have reasons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageStat

from lora.pictures import buckets, colours

FEW = 4
"""Fewer pictures than this are warned of."""
BLURRED = 0.42
"""Steepness below which a picture counts as blurred: that of edges blurred by some 2 pixels (a Gaussian's sigma) when
the picture has SIDE² pixels. Photographs measured 0.66 to 0.86, hard drawings 1.0, the same blurred by 4 pixels 0.31 to
0.38."""
ALIKE_BITS = 8
ALIKE_COLOURS = 14.0
"""Two pictures look alike where at most ALIKE_BITS of their 256 bits differ and their small copies differ by less than
ALIKE_COLOURS levels of 255. Copies of a photograph, compressed, scaled or a tenth brighter, measured up to 6 bits and
13.5 levels; different pictures of one thing, from 12 bits and 19 levels."""
ALIKE_PLACE = 45
"""And where no place of 32 x 32 differs by so many levels, once contrast and brightness are the same: a small thing
elsewhere changes a mean little, and its places much. The copies measured up to 30 levels (42 where brightening cut off
the whites), things of a tenth of the width in another place or shape from 52 levels."""
ALIKE_SPECK = 30
"""Nor one of 64 x 64 by so many levels more than its own surroundings in both pictures: at an edge copies differ too,
and on a plain ground only something that is not in both. The copies measured up to 24 levels, a hundredth of the width
in another place 60."""
PLAIN_BITS = 16
PLAIN_PLACE = 7
"""A hash with fewer bits set, or fewer unset, says nothing: the ground is plain. Two such pictures count as alike only
if no place of 64 x 64 differs by so many levels; compressed and scaled copies measured up to 6, letters of a twentieth
of the width from 9."""
CROPPED = 0.1
"""The share that cropping may take without a warning."""
ENLARGED = 2.0

SIDE = 512
_SMALL = 16
_PLACES = 64
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is remembered of one picture."""

    name: str
    width: int
    height: int
    bits: int
    """Difference hash: for each of 16 x 16 places, whether the grey falls to the right (Krawetz 2013, "Kind of Like
    That")."""
    colours: Image.Image
    """A copy of 16 x 16 pixels."""
    places: Image.Image
    """A copy of 64 x 64 pixels."""
    steepness: float | None
    """How sharp the sharpest edges are, 0 to 1; None where there are none."""
    frame: int
    frames: int
    """The frame that was looked at, from 1, and of how many; 1 and 1 where nothing moves."""


def look_at(pictures: Mapping[str, Path], threads: int | None = None) -> list[Look]:
    """Decode every picture (name -> file) once, in threads. Raises one ValueError that names all the damaged and all
    the blank ones."""

    def look(item: tuple[str, Path]) -> Look | str:
        name, path = item
        try:
            with buckets.opened(path, name) as picture:
                width, height = picture.size
                image = picture.decode((SIDE, SIDE))
        except ValueError as fault:
            return str(fault)
        if colours.is_blank(image):
            all_frames = f"all of its {picture.frames} frames show" if picture.frames > 1 else "it shows"
            return f"{name!r} is blank: {all_frames} one colour only, transparent parts counting as white; leave it out"
        return Look(
            name=name,
            width=width,
            height=height,
            bits=_bits(image),
            colours=image.resize((_SMALL, _SMALL), Image.Resampling.BOX),
            places=image.resize((_PLACES, _PLACES), Image.Resampling.BOX),
            steepness=_steepness(image),
            frame=picture.frame,
            frames=picture.frames,
        )

    looks = list(buckets.in_threads(look, pictures.items(), threads))
    faults = [found for found in looks if isinstance(found, str)]
    if faults:
        raise ValueError("\n  ".join(["input_images: these pictures cannot be used:", *faults]))
    return [found for found in looks if isinstance(found, Look)]


def report(looks: Sequence[Look], resolutions: Sequence[int], merged: buckets.Merged | None = None) -> list[str]:
    """What a user should know of the pictures, a line for each kind of trouble; empty where there is none."""
    lines = []
    if len(looks) < FEW:
        count = "1 picture" if len(looks) == 1 else f"{len(looks)} pictures"
        lines.append(f"only {count}: 10 to 20 that differ teach more")
    moving = [f"{look.name!r} (frame {look.frame} of {look.frames})" for look in looks if look.frames > 1]
    if moving:
        lines.append(f"animated, and only the first frame that is not blank is used: {_some(moving)}")
    for group in _alike(looks):
        lines.append(
            f"{_some([repr(look.name) for look in group])} look alike, so they count more than the others: keep one"
        )
    small, tiny, cropped = [], [], []
    for look in looks:
        sizes = buckets.buckets_for(look.width, look.height, resolutions, merged=merged)
        scale = buckets.cover(look.width, look.height, sizes[0])
        kept = min(buckets.kept(look.width, look.height, bucket) for bucket in sizes)
        told = f"{look.name!r} ({look.width} x {look.height}"
        if scale > ENLARGED:
            tiny.append(f"{told}, {scale:.1f} times)")
        elif scale > 1:
            small.append(f"{told})")
        if kept < 1 - CROPPED:
            cropped.append(f"{told}, {kept:.0%} kept)")
    if small:
        lines.append(
            f"smaller than the smallest size that is trained, and enlarged; send larger ones if you can: {_some(small)}"
        )
    if tiny:
        lines.append(f"enlarged by more than {ENLARGED:g}, which teaches blur, use larger ones: {_some(tiny)}")
    if cropped:
        lines.append(
            "of other shapes than the sizes that are trained, so only the middle is used; crop them yourself to choose"
            f" the part: {_some(cropped)}"
        )
    blurred = [repr(look.name) for look in looks if look.steepness is not None and look.steepness < BLURRED]
    if blurred:
        lines.append(f"blurred, which is learned too; leave out those that are meant to be sharp: {_some(blurred)}")
    return lines


def copies(looks: Sequence[Look]) -> frozenset[str]:
    """The pictures of which another one is nearly a copy."""
    return frozenset(look.name for group in _alike(looks) for look in group)


def _bits(image: Image.Image) -> int:
    grey = image.convert("L").resize((_SMALL + 1, _SMALL), Image.Resampling.BOX)
    left, right = grey.crop((0, 0, _SMALL, _SMALL)), grey.crop((1, 0, _SMALL + 1, _SMALL))
    falls = ImageChops.subtract(left, right)
    # less than two levels is noise, as on a plain background
    return int("".join("1" if level > 2 else "0" for level in falls.tobytes()), 2)


def _steepness(image: Image.Image) -> float | None:
    """How much of the contrast around a pixel (9 pixels across) lies within 3 pixels: the 95th of a hundred places that
    have a contrast. Unlike the variance of the Laplacian it does not depend on how much detail a picture has."""
    scale = min(1.0, math.sqrt(SIDE * SIDE / (image.width * image.height)))
    grey = image.convert("L").resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    near_low, near_high = grey.filter(ImageFilter.MinFilter(3)), grey.filter(ImageFilter.MaxFilter(3))
    low, high = near_low, near_high
    for _ in range(3):  # four filters of 3 are one of 9, and faster
        low, high = low.filter(ImageFilter.MinFilter(3)), high.filter(ImageFilter.MaxFilter(3))
    inside = (4, 4, grey.width - 4, grey.height - 4)  # at the border Pillow's filters copy
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return None
    near = ImageChops.subtract(near_high, near_low).crop(inside).tobytes()
    wide = ImageChops.subtract(high, low).crop(inside).tobytes()
    every = max(1, len(near) // 20_000)
    while math.gcd(every, inside[2] - inside[0]) > 1:  # or the same columns are looked at in every row
        every += 1
    shares = sorted(a / b for a, b in zip(near[::every], wide[::every], strict=True) if b >= 40)
    return shares[int(0.95 * len(shares))] if len(shares) >= 50 else None


def _alike(looks: Sequence[Look]) -> list[list[Look]]:
    """Groups of two and more that look alike, each with the first of its group."""
    groups: list[list[Look]] = []
    for look in looks:
        group = next((group for group in groups if _are_alike(group[0], look)), None)
        if group is None:
            groups.append([look])
        else:
            group.append(look)
    return [group for group in groups if len(group) > 1]


def _are_alike(a: Look, b: Look) -> bool:
    if (a.bits ^ b.bits).bit_count() > ALIKE_BITS:
        return False
    rms = ImageStat.Stat(ImageChops.difference(a.colours, b.colours)).rms
    if sum(rms) / len(rms) >= ALIKE_COLOURS:
        return False
    fine, coarse = _apart(a.places, b.places), _apart(a.places.reduce(2), b.places.reduce(2))
    near = ImageChops.darker(_range(a.places), _range(b.places))
    plain = all(min(look.bits.bit_count(), _SMALL**2 - look.bits.bit_count()) < PLAIN_BITS for look in (a, b))
    return (
        _most(coarse) < ALIKE_PLACE
        and _most(ImageChops.subtract(fine, near)) < ALIKE_SPECK
        and (_most(fine) < PLAIN_PLACE or not plain)
    )


def _apart(a: Image.Image, b: Image.Image) -> Image.Image:
    """How far the two are apart in each place, when the first is given the mean and (by a quarter at most) the contrast
    of the second, channel by channel."""
    of_a, of_b = ImageStat.Stat(a), ImageStat.Stat(b)
    table: list[int] = []
    for mean_a, mean_b, spread_a, spread_b in zip(of_a.mean, of_b.mean, of_a.stddev, of_b.stddev, strict=True):
        gain = min(1.25, max(0.8, spread_b / spread_a)) if spread_a else 1.0
        table += [round(min(255.0, max(0.0, mean_b + gain * (level - mean_a)))) for level in range(256)]
    return ImageChops.difference(a.point(table), b)


def _range(image: Image.Image) -> Image.Image:
    """Levels between the darkest and the lightest within a place of each."""
    return ImageChops.subtract(image.filter(ImageFilter.MaxFilter(3)), image.filter(ImageFilter.MinFilter(3)))


def _most(image: Image.Image) -> int:
    return max(high for _, high in image.getextrema())  # type: ignore[misc]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
