"""The names in an archive: read from their bytes, made safe paths of, kept apart; and which of them are junk."""

import contextlib
import hashlib
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from lora.pictures import codepage, limits

_COMPONENT_BYTES = 200  # of one name on disk: file systems allow 255, and names made from it may be longer
_JUNK_NAMES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin"}
_JUNK_SUFFIXES = (".aae", ".xmp", ".thm")  # edits and thumbnails that cameras and programs keep beside a picture


class BadEntry(ValueError):
    """A fault of one entry; the others can still be read, so that all faults come in one message."""


def is_junk(name: str) -> bool:
    """Whether an archive name (parts joined by `/`) is a hidden or system file, which nobody means to send."""
    name = name.casefold()
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return name.endswith(_JUNK_SUFFIXES) or any(part.startswith(".") or part in _JUNK_NAMES for part in parts)


@dataclass(frozen=True, kw_only=True)
class Name:
    """A name as an archive gives it."""

    text: str
    guessed: bool
    """Whether the archive does not say what its bytes mean: then letters of another case are other letters, for what
    looks like an `a` and an `A` may be halves of letters that have no case."""


def parts(given: Name) -> list[str]:
    """An archive name as safe path parts: NFC, `\\` as `/` (old Windows zips), no part that could leave the folder."""
    name = given.text.replace("\\", "/")
    name = name if given.guessed else unicodedata.normalize("NFC", name)
    if "\0" in name:
        raise BadEntry("has a NUL in its name")
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        raise BadEntry("is an absolute path: pack the files by relative names")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BadEntry("leaves the archive by '..'")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name) and not is_junk(name):
        raise BadEntry("has a control character in its name")
    parts = [_shortened(part) for part in parts]
    if len("/".join(parts).encode("utf-8", "surrogatepass")) > limits.MAX_NAME_BYTES:
        raise BadEntry(f"has a name longer than {limits.MAX_NAME_BYTES:,} bytes")
    return parts


def _shortened(part: str) -> str:
    """A part too long for a file system, cut and marked by a hash of its stem; `x.jpg` and `x.txt` still match."""
    if len(part.encode("utf-8", "surrogatepass")) <= _COMPONENT_BYTES:
        return part
    stem, suffix = re.fullmatch(r"(.*?)((?:\.\w{1,5}){0,2})", part, re.DOTALL | re.ASCII).groups()  # type: ignore[union-attr]
    mark = "~" + hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    room = _COMPONENT_BYTES - len(mark) - 12
    return stem.encode("utf-8", "surrogatepass")[:room].decode("utf-8", "ignore") + mark + suffix


class Taken:
    """The names taken so far, as a file system sees them that folds case and Unicode's forms; guessed names as they
    are."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.folders: dict[str, str] = {}

    def claim(self, name: Name, parts: list[str]) -> None:
        """Take a name, unless another entry has it, or it is a file's where a folder must be, or the reverse."""
        if not parts:
            raise BadEntry("has no name")
        keys = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        *above, whole = keys if name.guessed else map(_folded, keys)
        other = next((self.files[key] for key in [whole, *above] if key in self.files), self.folders.get(whole))
        if other is not None:
            raise BadEntry(f"and {shown(other)} are two entries that become one name: rename one of them")
        self.files[whole] = name.text
        if len(self.files) > limits.MAX_FILES:
            raise ValueError(f"more than {limits.MAX_FILES:,} files. Send fewer pictures.")
        self.folders.update((key, name.text) for key in above)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def of_zip(infos: Sequence[zipfile.ZipInfo]) -> list[Name]:
    """The whole names as stored (`zipfile` cuts them at a NUL).

    Without the UTF-8 flag the bytes are cp437 by the specification (APPNOTE, appendix D), yet macOS and others write
    UTF-8 there, Windows the code page of its language, and WinRAR or 7-Zip put the UTF-8 name into an extra field of
    type 0x7075 (APPNOTE 4.6.9).
    """
    flagged = {
        i: Name(text=info.orig_filename, guessed=False) for i, info in enumerate(infos) if info.flag_bits & 0x800
    }
    others = [i for i in range(len(infos)) if i not in flagged]
    read = dict(zip(others, of_bytes([_zip_bytes(infos[i]) for i in others]), strict=True))
    return [flagged.get(i) or read[i] for i in range(len(infos))]


def _zip_bytes(info: zipfile.ZipInfo) -> bytes:
    raw = info.orig_filename.encode("cp437")
    extra = info.extra
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 0x7075 and extra[4:9] == b"\1" + struct.pack("<I", zlib.crc32(raw)):
            raw = extra[9 : 4 + length]
        extra = extra[4 + length :]
    return raw


def of_bytes(raw: Sequence[bytes]) -> list[Name]:
    """Names in UTF-8; those that are not, in one code page for all of them, guessed (`codepage.py`)."""
    found = {}
    for i, name in enumerate(raw):
        with contextlib.suppress(UnicodeDecodeError):
            found[i] = Name(text=name.decode("utf-8"), guessed=False)
    others = [i for i in range(len(raw)) if i not in found]
    for i, text in zip(others, codepage.decode([raw[i] for i in others]), strict=True):
        found[i] = Name(text=text, guessed=True)
    return [found[i] for i in range(len(raw))]


def shown(name: str) -> str:
    return repr(name if len(name) <= 150 else name[:150] + "…")
