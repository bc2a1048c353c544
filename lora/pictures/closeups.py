"""Close-ups: where the subject is small in a picture, the part around it."""

import math

from lora.pictures.views import Box

SMALL = 0.25
"""Share of the picture's area below which its subject is small."""
MARGIN = 0.25
"""Of the subject's width and height, on each side of it. Both are choices, not measured."""
MOST = 0.5
"""Share of the picture's area that a close-up may have: with more it shows what the whole picture shows."""


def around(subject: Box, picture: tuple[int, int], bucket: tuple[int, int]) -> Box | None:
    """The part of a picture (width, height in pixels) around its subject, as shares; None where there is to be none.

    It has the shape of `bucket`, the smallest that the picture trains in, and at least its size, so that it is trained
    in no other sizes and never enlarged. None where the subject is not small, or where that part would be most of the
    picture.
    """
    left, top, right, bottom = subject
    if (right - left) * (bottom - top) >= SMALL:
        return None
    wanted = [
        (1 + 2 * MARGIN) * share * side for share, side in zip((right - left, bottom - top), picture, strict=True)
    ]
    scale = max(1.0, wanted[0] / bucket[0], wanted[1] / bucket[1])
    size = [math.ceil(scale * side) for side in bucket]
    if size[0] > picture[0] or size[1] > picture[1] or size[0] * size[1] > MOST * picture[0] * picture[1]:
        return None
    start = []
    for low, high, part, whole in zip((left, top), (right, bottom), size, picture, strict=True):
        middle = (low + high) / 2 * whole
        start.append(min(max(round(middle - part / 2), 0), whole - part))
    (x, y), (wide, high) = start, size
    return x / picture[0], y / picture[1], (x + wide) / picture[0], (y + high) / picture[1]
