"""Files become photos: which are pictures, which masks, which are left out, and what folders' names say.

Covered: captions (`captions.py` reads them), masks beside their pictures, regularisation pictures, which are no
pictures of the subject, the side files of phones' backups, and kohya's folder names. Not covered: what a picture shows
(`survey.py` looks at that).
"""

import dataclasses
import json
import math
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora.pictures import captions, kinds
from lora.pictures.captions import Index, bare, some

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".heic", ".heif", ".hif"}
)
"""What `buckets.read_picture` reads, in lower case; a file with another suffix is a picture by its bytes."""

_KINDS = "JPEG, PNG, WebP, AVIF, HEIC, BMP, TIFF or GIF"

REGULARISATION = re.compile(
    r"(\d+[_ ])?(regs?|reg[_-].+|regulari[sz]ation.*"
    r"|(reg|class|prior)[_ -]?(im(age|g)s?|pictures?|photos?|data|set|dir))"
)
"""Folders of pictures of the class and not of the subject, as kohya's scripts (`reg`), EveryDream, diffusers' example
(`class_images`) and their guides call them."""
_MASK_ENDING = re.compile(r"(?P<of>.+?)(?P<sure>\.mask|[._ -]masklabel)|(?P<of2>.+?)[_ -]mask", re.IGNORECASE)
_MASK_FOLDERS = frozenset({"mask", "masks", "masklabel", "masklabels"})
_KOHYA_FOLDER = re.compile(r"([1-9]\d{0,2})_(\S.*)")
_MAX_SIDE_FILE = 2**20
_PHONE_KEYS = frozenset({"phototakentime", "creationtime", "geodata", "googlephotosorigin", "imageviews", "albumdata"})
"""Of the JSON files that Google's Takeout lays beside pictures."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A picture and the user's own text for it."""

    name: str
    """Its name in the archive, with folders joined by `/`; unique."""
    path: Path
    """Where it lies now."""
    caption: str | None
    """What the user wrote for it, unchanged but for its ends; None where there is nothing or it is empty."""
    mask: Path | None = None
    """A picture of what to learn in it (white), of any size and kind that `buckets.read_picture` reads."""
    repeats: int = 1
    """Of kohya's folder name `10_ANNA woman`: 10, how often its pictures come, beside those of other folders."""
    word: str | None = None
    class_noun: str | None = None
    """Of the same: `ANNA` and `woman`; a name of one word is the word."""


def pair(folder: Path, files: Sequence[Path]) -> tuple[list[Photo], list[str]]:
    """Pair the pictures among `files`, which lie below `folder`, with their captions and masks: photos sorted by name,
    and what the user should know of what was left out, found or decided, a line each.

    A caption lies in its picture's folder as `a.txt`, `a.caption` or `a.jpg.txt` for `a.jpg`, in any case; or in
    another folder by the same name; or in a table (`captions.py`). A mask is called `a.mask.png`, `a_mask.jpg` or
    `a-masklabel.png`, or lies in a folder `masks`.

    Raises ValueError with all faults at once: unknown kinds of file, those of `captions.read`, a mask for two pictures,
    two masks for one, no pictures at all.
    """
    names = {file.relative_to(folder).as_posix(): file for file in files}
    notes: list[str] = []
    faults: list[str] = []
    apart = sorted(name for name in names if _is_regularisation(name))
    if apart:
        shown = some(sorted({posixpath.dirname(name) for name in apart}))
        notes.append(f"{_count(apart)} of regularisation pictures left out, they do not show the subject: {shown}")
    kept = sorted(set(names) - set(apart))
    pictures = [name for name in kept if _is_picture(name, names[name])]
    texts = [name for name in kept if _suffix(name) in captions.TEXTS]
    tables = [name for name in kept if _suffix(name) in captions.TABLES and not _is_of_icloud(name)]
    others = sorted({*kept} - {*pictures, *texts, *tables})
    stems = {stem.casefold() for picture in pictures for stem in (picture, bare(picture))}
    side = [name for name in others if _is_of_icloud(name) or _is_side_file(name, names[name], stems)]
    if side:
        notes.append(f"{_count(side)} that a phone's backup keeps beside its pictures left out: {some(side, 3)}")
    faults += _unknown({name: names[name] for name in others if name not in side})

    pictures, masks = _masks(pictures, notes, faults)
    if not pictures:
        found = Counter(_suffix(name) or "without a suffix" for name in names)
        seen = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.items())) or "no files at all"
        left = " (regularisation pictures do not count: rename their folder if they show the subject)" if apart else ""
        faults.append(f"no pictures ({_KINDS}) in the archive; it holds {seen}{left}")
    read = captions.read(pictures, {text: names[text] for text in texts}, {table: names[table] for table in tables})
    faults += read.faults
    if faults:
        raise ValueError("\n".join(["input_images: the files cannot be used:", *(f"  {fault}" for fault in faults)]))
    paired = []
    for name in pictures:
        repeats, word, class_noun = _kohya(name)
        mask = names[masks[name]] if name in masks else None
        photo = Photo(name=name, path=names[name], caption=read.of.get(name), mask=mask)
        paired.append(dataclasses.replace(photo, repeats=repeats, word=word, class_noun=class_noun))
    return paired, [*notes, *read.notes, *_told_of_folders(paired)]


