"""Whose pictures are whose, where one LoRA learns several subjects: by the folders that they lie in."""

import dataclasses
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from lora.pictures.captions import some
from lora.pictures.photos import Photo

_REPEATS = re.compile(r"[1-9]\d{0,2}_")
"""Kohya's, in front of a folder's word."""


def share_out(photos: Sequence[Photo], words: Sequence[str]) -> tuple[list[Photo], list[str]]:
    """The photos, each with its own trigger word as `word`, and what the user should know of it, a line each.

    One trigger word is that of all, wherever they lie. Of several it is the one whose folder a photo lies in: `ANNA/`,
    in any case, or kohya's `10_ANNA woman`, whose noun is kept as `class_noun`. Raises ValueError, with the folders and
    the words, where a photo lies in no word's folder or a word has no photo.
    """
    if len(words) == 1:
        named = sorted({f"{photo.word} {photo.class_noun or ''}".strip() for photo in photos if photo.word})
        told = f"words in folders' names are not used, because trigger_word is: {some(named)}"
        return [dataclasses.replace(photo, word=words[0], class_noun=None) for photo in photos], [told] * bool(named)
    found = [
        dataclasses.replace(photo, word=word, class_noun=noun) for photo in photos for word, noun in [_of(photo, words)]
    ]
    count = Counter(photo.word for photo in found)
    lost = Counter(posixpath.dirname(photo.name) or "(no folder)" for photo in found if photo.word is None)
    empty = [word for word in words if not count[word]]
    if lost or empty:
        faults = [f"there is no folder for {some(empty)}"] if empty else []
        faults += [f"pictures lie in folders of other names: {some(sorted(lost))}"] if lost else []
        raise ValueError(
            f"input_images: trigger_word has {len(words)} words, {some(words)}, and each picture must lie in a folder"
            f" named after one of them, but {' and '.join(faults)}; rename the folders, or give one trigger_word"
        )
    nouns = {word: {photo.class_noun for photo in found if photo.word == word} for word in words}
    told = ", ".join(f"{word} {count[word]}" for word in words)
    return [
        photo if len(nouns[photo.word or ""]) == 1 else dataclasses.replace(photo, class_noun=None) for photo in found
    ], [f"subjects by folders' names, with their pictures: {told}"]


def _of(photo: Photo, words: Sequence[str]) -> tuple[str | None, str | None]:
    """The word and class noun of the innermost folder that is called as one of the words."""
    for folder in reversed(PurePosixPath(photo.name).parts[:-1]):
        called = _REPEATS.sub("", folder, count=1).strip()
        for word in sorted(words, key=len, reverse=True):
            if any(_plain(name) == _plain(word) for name in (folder, called)):
                return word, None
            if _plain(called).startswith(f"{_plain(word)} "):
                return word, called[len(word) :].strip() or None
    return None, None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
