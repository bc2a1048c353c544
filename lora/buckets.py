"""Pictures for training: decoded upright in sRGB, given an aspect-ratio bucket, scaled and cropped to it.

One picture may train at several resolutions; it is decoded once for all of them, in threads, a few at a time, so that
memory does not grow with their number.
"""

import functools
import math
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pillow_heif
from PIL import Image, ImageCms, ImageOps

from lora.archive import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "DIB", "TIFF", "GIF")
MAX_ASPECT = 4.0
"""The longest bucket, long side to short; a longer picture is cropped to it."""

# What Pillow and its codecs raise on a damaged file
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, KeyError, IndexError, OverflowError,
           AttributeError, struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip


def read_picture(path: Path, least: tuple[int, int] | None = None) -> Image.Image:
    """Decode a picture: first frame, upright by its EXIF, colours in sRGB, on white where it is transparent, mode RGB.

    Where `least` (width, height, of the upright picture) is given, a large JPEG is decoded at a half, a quarter or an
    eighth of its size, never below twice `least`, for speed.

    Raises ValueError naming the file where it is damaged or has more than MAX_PIXELS.
    """
    try:
        with _open(path) as image:
            if least is not None:
                wanted = (2 * least[0], 2 * least[1])
                image.draft("RGB", wanted[::-1] if _turned(image) else wanted)
            return _srgb(ImageOps.exif_transpose(image))
    except _DAMAGE as error:
        raise ValueError(f"{path.name!r} cannot be read as a picture: {error}") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture, from its header. Raises ValueError as `read_picture` does."""
    try:
        with _open(path) as image:
            return (image.height, image.width) if _turned(image) else image.size
    except _DAMAGE as error:
        raise ValueError(f"{path.name!r} cannot be read as a picture: {error}") from error


@functools.cache
def choose_bucket(width: int, height: int, resolution: int, step: int = 16) -> tuple[int, int]:
    """The bucket (width, height) that crops a picture least: multiples of `step`, area at most resolution² and as near
    to it as the multiples allow, no longer than MAX_ASPECT."""
    if height > width:
        tall, wide = choose_bucket(height, width, resolution, step)
        return wide, tall
    assert height > 0 and resolution >= step > 0
    best, best_score = (step, step), (0.0, 0)
    for long in range(resolution // step * step, int(resolution * math.sqrt(MAX_ASPECT)) + 1, step):
        short = resolution * resolution // (long * step) * step
        kept = min(width * short, long * height) / max(width * short, long * height)
        if short and long <= MAX_ASPECT * short and (kept, long * short) > best_score:
            best, best_score = (long, short), (kept, long * short)
    return best


def buckets_for(width: int, height: int, resolutions: Sequence[int], step: int = 16) -> list[tuple[int, int]]:
    """One bucket for each resolution that the picture fills without being enlarged, smallest first; the smallest one in
    any case."""
    buckets = [choose_bucket(width, height, resolution, step) for resolution in sorted(resolutions)]
    return [bucket for i, bucket in enumerate(dict.fromkeys(buckets)) if i == 0 or _cover(width, height, bucket) <= 1]


def fit_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale `image` (Lanczos) to cover `size` (width, height) and crop its centre."""
    scale = _cover(*image.size, size)
    width, height = size[0] / scale, size[1] / scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (max(0.0, left), max(0.0, top), min(image.width, left + width), min(image.height, top + height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def prepared(
    paths: Iterable[Path], resolutions: Sequence[int], step: int = 16, threads: int = 2
) -> Iterator[list[Image.Image]]:
    """For each path, in order, the picture in each of its buckets (`buckets_for`), decoded once, in `threads` threads.

    At most `threads` + 1 pictures are under way at a time.
    """
    pending: deque[Future[list[Image.Image]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="pictures") as pool:
        try:
            for path in paths:
                pending.append(pool.submit(_prepare, path, resolutions, step))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare(path: Path, resolutions: Sequence[int], step: int) -> list[Image.Image]:
    buckets = buckets_for(*picture_size(path), resolutions, step)
    least = (max(width for width, _ in buckets), max(height for _, height in buckets))
    image = read_picture(path, least)
    return [fit_to(image, bucket) for bucket in buckets]


def _cover(width: int, height: int, size: tuple[int, int]) -> float:
    return max(size[0] / width, size[1] / height)


@functools.cache
def _know_heif() -> None:
    pillow_heif.register_heif_opener()


def _open(path: Path) -> Image.Image:
    _know_heif()
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise ValueError(f"{size} is more than {MAX_PIXELS / 1e6:g} megapixels: make it smaller")
    return image


def _turned(image: Image.Image) -> bool:
    """Whether the stored picture lies on its side. Pillow's TIFF reader turns the picture and its size by itself."""
    return image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)


def _srgb(image: Image.Image) -> Image.Image:
    """Any mode and colour profile -> RGB in sRGB, on white."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    image = _by_profile(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits, or real numbers -> 8 bits. Their white is taken from the largest value: 1, 255, 65535."""
    top = max(1.0, float(image.getextrema()[1]))  # type: ignore[arg-type]
    white = 65535.0 if image.mode.startswith("I;16") else next((w for w in (1.0, 255.0, 65535.0) if top <= w), top)
    return image.convert("F").point(lambda value: value * (255.0 / white) + 0.5).convert("L")


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    try:
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        elif profile and not _is_srgb(profile):
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
        else:
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one for another kind of picture
        return image.convert("RGB")
    assert converted is not None
    return converted


def _is_srgb(profile: bytes) -> bool:
    return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(profile))).startswith("sRGB")
