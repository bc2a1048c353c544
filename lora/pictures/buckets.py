"""Pictures for training: decoded upright in sRGB, given an aspect-ratio bucket, scaled and cropped to it.

Work on many pictures is done in threads, a few pictures at a time, so that memory does not grow with their number.
"""

import contextlib
import functools
import logging
import math
import os
import struct
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pillow_heif
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from lora.pictures import colours, kinds, pngs
from lora.pictures.limits import MAX_JPEG_PIXELS, MAX_PIXELS

Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS  # or Pillow warns of pictures that are allowed
PngImagePlugin.MAX_TEXT_CHUNK = pngs.PROFILE  # or Pillow refuses a PNG for a long profile; `pngs` sees to texts

Item = TypeVar("Item")
Result = TypeVar("Result")
Merged = Mapping[tuple[int, int], tuple[int, int]]
"""Buckets (width, height) that are given up, and those that take their pictures; see `merge`."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "DIB", "TIFF", "GIF")
"""What is read, told by the bytes of a file and not by its name."""
MAX_ASPECT = 4.0
"""The longest bucket, long side to short; a longer picture is cropped to it."""
COARSE = 768
"""From this resolution on a bucket's sides are multiples of 64 and not of 16: a third fewer sizes of freely cropped
pictures, and even the shape that fits worst loses less than a tenth of its area."""
MOST_SIZES = 9
"""In a run, where that costs no picture more than MOST_CROPPED: on a GPU each is recorded by itself, which takes over a
second and some 0.4 GiB (`lora.flux.hardware`)."""
MOST_CROPPED = 0.25
"""Share of a picture's area. Phone photographs of five shapes at three resolutions, merged to nine, lose so much."""
FRAMES = 50
"""Frames of an animated picture that are looked at for one that shows something."""
SPARE = 1.5
"""A large picture is first made smaller by whole steps, cheaply, but never below this many times what is needed, so
that the Lanczos filter still decides what is seen. Measured on photographs, the result is one level of 255 (rms) from
that of Lanczos alone; with 2 it would be 0.7 levels, and a picture of 12 megapixels would take twice as long."""

# What Pillow and its codecs raise on a damaged file; RuntimeError is pillow-heif's and pillow's AVIF reader's
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)

_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright (Exif 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A picture file whose header has been read."""

    image: Image.Image
    orientation: int
    """The EXIF orientation still to be applied, 1 to 8."""
    frame: int
    frames: int
    """Which frame it is, from 1, and of how many; 1 and 1 where nothing moves."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture."""
        return self.image.size[::-1] if self.orientation >= 5 else self.image.size

    def decode(self, least: tuple[int, int]) -> Image.Image:
        """The picture: upright, colours in sRGB, on white where it is transparent, mode RGB.

        It may be smaller than the file's, which is faster, though not below SPARE times `least` (width, height of the
        upright picture).
        """
        return self.decode_with_alpha(least)[0]

    def decode_with_alpha(self, least: tuple[int, int]) -> tuple[Image.Image, Image.Image | None]:
        """The picture as `decode` gives it, and its opacity (mode L, of the same size), None where all is opaque."""
        wide, high = least[::-1] if self.orientation >= 5 else least
        wide, high = math.ceil(SPARE * wide), math.ceil(SPARE * high)
        self.image.draft(None, (wide, high))  # a JPEG is decoded at a half, a quarter or an eighth
        profile = self.image.info.get("icc_profile")
        picture = colours.plain(self.image)
        if (factor := min(picture.width // wide, picture.height // high)) > 1:
            picture = picture.reduce(factor)
        if self.orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[self.orientation])
        alpha = picture.getchannel("A") if picture.mode in ("LA", "RGBA") else None
        if alpha and alpha.getextrema()[0] == 255:
            alpha = None
        return colours.on_white(picture, profile), alpha


@contextlib.contextmanager
def opened(path: Path, name: str = "") -> Iterator[Opened]:
    """A picture file, open, at its first frame that is not blank.

    Raises ValueError that names it (by `name`, or else by its own) where it is damaged, of an unknown kind, or larger
    than MAX_PIXELS (a JPEG: MAX_JPEG_PIXELS), which may show as late as in decoding it.
    """
    name = name or path.name
    know_heif()
    _be_quiet()
    try:
        with pngs.opened(path) as file, Image.open(file, formats=FORMATS) as image:
            _check_size(image)
            colours.mend_transparency(image)
            orientation = _orientation(image)
            frame, frames = _first_seen(image)
            yield Opened(image=image, orientation=orientation, frame=frame, frames=frames)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name!r} has more than {MAX_PIXELS / 1e6:g} megapixels: make it smaller") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name!r} {_what_it_is(path)}") from error
    except _DAMAGE as error:
        raise ValueError(f"{name!r} cannot be read as a picture: {error}") from error


