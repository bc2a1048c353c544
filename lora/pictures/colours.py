"""The colours of a picture: whatever a file holds, as RGB of 8 bits in sRGB, on white where it is transparent."""

from io import BytesIO

from PIL import Image, ImageChops, ImageCms
from PIL.PngImagePlugin import PngImageFile

BLANK = 8
"""Levels of 255 between the darkest and the lightest of each channel, at most, in a picture that shows nothing."""
SAME_CURVES = 2
"""Levels of 255 by which a profile may differ from sRGB and count as it: what makers' own sRGB profiles differ by."""

_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}
"""A profile's colour space (ICC.1:2022, table 19) -> Pillow's mode."""


def mend_transparency(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the bits that Pillow gives its pixels; before they are loaded."""
    transparent = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or not image.tile or transparent is None:
        return
    layout = image.tile[0].args
    if layout == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif layout in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * (85 if layout == "L;2" else 17)


def plain(image: Image.Image) -> Image.Image:
    """Any mode -> one of 8 bits a channel: L, RGB, CMYK, LAB, or LA or RGBA where something is transparent."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        image.load()
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits, or real numbers -> L, or LA where one of them counts as transparent.

    White is the format's own for 16 bits; else the first of 1, 255 and 65535 that no value exceeds, for the file does
    not say.
    """
    transparent = image.info.get("transparency")
    sixteen = image.mode.startswith("I;16")
    image = image.convert("F")
    top = image.getextrema()[1]
    assert isinstance(top, int | float)
    white = 65535 if sixteen else next((white for white in (1, 255, 65535) if top <= white), top)
    grey = image.point(lambda value: value * (255 / white) + 0.5).convert("L")
    if not isinstance(transparent, int):
        return grey
    above = image.point(lambda value: value * 1 - transparent).convert("L")  # what is below 0 or over 255 is cut
    below = image.point(lambda value: value * -1 + transparent).convert("L")
    opaque = ImageChops.lighter(above, below).point([0] + [255] * 255)
    return Image.merge("LA", (grey, opaque))


def on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """What `plain` gives, in the colours of `profile` (None: sRGB) -> RGB in sRGB, on white."""
    if image.mode not in ("LA", "RGBA"):
        return _srgb(image, profile)
    white = Image.new("RGB", image.size, "white")
    colours = _srgb(image.convert("L" if image.mode == "LA" else "RGB"), profile)
    white.paste(colours, mask=image.getchannel("A"))
    return white


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB picture shows one colour only."""
    return all(high - low <= BLANK for low, high in image.getextrema())  # type: ignore[misc]


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """L, RGB, CMYK or LAB in the colours of `profile` -> RGB in sRGB. A broken or unfit one is ignored."""
    if image.mode != "LAB" and profile is None:
        return image.convert("RGB")
    try:
        described = ImageCms.createProfile("LAB") if image.mode == "LAB" else BytesIO(profile or b"")
        source = ImageCms.ImageCmsProfile(described)
        image = _in_mode(image, _MODES.get(source.profile.xcolor_space.strip(), ""))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if image.mode == "RGB" and _is_srgb(transform):
            return image
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")
    assert converted is not None
    return converted


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The picture in the mode of its profile, where it merely lies in another: greys as L or as RGB."""
    if (image.mode, mode) == ("L", "RGB"):
        return image.convert("RGB")
    if (image.mode, mode) == ("RGB", "L"):
        grey = image.convert("L")
        if not any(high for _, high in ImageChops.difference(grey.convert("RGB"), image).getextrema()):  # type: ignore[misc]
            return grey
    return image


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it leaves the greys and the three primaries, from dark to light, as they are. A profile's name says
    nothing: there are linear ones that are called sRGB."""
    ramp = Image.linear_gradient("L")  # 256 rows, each of one level
    none = Image.new("L", ramp.size)
    channels = [(ramp, ramp, ramp), (ramp, none, none), (none, ramp, none), (none, none, ramp)]
    probe = Image.new("RGB", (4, 256))
    for at, bands in enumerate(channels):
        probe.paste(Image.merge("RGB", bands).crop((0, 0, 1, 256)), (at, 0))
    seen = ImageCms.applyTransform(probe, transform)
    assert seen is not None
    return all(high <= SAME_CURVES for _, high in ImageChops.difference(probe, seen).getextrema())  # type: ignore[misc]
