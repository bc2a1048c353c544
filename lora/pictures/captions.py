"""What users wrote about their pictures: `.txt` and `.caption` files, tables, and which text is whose.

A text file belongs to the picture of its name in its own folder; else to the one of its name in another folder, where
there is one that is nearest. A table (`metadata.jsonl` as Hugging Face's image folders have it, or a CSV file) names
its pictures itself.
"""

import codecs
import csv
import io
import json
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora.pictures import kinds, limits

TEXTS = frozenset({".txt", ".caption"})
TABLES = frozenset({".jsonl", ".csv", ".tsv"})
"""Suffixes in lower case."""

FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_file", "image_path", "path", "name")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "description")
"""A table's columns, the first that is there counts; `file_name` and `text` are Hugging Face's
(huggingface.co/docs/datasets/image_dataset)."""

_DOCUMENTS = frozenset(
    {"readme", "read me", "license", "licence", "copying", "notice", "credits", "attribution", "changelog", "about"}
    | {"info", "note", "notes", "instructions", "prompts_and_classes"}
)
"""Stems of texts that people pack without meaning a caption."""
_SHOWN = 20


@dataclass(kw_only=True)
class Captions:
    """What was read."""

    of: dict[str, str] = field(default_factory=dict)
    """Picture -> caption, not empty."""
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(pictures: Sequence[str], texts: Mapping[str, Path], tables: Mapping[str, Path]) -> Captions:
    """The captions of pictures. All names are those in the archive, with folders joined by `/`.

    Faults: a text for two pictures, two texts for one, a text that is not Unicode or longer than MAX_CAPTION_BYTES, a
    table that cannot be read, and captions of which not one has the name of a picture.
    """
    told = Captions()
    by_name, strays = _owners(pictures, texts, told)
    used = len(by_name)
    written: dict[str, list[tuple[str, str]]] = defaultdict(list)  # picture -> (where, text)
    for text, picture in by_name.items():
        try:
            caption = read_text(text, texts[text])
        except ValueError as fault:
            told.faults.append(str(fault))
        else:
            written[picture].append((text, caption))
    lost, index = [], Index(pictures)
    for table, path in tables.items():
        try:
            rows = read_table(table, path)
        except ValueError as fault:
            told.faults.append(str(fault))
            continue
        for file, caption in rows:
            found = index.find(posixpath.join(posixpath.dirname(table), file.replace("\\", "/")))
            if len(found) == 1:
                used += 1
                written[found[0]].append((table, caption))
            else:
                lost.append(f"{shown(file)} in {table!r}")
    empty = []
    for picture, given in sorted(written.items()):
        if len({caption for _, caption in given}) > 1:
            told.faults.append(f"{picture!r} has two captions, {given[0][0]!r} and {given[1][0]!r}: keep one")
        elif given[0][1]:
            told.of[picture] = given[0][1]
        else:
            empty.append(given[0][0])
    meant = [text for text in strays if PurePosixPath(text).stem.casefold() not in _DOCUMENTS]
    if pictures and not used and not told.faults and (meant or lost):
        first = meant[0] if meant else lost[0]
        told.faults.append(
            f"captions are there, but not one has the name of a picture: {some(meant, 5) if meant else some(lost, 5)};"
            f" the pictures are called {some(pictures, 5)}. Name each as its picture, such as"
            f" {str(PurePosixPath(pictures[0]).with_suffix('.txt'))!r}, or leave {shown(first)} out"
        )
    elif strays:
        told.notes.append(f"captions without a picture beside them, not used: {some(strays)}")
    if lost and used:
        told.notes.append(f"captions in a table for pictures that are not there, not used: {', '.join(lost[:_SHOWN])}")
    if empty:
        told.notes.append(f"empty captions, treated as missing: {some(empty)}")
    return told


def _owners(pictures: Sequence[str], texts: Iterable[str], told: Captions) -> tuple[dict[str, str], list[str]]:
    """Text file -> the picture whose name it has; and the texts without one."""
    of: dict[str, str] = {}
    index, alone = Index(pictures), []
    for text in sorted(texts):
        owners = index.beside(bare(text))
        if len(owners) == 1:
            of[text] = owners[0]
        elif owners:
            told.faults.append(_for_two(text, owners))
        else:
            alone.append(text)
    busy = {posixpath.dirname(text) for text in of}
    free = Index(set(pictures) - set(of.values()))
    strays, far = [], []
    for text in alone:
        # A folder whose other captions lie beside their pictures holds those of pictures that were taken out
        owners = [] if posixpath.dirname(text) in busy else free.find(bare(text))
        if len(owners) == 1:
            of[text] = owners[0]
            far.append(text)
        elif owners:
            told.faults.append(_for_two(text, owners))
        else:
            strays.append(text)
    if far:
        told.notes.append(
            f"captions in another folder than their pictures, matched by name: {len(far)}, such as {far[0]!r} for"
            f" {of[far[0]]!r}"
        )
    return of, strays


def _for_two(text: str, owners: Sequence[str]) -> str:
    better = " or ".join(repr(owner + ".txt") for owner in owners)
    return f"{text!r} could belong to {' or '.join(map(repr, owners))}: name it {better}"