def _check_size(image: Image.Image) -> None:
    pixels = image.width * image.height
    most = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS  # MPO: a JPEG of several pictures
    if pixels > most:
        advice = "make it smaller" if most == MAX_JPEG_PIXELS else "save it as JPEG or make it smaller"
        raise ValueError(f"{image.width} x {image.height} is over {most / 1e6:g} megapixels: {advice}")
    if not pixels:
        raise ValueError("it has no pixels")


def _first_seen(image: Image.Image) -> tuple[int, int]:
    """Turns an animated picture to its first frame that is not blank, or to its first one where none of FRAMES is:
    the frame's number, from 1, and how many there are."""
    if image.format not in ("GIF", "WEBP", "PNG", "AVIF") or not getattr(image, "is_animated", False):
        return 1, 1
    frames: int = getattr(image, "n_frames", 1)
    for frame in range(min(frames, FRAMES)):
        image.seek(frame)
        if not colours.is_blank(colours.on_white(colours.plain(image), None)):
            return frame + 1, frames
    image.seek(0)
    return 1, frames


def _what_it_is(path: Path) -> str:
    """Why a file that Pillow does not know is no picture."""
    with open(path, "rb") as file:
        head = file.read(kinds.HEAD)
    if not head:
        return "is empty, a file of 0 bytes: pack it again"
    kind = kinds.kind(head)
    if kind and kind not in kinds.PICTURES:
        return f"is a {kind} whatever its name says: convert it or leave it out"
    return f"is damaged, or no {', '.join(FORMATS)} whatever its name says; save it again, or leave it out"


def read_picture(path: Path, pixels: int | None = None) -> Image.Image:
    """A picture as `Opened.decode` gives it: at its full size (of MAX_PIXELS at most), or in at least the detail that
    so many pixels hold, which is faster. Raises ValueError as `opened` does."""
    with opened(path) as picture:
        width, height = picture.size
        whole = width * height
        if whole > MAX_PIXELS:
            pixels = min(pixels or whole, int(MAX_PIXELS / (2 * SPARE) ** 2))
        factor = min(1.0, math.sqrt((pixels or whole) / whole))
        return picture.decode((math.ceil(factor * width), math.ceil(factor * height)))