def weights(photos: Sequence[Photo]) -> dict[str, int]:
    """How often each photo (by name) is trained beside the others: their repeats, as small as they go. All 1 where the
    repeats are equal."""
    divisor = math.gcd(*(photo.repeats for photo in photos)) or 1
    return {photo.name: photo.repeats // divisor for photo in photos}


def _is_regularisation(name: str) -> bool:
    return any(REGULARISATION.fullmatch(part.casefold()) for part in PurePosixPath(name).parts[:-1])


def _is_picture(name: str, path: Path) -> bool:
    """By its suffix, or where that says nothing, as of downloads called `photo` or `a.jpg_large`, by its bytes."""
    suffix = _suffix(name)
    if suffix in PICTURE_SUFFIXES:
        return True
    return suffix not in captions.TEXTS | captions.TABLES and _kind(path) in kinds.CERTAIN


def _is_of_icloud(name: str) -> bool:
    """Whether it is one of the tables that Apple lays beside the pictures of an account that is taken out."""
    return re.fullmatch(r"photo details.*\.csv", posixpath.basename(name).casefold()) is not None


def _is_side_file(name: str, path: Path, pictures: Collection[str]) -> bool:
    """Whether a JSON file is what a phone's backup keeps of a picture or an album: by its name, which is its picture's
    with something behind it, or by the facts in it."""
    name = name.casefold()
    if not name.endswith(".json"):
        return False
    if any(letter in ".(" and name[:at] in pictures for at, letter in enumerate(name)):
        return True
    try:
        with open(path, "rb") as file:
            facts = json.loads(file.read(_MAX_SIDE_FILE))
    except (ValueError, RecursionError):
        return False
    return isinstance(facts, dict) and any(str(fact).casefold() in _PHONE_KEYS for fact in facts)


def _unknown(files: Mapping[str, Path]) -> list[str]:
    """What is wrong with files that are neither picture nor caption, a line for each kind."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name, path in files.items():
        by_kind[_kind(path)].append(name)
    faults = []
    for kind, names in sorted(by_kind.items()):
        if kind.endswith("archive"):
            faults.append(f"a {kind} in the archive, unpack it and pack the pictures themselves: {some(names)}")
        elif kind == "film":
            faults.append(f"a film, leave it out or save some of its frames as pictures: {some(names)}")
        elif kind == "RTF document":
            faults.append(f"rich text (RTF), save captions as plain text, .txt: {some(names)}")
        else:
            told = f"a {kind}, " if kind and kind not in kinds.PICTURES else ""
            faults.append(f"{told}not a picture ({_KINDS}) and not a .txt caption, leave out or convert: {some(names)}")
    return faults


def _masks(pictures: Sequence[str], notes: list[str], faults: list[str]) -> tuple[list[str], dict[str, str]]:
    """The pictures that are no masks, and the mask of each that has one.

    What is called like a mask of no picture here is a picture (`gas_mask.jpg`), unless others are masks in the same
    manner: then it is left out, for its picture may just be missing.
    """
    called = {name: of for name in pictures if (of := _mask_of(name))}
    index = Index(set(pictures) - set(called))
    found: dict[str, str] = {}
    alone = []
    for mask, of in called.items():
        owners = index.find(of)
        if len(owners) > 1:
            faults.append(f"the mask {mask!r} could belong to {' or '.join(map(repr, owners))}")
        elif not owners:
            alone.append(mask)
        elif owners[0] in found:
            faults.append(f"{owners[0]!r} has two masks, {found[owners[0]]!r} and {mask!r}: keep one")
        else:
            found[owners[0]] = mask
    lost = [mask for mask in alone if found or _is_sure(mask)]
    taken = [mask for mask in alone if mask not in lost]
    if found:
        owner, mask = next(iter(found.items()))
        notes.append(
            f"{_count(list(found.values()), 'mask')} found, such as {mask!r} for {owner!r}; what is black in one"
            " counts a tenth of what is white"
        )
    if lost:
        notes.append(f"masks without their picture, left out: {some(lost)}")
    if taken:
        notes.append(f"named like a mask, but no picture has its name, so trained as a picture: {some(taken)}")
    return sorted({*pictures} - {*found.values()} - {*lost}), found


def _mask_of(name: str) -> str:
    """The name of the picture that a file of this name is a mask of, or "" where it is not called like a mask."""
    match = _MASK_ENDING.fullmatch(posixpath.basename(bare(name)))
    last = (match["of"] or match["of2"]) if match else ""
    folders = posixpath.dirname(name)
    if any(part.casefold() in _MASK_FOLDERS for part in folders.split("/")):
        last = last or posixpath.basename(bare(name))
    return posixpath.join(folders, last) if last else ""


def _is_sure(name: str) -> bool:
    match = _MASK_ENDING.fullmatch(posixpath.basename(bare(name)))
    return bool(match and match["sure"])


def _kohya(name: str) -> tuple[int, str | None, str | None]:
    """Repeats, word and class noun of the folder that a picture lies in, as kohya's sd-scripts name it
    (docs/train_README.md there): `10_ANNA woman`. 1, None, None of any other."""
    match = _KOHYA_FOLDER.fullmatch(posixpath.basename(posixpath.dirname(name)))
    if not match:
        return 1, None, None
    word, _, class_noun = match[2].strip().partition(" ")
    return int(match[1]), word, class_noun.strip() or None


def _told_of_folders(photos: Sequence[Photo]) -> list[str]:
    folders = {posixpath.dirname(photo.name): photo for photo in photos if photo.word is not None}
    if not folders:
        return []
    often = weights(photos)
    lines = []
    if len(set(often.values())) > 1:
        shares = sorted({(posixpath.dirname(photo.name), often[photo.name]) for photo in photos})
        told = ", ".join(f"{captions.shown(folder)} {times}" for folder, times in shares[:20])
        lines.append(f"repeats by folders' names, as in kohya's scripts: pictures are trained in the ratio {told}")
    else:
        repeats = next(iter(folders.values())).repeats
        lines.append(
            f"repeats by folders' names are {repeats} for every picture, which changes nothing: training_steps sets"
            " how long is trained"
        )
    return lines


def _kind(path: Path) -> str:
    with open(path, "rb") as file:
        return kinds.kind(file.read(kinds.HEAD))


def _count(names: Sequence[str], what: str = "file") -> str:
    return f"{len(names)} {what}{'s' * (len(names) != 1)}"


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.casefold()
