"""What the training sees of each photo: all of it and, where its subject is small, a close-up of that too."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from PIL import Image

from lora.pictures import buckets, closeups, views
from lora.pictures.photos import Photo
from lora.pictures.views import Box, View
from lora.result import preview
from lora.training.decide import Decided
from lora.training.examine import CLOSE_UP
from lora.training.watch import SECONDS_BETWEEN_LINES

Log = Callable[[str], None]

NAMED = 3
"""Pictures of the same sizes that are named; more are counted."""


def close_ups(
    boxes: Mapping[str, Box], sizes: Mapping[str, tuple[int, int]], decided: Decided, log: Log
) -> dict[str, Box]:
    """The part of each photo (by name) that is trained as a close-up, where its subject's box of `boxes` is small.
    `sizes` are of the upright photos, in pixels."""
    found = {}
    for name, subject in boxes.items():
        smallest = buckets.buckets_for(*sizes[name], decided.resolutions, merged=decided.merged)[0]
        if part := closeups.around(subject, sizes[name], smallest):
            found[name] = part
    if boxes:
        told = f"subject_crop: the subject was found in {len(boxes)} of {len(sizes)} pictures, and is small in"
        log(f"{told} {len(found)} of them{', which train as close-ups too' if found else ''}")
    return found


def caption_of(caption: str) -> str:
    """The caption of a picture's close-up."""
    stop = "." if caption.endswith(".") else ""
    return f"{caption.removesuffix(stop)}, close-up{stop}"


def pictures(
    found: Sequence[Photo],
    captions: Mapping[str, str],
    parts: Mapping[str, Box],
    decided: Decided,
    thumbnails: dict[str, bytes],
    log: Log,
) -> Iterator[tuple[str, str, Image.Image]]:
    """Every photo in each of its buckets: name, caption, picture; then close-ups of those that have one in `parts`, in
    the same way, CLOSE_UP behind their name. Leaves a thumbnail of each in `thumbnails`, and tells the log at which
    sizes how many are trained."""
    wanted = [(photo.name, captions[photo.name], View(photo.path, photo.mask)) for photo in found]
    for photo in found:
        if photo.name in parts:
            view = View(photo.path, photo.mask, parts[photo.name])
            wanted.append((photo.name + CLOSE_UP, caption_of(captions[photo.name]), view))
    prepared = views.prepared([view for _, _, view in wanted], decided.resolutions, merged=decided.merged)
    alike: dict[str, list[str]] = {}
    told = time.monotonic()
    for number, ((name, caption, view), fitted) in enumerate(zip(wanted, prepared, strict=True)):
        sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in fitted)
        by = "" if fitted[0].mode == "RGB" else f", weighted by their {'masks' if view.mask else 'opaque parts'}"
        alike.setdefault(f"{sizes}{by}", []).append(name.replace(CLOSE_UP, ", a close-up"))
        thumbnails[name] = preview.thumbnail(fitted[-1].convert("RGB"))
        for picture in fitted:
            yield name, caption, picture
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            log(f"{number + 1} of {len(wanted)} encoded")
    for sizes, names in alike.items():
        log(f"{sizes}: {', '.join(names) if len(names) <= NAMED else f'{len(names)} pictures'}")