def choose_bucket(width: int, height: int, resolution: int, step: int = 16) -> tuple[int, int]:
    """The bucket (width, height) that crops a picture of this size least, and of those the largest.

    Its sides are multiples of `step`; its area is resolution² or up to a twentieth less, or else the next that the
    multiples allow; its long side to the short one is at most MAX_ASPECT.
    """
    assert min(width, height) > 0
    assert resolution >= step > 0
    if height > width:
        tall, wide = choose_bucket(height, width, resolution, step)
        return wide, tall
    best, best_score = (0, 0), (0.0, 0)
    for long in range(resolution // step * step, int(MAX_ASPECT * resolution) + 1, step):
        largest = min(long, resolution * resolution // (long * step) * step)
        smallest = min(largest, math.ceil(0.95 * resolution * resolution / (long * step)) * step)
        for short in range(smallest, largest + 1, step):
            score = (kept(width, height, (long, short)), long * short)
            if 0 < long <= MAX_ASPECT * short and score > best_score:
                best, best_score = (long, short), score
    return best


def buckets_for(
    width: int,
    height: int,
    resolutions: Sequence[int],
    step: int | None = None,
    merged: Merged | None = None,
) -> list[tuple[int, int]]:
    """The buckets a picture of this size trains in, smallest first: the smallest resolution's in any case, and of every
    larger one that it fills without being enlarged. `step` None: 16, from COARSE on 64."""
    chosen = [choose_bucket(width, height, side, step or _step(side)) for side in sorted(set(resolutions))]
    buckets = [(merged or {}).get(bucket, bucket) for bucket in chosen]
    return buckets[:1] + [bucket for bucket in buckets[1:] if cover(width, height, bucket) <= 1]


def merge(sizes: Sequence[tuple[int, int]], resolutions: Sequence[int], most: int = MOST_SIZES) -> Merged:
    """Which buckets give way to which of the same resolution, so that pictures of these sizes have `most` in all.

    Again and again the two are merged that cost the pictures least: the squared share of its area that each loses, so
    that many lose little rather than few much. It ends where a picture would lose more than MOST_CROPPED. Empty where
    there are no more than `most`.
    """
    held: list[dict[tuple[int, int], Counter[tuple[int, int]]]] = []
    """For each resolution the buckets that are left, with those whose pictures they take."""
    for side in sorted(set(resolutions)):
        chosen = [(size, choose_bucket(*size, side, _step(side))) for size in sizes]
        filled = Counter(bucket for size, bucket in chosen if not held or cover(*size, bucket) <= 1)
        held.append({bucket: Counter({bucket: count}) for bucket, count in filled.items()})

    def cost(taken: Counter[tuple[int, int]], bucket: tuple[int, int]) -> float:
        return sum(count * (1 - kept(*shape, bucket)) ** 2 for shape, count in taken.items())

    while sum(map(len, held)) > most:
        pairs = [
            (cost(taken, stays) - cost(taken, gone), gone, stays, group)
            for group in range(len(held))
            for gone, taken in held[group].items()
            for stays in held[group].keys() - {gone}
            if all(kept(*shape, stays) >= 1 - MOST_CROPPED for shape in taken)
        ]
        if not pairs:
            break
        _, gone, stays, group = min(pairs)
        held[group][stays] += held[group].pop(gone)
    return {gone: stays for group in held for stays, taken in group.items() for gone in taken.keys() - {stays}}


def kept(width: int, height: int, bucket: tuple[int, int]) -> float:
    """The share of a picture's area that cropping it to the shape of a bucket keeps."""
    one, other = width * bucket[1], height * bucket[0]
    return min(one, other) / max(one, other)


def cover(width: int, height: int, size: tuple[int, int]) -> float:
    """How much a picture of `width` x `height` is enlarged, or made smaller, to cover `size` (width, height)."""
    return max(size[0] / width, size[1] / height)


def fit_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale `image` (Lanczos) to cover `size` (width, height), and crop its centre."""
    scale = cover(*image.size, size)
    width, height = min(image.width, size[0] / scale), min(image.height, size[1] / scale)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, min(image.width, left + width), min(image.height, top + height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """`work(item)` for each item, in order, in `threads` threads (None: one a core, at most 8).

    No more than `threads` + 1 results are under way or waiting, so memory is bounded. When the caller stops early, what
    runs is finished and nothing else begun.
    """
    threads = threads or min(8, os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@functools.cache
def know_heif() -> None:
    """Pillow reads and writes HEIC from here on."""
    pillow_heif.register_heif_opener()


def _step(resolution: int) -> int:
    return 64 if resolution >= COARSE else 16


@functools.cache
def _be_quiet() -> None:
    """Pillow's warnings of odd metadata name no picture and ask nothing of a user; what matters is raised as an error.

    Once and for all, since `warnings.catch_warnings` is not safe in threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\b|pillow_heif\b")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    for library in ("PIL", "pillow_heif"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that Pillow has not applied. A broken EXIF counts as none."""
    if image.format in ("TIFF", "HEIF"):  # their readers turn the picture, and say its upright size
        return 1
    if image.format == "PNG":  # its EXIF may follow the pixels, and asking for it would hide damage to them
        image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        return 1
    return orientation if orientation in _UPRIGHT else 1
