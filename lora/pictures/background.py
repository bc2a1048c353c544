"""Whether the pictures all have one background: it would be learned with the subject."""

import itertools
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageStat

from lora.pictures.survey import Look

FEWEST = 4
"""Pictures from which on they are compared."""
MOSTLY = 0.75
"""The share of pairs that must be alike."""
ALIKE = 20.0
"""Two borders are alike where they differ by less than this, in levels of 255 (RMS over the three colours). Fifteen
photographs beside themselves a tenth brighter differed by 10 to 20, and cut by 3 % by 7 to 29, half of them by 18 and
less; any two of a dog, a backpack or a toy in different places by 22 and more. So it is a plain wall, or a camera that
stood still, that is told of."""
_SIDE, _BORDER = 16, 3


def warning(looks: Sequence[Look]) -> str | None:
    """A sentence for the user where most pictures have the same border, None where they have not.

    The border is what lies within 3/16 of the left, right and upper edge: below stands the subject itself.
    """
    if len(looks) < FEWEST:
        return None
    borders = [_border(look.colours) for look in looks]
    pairs = [_difference(a, b) < ALIKE for a, b in itertools.combinations(borders, 2)]
    if sum(pairs) < MOSTLY * len(pairs):
        return None
    return (
        "nearly all pictures have the same background, which will be learned with the word: add pictures in other"
        " places, or name it in the captions"
    )


def _border(colours: Image.Image) -> list[Image.Image]:
    """The left, right and upper edge of a copy of 16 x 16 pixels."""
    side, wide = _SIDE, _BORDER
    return [
        colours.crop(box) for box in ((0, 0, wide, side), (side - wide, 0, side, side), (wide, 0, side - wide, wide))
    ]


def _difference(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> float:
    rms = [ImageStat.Stat(ImageChops.difference(one, other)).rms for one, other in zip(a, b, strict=True)]
    return max(sum(levels) / len(levels) for levels in rms)