class Index:
    """Finds pictures by name, with or without their suffix, in any case (see `key`)."""

    def __init__(self, pictures: Iterable[str]) -> None:
        self._paths: dict[str, list[str]] = defaultdict(list)
        self._names: dict[str, list[str]] = defaultdict(list)
        for picture in sorted(pictures):
            for path in dict.fromkeys((picture, bare(picture))):
                self._paths[key(path)].append(picture)
                self._names[key(posixpath.basename(path))].append(picture)

    def beside(self, name: str) -> list[str]:
        """The pictures in this name's folder that have this name with its suffix, or else without it."""
        return _best(name, self._paths.get(key(name), []))

    def find(self, name: str) -> list[str]:
        """The pictures of this name beside it; else those of this name in the nearest folder, which may be several."""
        name = posixpath.normpath(name)
        if found := self.beside(name):
            return found
        last, folder = posixpath.basename(name), posixpath.dirname(name)
        found = _best(last, self._names.get(key(last), []))
        nearness = [_shared(folder, posixpath.dirname(picture)) for picture in found]
        return [picture for picture, near in zip(found, nearness, strict=True) if near == max(nearness)]


def _best(name: str, found: list[str]) -> list[str]:
    """Those with this whole name, suffix and all, where there are any."""
    last = key(posixpath.basename(name))
    return [picture for picture in found if key(posixpath.basename(picture)) == last] or found


def _shared(one: str, other: str) -> int:
    """How many folders two paths share, at their beginning and at their end."""
    a, b = key(one).split("/"), key(other).split("/")
    return len(posixpath.commonprefix([a, b])) + len(posixpath.commonprefix([a[::-1], b[::-1]]))


def bare(name: str) -> str:
    """The name without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def key(name: str) -> str:
    """A name for comparing: in lower case where it is ASCII. Elsewhere case counts, for the letters may be a guess (see
    `codepage.py`), and of a wrong one only the bytes behind it are sure."""
    return "/".join(
        ".".join(piece.casefold() if piece.isascii() else piece for piece in part.split("."))
        for part in unicodedata.normalize("NFC", name).split("/")
    )


def read_text(name: str, path: Path) -> str:
    """A caption file's text without byte-order mark, control characters and blanks at its ends, with plain line ends.

    Raises ValueError that names it where it is too long, or no plain text.
    """
    return _clean(name, _decoded(name, path, limits.MAX_CAPTION_BYTES, "too long for a caption: shorten it"))


def read_table(name: str, path: Path) -> list[tuple[str, str]]:
    """(file name as given, caption) of each row that has both. Raises ValueError that names the table and the line."""
    content = _decoded(name, path, limits.MAX_TABLE_BYTES, "too long for a table of captions")
    rows = _rows_of_json(name, content) if name.casefold().endswith(".jsonl") else _rows_of_csv(name, content)
    return [(file, _clean(f"{name}, {file[:100]}", text)) for file, text in rows]


def _rows_of_json(name: str, content: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{name!r}, line {number}, is no JSON: write an object on each line") from None
        row = {str(k).casefold(): v for k, v in row.items()} if isinstance(row, dict) else {}
        file = next((row[column] for column in FILE_COLUMNS if column in row), None)
        text = next((row[column] for column in TEXT_COLUMNS if column in row), None)
        if not isinstance(file, str) or not isinstance(text, str | None):
            raise ValueError(f'{name!r}, line {number}: write {{"file_name": "a.jpg", "text": "its caption"}}')
        yield file, text or ""


def _rows_of_csv(name: str, content: str) -> Iterator[tuple[str, str]]:
    """Of a CSV file with commas, semicolons (as Excel writes in much of Europe) or tabs, and a line of headings."""
    for delimiter in ",;\t":
        try:
            rows = list(csv.reader(io.StringIO(content), delimiter=delimiter))
        except csv.Error as error:
            raise ValueError(f"{name!r} cannot be read as a table: {error}") from None
        headings = [heading.strip().casefold() for heading in rows[0]] if rows else []
        file = next((headings.index(column) for column in FILE_COLUMNS if column in headings), None)
        text = next((headings.index(column) for column in TEXT_COLUMNS if column in headings), None)
        if file is not None and text is not None:
            yield from ((row[file].strip(), row[text]) for row in rows[1:] if len(row) > max(file, text) and row[file])
            return
    raise ValueError(f"{name!r}: a table of captions needs the headings file_name and text in its first line")


def _decoded(name: str, path: Path, most: int, advice: str) -> str:
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name!r} is longer than {most:,} bytes, {advice}")
    if found := kinds.kind(data[: kinds.HEAD]):
        raise ValueError(f"{name!r} is a {found}, not plain text: save it as plain text in UTF-8")
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Windows' Notepad can save
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name!r} is not UTF-8 text: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{name!r} holds NUL characters, so it is not UTF-8 text: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _clean(name: str, text: str) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > limits.MAX_CAPTION_BYTES:
        most = f"{limits.MAX_CAPTION_BYTES:,} bytes"
        raise ValueError(f"{name!r} is longer than {most}, too long for a caption: shorten it")
    # What drives a terminal when the log shows it, and what no tokenizer knows
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text).strip()


def shown(name: str) -> str:
    return repr(name if len(name) <= 150 else name[:150] + "…")


def some(names: Sequence[str], most: int = _SHOWN) -> str:
    """The first of the names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more
