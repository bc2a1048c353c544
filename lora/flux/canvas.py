"""What is drawn on: an empty canvas of a size, a picture to start from, or a picture of which a part is drawn anew.

A mask's white is redrawn and its black is kept, as in Replicate's FLUX models. diffusers' inpainting keeps the black
part only in its latents, so that every pixel goes through the autoencoder; here it is taken from the picture itself.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lora.pictures import buckets

LARGEST = 2048
"""Pixels of a side, the most that can be asked for; a larger picture is made smaller before a part is redrawn."""
SIDE_OF_LATENT = 8
"""Pixels of the picture, each way, that the autoencoder of FLUX.1 makes one latent of."""
BLACK, WHITE = 16, 239
"""Levels of 255 up to which a mask counts as black, and from which on as white: JPEG and resizing leave such traces."""
SHAPES_ALIKE = 0.02
"""How much the aspect ratios of a picture and its mask may differ, in proportion."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """What `lora.flux.generate.draw` is given, and what is made of its drawing."""

    size: tuple[int, int]
    """(width, height) in pixels to draw at, multiples of 16."""
    start: Image.Image | None = None
    """The picture to start from, of this size."""
    mask: Image.Image | None = None
    """White where the pipeline draws, of this size: whole latents."""
    kept: tuple[Image.Image, Image.Image] | None = None
    """The picture and its mask ("L") in the size of the result, where a part is redrawn."""

    def finish(self, drawn: Image.Image) -> Image.Image:
        """The result: where a mask is black every pixel is the picture's own, where it is grey the two are blended."""
        if self.kept is None:
            return drawn
        picture, mask = self.kept
        if drawn.size != picture.size:
            drawn = drawn.resize(picture.size, Image.Resampling.LANCZOS)
        return Image.composite(drawn, picture, mask)


def blank(aspect_ratio: str, width: float | None, height: float | None, side: int) -> Canvas:
    """An empty canvas: of the area `side`² and a ratio such as "16:9", or of `width` and `height` where it is "custom".

    Raises ValueError where "custom" lacks one of them.
    """
    if aspect_ratio != "custom":
        return Canvas(size=size_for(aspect_ratio, side))
    if width is None or height is None:
        missing = " and ".join(name for name, value in (("width", width), ("height", height)) if value is None)
        raise ValueError(f"aspect_ratio: custom takes width and height in pixels; give {missing} too")
    return Canvas(size=(max(16, round(width / 16) * 16), max(16, round(height / 16) * 16)))


def over(picture: Image.Image, side: int) -> Canvas:
    """To start from a picture: in its shape and of an area of `side`², its edges cut where the shape is no bucket's."""
    size = buckets.choose_bucket(picture.width, picture.height, side)
    return Canvas(size=size, start=buckets.fit_to(picture, size))


def within(picture: Image.Image, mask: Image.Image, side: int) -> Canvas:
    """To redraw what is white in the mask, drawn at an area of `side`²; the result has the size of the picture.

    Raises ValueError, which names the input, where the mask has another shape, and where nothing of it is white.
    """
    if abs(mask.width / mask.height / (picture.width / picture.height) - 1) > SHAPES_ALIKE:
        raise ValueError(
            f"mask: it is {mask.width}x{mask.height} and image is {picture.width}x{picture.height}: give a mask of the"
            " same shape, white where the picture is to be redrawn and black elsewhere"
        )
    if max(picture.size) > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    grey = mask.convert("L")
    if grey.size != picture.size:
        grey = grey.resize(picture.size, Image.Resampling.BILINEAR)
    grey = grey.point([0 if level <= BLACK else 255 if level >= WHITE else level for level in range(256)])
    if grey.getbbox() is None:
        raise ValueError("mask: nothing of it is white, so nothing would be drawn; paint white what is to be redrawn")
    size = buckets.choose_bucket(picture.width, picture.height, side)
    start = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    return Canvas(size=size, start=start, mask=_whole_latents(grey, size), kept=(picture, grey))


def read_mask(path: Path) -> Image.Image:
    """A mask's picture, upright; of white strokes on nothing, as drawing programs save them, the nothing is black.

    Raises ValueError where it cannot be read, and where it has transparent parts and something other than white: some
    programs mean the transparent parts then, others the opaque ones.
    """
    with buckets.opened(path) as file:
        if file.image.has_transparency_data:
            grey, strokes = file.image.convert("RGBA").convert("LA").split()
            if np.asarray(strokes).min() < WHITE:
                if (np.asarray(grey)[np.asarray(strokes) > BLACK] < WHITE).any():
                    raise ValueError(
                        "it has transparent parts, which may mean either; save it in black and white alone"
                    )
                return strokes
    return buckets.read_picture(path)


def _whole_latents(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask of `size` whose white is every latent that a pixel of `mask` touches: the pipeline looks at one pixel in
    each latent's square, and would miss a thin line."""
    grid = (size[0] // SIDE_OF_LATENT, size[1] // SIDE_OF_LATENT)
    share = Image.fromarray((np.asarray(mask) > 0).astype(np.float32)).resize(grid, Image.Resampling.BOX)
    touched = Image.fromarray((np.asarray(share) > 0).astype(np.uint8) * 255)
    return touched.resize(size, Image.Resampling.NEAREST)


def size_for(ratio: str, side: int) -> tuple[int, int]:
    """(width, height) in pixels of "16:9" and the like at an area of `side`², in multiples of 16."""
    wide, high = (int(part) for part in ratio.split(":"))
    sides = (side * math.sqrt(wide / high), side * math.sqrt(high / wide))
    return max(16, round(sides[0] / 16) * 16), max(16, round(sides[1] / 16) * 16)
