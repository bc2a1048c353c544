"""Files become photos: which are pictures, which `.txt` belongs to which, and what the captions say."""

import codecs
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora.pictures.limits import MAX_CAPTION_BYTES

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".heic", ".heif", ".hif"}
)
"""What `buckets.read_picture` reads, in lower case."""

_KINDS = "JPEG, PNG, WebP, AVIF, HEIC, BMP, TIFF or GIF"
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A picture and the user's own text for it."""

    name: str
    """Its name in the archive, with folders joined by `/`; unique."""
    path: Path
    """Where it lies now."""
    caption: str | None
    """What the user's `.txt` says, unchanged but for its ends; None where there is none or it is empty."""


def pair(folder: Path, files: Sequence[Path]) -> tuple[list[Photo], list[str]]:
    """Pair the pictures among `files`, which lie below `folder`, with their captions: photos sorted by name, warnings.

    A caption lies in its picture's folder as `a.txt` or `a.jpg.txt` for `a.jpg`, in any case. Raises ValueError with
    all faults at once: unknown kinds of file, a caption for two pictures, two captions for one, a caption that is no
    Unicode or longer than MAX_CAPTION_BYTES, no pictures at all.
    """
    names = {file.relative_to(folder).as_posix(): file for file in files}
    pictures = sorted(name for name in names if _suffix(name) in PICTURE_SUFFIXES)
    texts = sorted(name for name in names if _suffix(name) == ".txt")
    unknown = sorted(set(names) - set(pictures) - set(texts))

    faults = []
    if unknown:
        faults.append(f"not a picture ({_KINDS}) and not a .txt caption, leave out or convert: {_some(unknown)}")
    if not pictures:
        found = Counter(_suffix(name) or "without a suffix" for name in names)
        seen = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.items())) or "no files at all"
        faults.append(f"no pictures ({_KINDS}) in the archive; it holds {seen}")

    by_name = {name.casefold(): name for name in pictures}
    by_stem = defaultdict(list)
    for name in pictures:
        by_stem[_stem(name)].append(name)
    captions: dict[str, str] = {}
    of: dict[str, str] = {}
    strays, empty = [], []
    for text in texts:
        stem = _stem(text)
        owners = [by_name[stem]] if stem in by_name else by_stem[stem]
        if not owners:
            strays.append(text)
        elif len(owners) > 1:
            better = " or ".join(repr(owner + ".txt") for owner in owners)
            faults.append(f"{text!r} could belong to {' or '.join(map(repr, owners))}: name it {better}")
        elif owners[0] in of:
            faults.append(f"{owners[0]!r} has two captions, {of[owners[0]]!r} and {text!r}: keep one")
        else:
            of[owners[0]] = text
            try:
                caption = _read_caption(text, names[text])
            except ValueError as fault:
                faults.append(str(fault))
                continue
            if caption:
                captions[owners[0]] = caption
            else:
                empty.append(text)
    if faults:
        raise ValueError("\n".join(["input_images: the files cannot be used:", *(f"  {fault}" for fault in faults)]))

    warnings = []
    if strays:
        warnings.append(f"captions without a picture beside them, not used: {_some(strays)}")
    if empty:
        warnings.append(f"empty captions, treated as missing: {_some(empty)}")
    return [Photo(name=name, path=names[name], caption=captions.get(name)) for name in pictures], warnings


def _read_caption(name: str, path: Path) -> str:
    """The text without byte-order mark, control characters and blanks at its ends, with plain line ends."""
    with open(path, "rb") as file:
        data = file.read(MAX_CAPTION_BYTES + 1)
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"{name!r} is longer than {MAX_CAPTION_BYTES:,} bytes, too long for a caption: shorten it")
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Windows' Notepad can save
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name!r} is not UTF-8 text: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{name!r} holds NUL characters, so it is not UTF-8 text: save it as UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # What drives a terminal when the log shows it, and what no tokenizer knows
    return "".join(" " if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text).strip()


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.casefold()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")).casefold()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
