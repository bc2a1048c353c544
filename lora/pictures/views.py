"""What is trained of each picture, in every size: the pixels, and what to learn in them.

One picture may train at several resolutions; it is decoded once for all of them, in threads (`buckets.in_threads`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora.pictures import buckets
from lora.pictures.buckets import Merged
from lora.pictures.photos import Photo

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of a picture's width and height: 0 <= left < right <= 1."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
OTHER_SHAPE = 0.03
"""By how much the ratio of a mask's sides may differ from its picture's: more than rounding to pixels when both are
made smaller, less than between any two usual shapes."""


@dataclass(frozen=True)
class View:
    """A picture file, and what to learn in it."""

    path: Path
    mask: Path | None = None
    """A picture of the same shape: white is learned. Where there is none, the file's own transparency is one."""
    box: Box | None = None
    """The part that is looked at; None: all of it."""


def prepared(
    views: Iterable[View],
    resolutions: Sequence[int],
    step: int | None = None,
    threads: int | None = None,
    merged: Merged | None = None,
) -> Iterator[list[Image.Image]]:
    """For each view, in order: the picture in each of its buckets (`buckets.buckets_for`), in RGB; or, where it has a
    mask or is transparent somewhere, in RGBA, with what to learn as the alpha channel and the colours as they are
    beneath (on white where the file is transparent). A part of a picture has the whole one's buckets, but for those
    that it would have to be enlarged for.

    Raises ValueError as `buckets.opened` does.
    """

    def prepare(view: View) -> list[Image.Image]:
        with buckets.opened(view.path) as picture:
            width, height = picture.size
            sizes = buckets.buckets_for(width, height, resolutions, step, merged)
            left, top, right, bottom = view.box or WHOLE
            across, down = right - left, bottom - top
            part = round(across * width), round(down * height)
            sizes = sizes[:1] + [size for size in sizes[1:] if buckets.cover(*part, size) <= 1]
            least = math.ceil(max(size[0] for size in sizes) / across), math.ceil(max(size[1] for size in sizes) / down)
            colours, learned = picture.decode_with_alpha(least)
        if view.mask:
            with buckets.opened(view.mask) as mask:
                learned = mask.decode(least).convert("L").resize(colours.size, Image.Resampling.BILINEAR)
        if view.box:
            x, y = colours.size
            pixels = round(left * x), round(top * y), round(right * x), round(bottom * y)
            colours, learned = colours.crop(pixels), learned and learned.crop(pixels)
        return [_with_alpha(colours, learned, size) for size in sizes]

    return buckets.in_threads(prepare, views, threads)


def check_masks(photos: Sequence[Photo]) -> list[str]:
    """What the user should know of the masks, a line each. Raises one ValueError that names every mask that cannot be
    read, or that has another shape than its picture."""

    def look(photo: Photo) -> tuple[str, str]:
        assert photo.mask
        try:
            with buckets.opened(photo.mask) as mask:
                sizes = [mask.size]
                levels, transparent = mask.decode_with_alpha((64, 64))
            with buckets.opened(photo.path, photo.name) as picture:
                sizes.append(picture.size)
        except ValueError as fault:
            return f"the mask of {photo.name!r}: {fault}", ""
        if transparent:
            return f"the mask of {photo.name!r} has transparent parts, which may mean either: save it without them", ""
        (w, h), (width, height) = sizes
        if abs(w * height / (h * width) - 1) > OTHER_SHAPE:
            return f"the mask of {photo.name!r} is {w} x {h}, another shape than its picture, {width} x {height}", ""
        white = levels.convert("L").getextrema()[1]
        return "", "" if white else f"the mask of {photo.name!r} is black, so it changes nothing: white is learned"

    seen = list(buckets.in_threads(look, [photo for photo in photos if photo.mask]))
    if faults := [fault for fault, _ in seen if fault]:
        raise ValueError("\n  ".join(["input_images: these masks cannot be used:", *faults]))
    return [note for _, note in seen if note]


def _with_alpha(colours: Image.Image, learned: Image.Image | None, size: tuple[int, int]) -> Image.Image:
    """Scaled and cropped each by itself: Pillow darkens colours where alpha is 0 when it scales both at once."""
    fitted = buckets.fit_to(colours, size)
    if learned:
        fitted.putalpha(buckets.fit_to(learned, size))
    return fitted
