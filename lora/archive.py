"""The archive that comes in (zip, tar or tar.gz, told apart by their bytes) and the tar that goes out.

Archives come from strangers, so nothing an archive says of itself is believed: sizes are counted while reading, names
are checked before anything is written, and only plain files are ever made. Covered: path tricks, links and devices,
encrypted entries, names that collide, bombs, cut and damaged archives, and the junk that phones and desktops add.
Not covered: what lies inside the files (`photos.py` reads the captions, `buckets.py` the pictures).
"""

import errno
import hashlib
import os
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

# Every limit on what a user may send. Sizes are in bytes and are enforced while reading.
MAX_FILES = 2_000
"""Files in one archive, junk not counted."""
MAX_ENTRIES = 20_000
"""Entries of any kind in one archive: files, folders, junk, headers."""
MAX_BYTES = 4 * 2**30
"""All files together, unpacked."""
MAX_RATIO = 100
"""Bytes out for each byte in, for an entry larger than RATIO_FROM."""
RATIO_FROM = 10 * 2**20
MAX_NAME_BYTES = 1_000
"""One name with its folders, in UTF-8."""
MAX_PIXELS = 100_000_000
"""One picture; `buckets.py` enforces it."""
MAX_CAPTION_BYTES = 10_000
"""One caption file; `photos.py` enforces it."""

_MAX_HEADER = 4 * 2**20  # a zip's whole directory, or one tar header: far more than MAX_FILES honest names need
_CHUNK = 2**20
_COMPONENT_BYTES = 200  # of one name on disk: file systems allow 255, and names made from it may be longer
_FAULTS_SHOWN = 20

_JUNK_NAMES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin"}
_JUNK_SUFFIXES = (".aae", ".xmp")  # edits that phones and photo programs keep beside a picture


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip, tar or tar.gz into `folder`, which is new or empty; return the files, sorted by name.

    A file's path below `folder` is its name in the archive, in Unicode's NFC, a part of it shortened where it is too
    long for a file system. Junk (see `is_junk`) is left out. Nothing is written outside `folder`; after an error or a
    cancel `folder` is half filled, and whoever made it removes it.

    Raises ValueError that names the entries and the limit: bad names, links, devices, encrypted and damaged entries all
    in one message; a limit that is passed ends the reading at once. A full disk is an OSError that says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert not any(folder.iterdir()), f"{folder} must be empty"
    with open(archive, "rb") as file:
        source = _Counted(file)
        return sorted(_write(_entries(source), folder, source))


def is_junk(name: str) -> bool:
    """Whether an archive name (parts joined by `/`) is a hidden or system file, which nobody means to send."""
    parts = [part for part in name.casefold().split("/") if part not in ("", ".")]
    return any(part.startswith(".") or part in _JUNK_NAMES for part in parts) or name.casefold().endswith(_JUNK_SUFFIXES)


def pack(members: Mapping[str, Path], tar: Path) -> None:
    """Write an uncompressed tar of the given files under the given member names: the same bytes for the same files.

    Sorted by name; time 0, user and group 0, mode 0644. Written beside `tar` and moved into place when complete, so
    that `tar` is never seen half written.
    """
    aside = tar.with_name(tar.name + ".part")
    try:
        with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as out:
            for name in sorted(members):
                with open(members[name], "rb") as file:
                    info = tarfile.TarInfo(name)
                    info.size = os.fstat(file.fileno()).st_size
                    out.addfile(info, file)
        os.replace(aside, tar)
    finally:
        aside.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One thing in an archive: its name as given, why it may not be taken (or ""), and its bytes, read when asked."""

    name: str
    is_folder: bool
    fault: str
    chunks: Callable[[], Iterator[bytes]]


class _BadEntry(ValueError):
    """A fault of one entry; the others can still be read, so that all faults come in one message."""


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Counted:
    """A file that counts the bytes read from it, and refuses to read a giant block at once.

    `zipfile` reads the directory of a zip in one call, of whatever size the zip claims.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.count = 0
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_HEADER:
            raise ValueError(f"input_images: the archive's directory claims {size:,} bytes, more than {_MAX_HEADER:,}.")
        data = self.file.read(_MAX_HEADER if size < 0 else size)
        self.count += len(data)
        return data


def _write(entries: Iterable[_Entry], folder: Path, source: _Counted) -> Iterator[Path]:
    """Write each entry that is a file and no junk below `folder`, counting; yield its path. Raise the faults at last."""
    faults: list[str] = []
    taken: dict[str, str] = {}  # what a name becomes on a disk that folds case -> the name as given
    folders: dict[str, str] = {}
    files = total = 0
    for seen, entry in enumerate(entries, start=1):
        if seen > MAX_ENTRIES:
            raise ValueError(f"input_images: more than {MAX_ENTRIES:,} entries. Send only the pictures and captions.")
        try:
            parts = _parts(entry.name)
            if is_junk("/".join(parts)) or (entry.is_folder and not entry.fault):
                continue
            if entry.fault:
                raise _BadEntry(entry.fault)
            files += 1
            if files > MAX_FILES:
                raise ValueError(f"input_images: more than {MAX_FILES:,} files. Send fewer pictures.")
            _claim(entry.name, parts, taken, folders)
            path = folder.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            before, size = source.count, 0
            with open(path, "xb") as out:
                for chunk in entry.chunks():
                    size += len(chunk)
                    total += len(chunk)
                    if total > MAX_BYTES:
                        raise ValueError(
                            f"input_images: more than {MAX_BYTES / 2**30:g} GiB unpacked, passed at {entry.name!r}. "
                            "Send fewer or smaller pictures."
                        )
                    if size > RATIO_FROM and size > MAX_RATIO * (source.count - before):
                        raise ValueError(
                            f"input_images: {entry.name!r} unpacks to more than {MAX_RATIO} times its size in the "
                            f"archive. Entries over {RATIO_FROM / 2**20:g} MiB may not: save the picture as PNG or JPEG."
                        )
                    out.write(chunk)
            yield path
        except _BadEntry as fault:
            faults.append(f"{entry.name!r} {fault}")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            message = f"the disk is full, at {entry.name!r} after {total:,} bytes: free space or send a smaller archive"
            raise OSError(errno.ENOSPC, message) from error
    if faults:
        raise ValueError(_listed("input_images: these entries of the archive cannot be used:", faults))


def _parts(name: str) -> list[str]:
    """An archive name as safe path parts: NFC, `\\` as `/` (old Windows zips), no part that could leave the folder."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    if "\0" in name:
        raise _BadEntry("has a NUL in its name")
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        raise _BadEntry("is an absolute path: pack the files by relative names")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _BadEntry("leaves the archive by '..'")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name) and not is_junk(name):
        raise _BadEntry("has a control character in its name")
    parts = [_shortened(part) for part in parts]
    if len("/".join(parts).encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise _BadEntry(f"has a name longer than {MAX_NAME_BYTES:,} bytes")
    return parts


def _shortened(part: str) -> str:
    """A part too long for a file system, cut and marked by a hash of its stem; `x.jpg` and `x.txt` still match."""
    if len(part.encode("utf-8", "surrogatepass")) <= _COMPONENT_BYTES:
        return part
    stem, suffix = re.fullmatch(r"(.*?)((?:\.\w{1,5}){0,2})", part, re.DOTALL | re.ASCII).groups()  # type: ignore[union-attr]
    mark = "~" + hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    room = _COMPONENT_BYTES - len(mark) - 12
    return stem.encode("utf-8", "surrogatepass")[:room].decode("utf-8", "ignore") + mark + suffix


def _claim(name: str, parts: list[str], taken: dict[str, str], folders: dict[str, str]) -> None:
    """Note the name, and refuse one that another entry has on a file system which folds case or Unicode forms."""
    keys = [_folded("/".join(parts[:depth])) for depth in range(1, len(parts) + 1)]
    if not keys:
        raise _BadEntry("has no name")
    other = taken.get(keys[-1]) or folders.get(keys[-1]) or next((taken[key] for key in keys if key in taken), None)
    if other is not None:
        raise _BadEntry(f"and {other!r} are two entries that become one name: rename one of them")
    taken[keys[-1]] = name
    folders.update((key, name) for key in keys[:-1])


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _entries(source: _Counted) -> Iterator[_Entry]:
    """The entries of whatever kind of archive this is, by its first bytes."""
    head = source.read(512)
    source.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return _tar_entries(_Gunzip(source), "tar.gz")
    if head.startswith(b"PK"):
        return _zip_entries(source)
    if _is_tar(head):
        return _tar_entries(source, "tar")
    if zipfile.is_zipfile(source):  # type: ignore[arg-type]  # something stands before the zip, as in a self-extractor
        source.seek(0)
        return _zip_entries(source)
    raise ValueError(f"input_images: must be a zip, tar or tar.gz of pictures, but {_what_it_is(head)}.")


def _what_it_is(head: bytes) -> str:
    kinds = {
        b"": "the file is empty",
        b"Rar!": "it is a RAR archive: pack the pictures as a zip",
        b"7z\xbc\xaf\x27\x1c": "it is a 7z archive: pack the pictures as a zip",
        b"BZh": "it is bzip2: pack the pictures as a zip",
        b"\xfd7zXZ": "it is xz: pack the pictures as a zip",
        b"\x28\xb5\x2f\xfd": "it is zstd: pack the pictures as a zip",
        b"\xff\xd8\xff": "it is one JPEG picture: put the pictures into a zip",
        b"\x89PNG": "it is one PNG picture: put the pictures into a zip",
        b"RIFF": "it is one media file: put the pictures into a zip",
        b"%PDF": "it is a PDF",
    }
    if re.match(rb"\s*(<!doctype|<html|<\?xml)", head, re.IGNORECASE):
        return "it is a web page: give a link to the file itself, not to a page that offers it"
    return next((what for magic, what in kinds.items() if magic and head.startswith(magic)), None) or (
        f"it starts with the bytes {head[:8]!r}" if head else kinds[b""]
    )


def _zip_entries(source: _Counted) -> Iterator[_Entry]:
    try:
        zipped = zipfile.ZipFile(source)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, EOFError, struct.error) as error:
        raise _damaged("zip", str(error)) from error
    for info in zipped.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = "is a link or a device: send the picture itself"
        elif info.flag_bits & 0x41:
            fault = "is encrypted: pack without a password"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # LZMA may claim gigabytes for its dictionary, and bzip2 has no bound on what one read gives
            fault = f"is compressed by zip method {info.compress_type}: pack with the ordinary one, deflate"
        else:
            fault = ""
        yield _Entry(
            name=_zip_name(info),
            is_folder=info.is_dir() or info.orig_filename.endswith("\\"),
            fault=fault,
            chunks=lambda info=info: _zip_chunks(zipped, info),  # type: ignore[misc]
        )


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The whole name as stored, which `zipfile` cuts at a NUL. Without the UTF-8 flag it is cp437 by the
    specification (APPNOTE 4.4.4, appendix D), yet macOS and many tools write UTF-8 there."""
    if info.flag_bits & 0x800:
        return info.orig_filename
    try:
        return info.orig_filename.encode("cp437").decode("utf-8")
    except UnicodeDecodeError:
        return info.orig_filename


def _zip_chunks(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with zipped.open(info) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise _BadEntry(f"is damaged ({error})") from error


class _Gunzip:
    """The bytes in a gzip file, a bounded piece at a time. Rubbish after the last stream, as some tools pad, is left."""

    def __init__(self, source: _Source) -> None:
        self.source = source
        self.packed = b""
        self.inflate = zlib.decompressobj(wbits=31)

    def read(self, size: int, /) -> bytes:
        while True:
            if self.inflate.eof:
                rest = self.inflate.unused_data + self.source.read(2)
                if not rest.startswith(b"\x1f\x8b"):
                    return b""
                self.packed, self.inflate = rest, zlib.decompressobj(wbits=31)
            self.packed = self.packed or self.source.read(2**16)
            if not self.packed:
                raise _damaged("tar.gz", "it ends in the middle")
            try:
                data = self.inflate.decompress(self.packed, size)
            except zlib.error as error:
                raise _damaged("tar.gz", str(error)) from error
            self.packed = self.inflate.unconsumed_tail
            if data:
                return data


def _is_tar(header: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _tar_entries(source: _Source, kind: str) -> Iterator[_Entry]:
    """The entries of a tar, in one pass forward (`tarfile` follows headers wherever they point, and takes a damaged
    header for the end). A long name comes in an entry of its own before the file: GNU's type L, or pax's x."""
    stream = _TarStream(source, kind)
    name = None
    while any(header := stream.exactly(512)):
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise _damaged(kind, str(error)) from error
        if info.size < 0:
            raise _damaged(kind, f"{info.name!r} claims {info.size} bytes")
        after = stream.at + -(-info.size // 512) * 512  # entries are padded to whole blocks
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if info.size > _MAX_HEADER:
                raise _damaged(kind, f"a header claims {info.size:,} bytes")
            record = stream.exactly(info.size)
            name = (_text(record.rstrip(b"\0")) if info.type == tarfile.GNUTYPE_LONGNAME else _pax_path(record)) or name
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
            yield _Entry(
                name=name or _text(info.name.encode("utf-8", "surrogateescape")),
                is_folder=info.isdir() or (plain and bool(name) and name.endswith("/")),
                fault="" if plain or info.isdir() else "is a link or a device: send the picture itself",
                chunks=lambda size=info.size: stream.chunks(size),  # type: ignore[misc]
            )
            name = None
        for _ in stream.chunks(after - stream.at):
            pass


class _TarStream:
    """Reads forward, in bounded pieces, and ends by an error where the archive does."""

    def __init__(self, source: _Source, kind: str) -> None:
        self.source, self.kind, self.at = source, kind, 0

    def chunks(self, size: int) -> Iterator[bytes]:
        while size:
            chunk = self.source.read(min(size, _CHUNK))
            if not chunk:
                raise _damaged(self.kind, "it ends in the middle")
            size -= len(chunk)
            self.at += len(chunk)
            if self.at > MAX_BYTES + MAX_ENTRIES * 1024:  # what is skipped counts too: it costs time
                raise ValueError(f"input_images: more than {MAX_BYTES / 2**30:g} GiB unpacked. Send fewer pictures.")
            yield chunk

    def exactly(self, size: int) -> bytes:
        return b"".join(self.chunks(size))


def _pax_path(record: bytes) -> str | None:
    """The path in a pax header, whose lines are `LENGTH KEY=VALUE\\n` with LENGTH counting the whole line (POSIX pax)."""
    path = None
    while match := re.match(rb"(\d{1,9}) ([^=\n]+)=", record):
        length = int(match[1])
        if match[2] == b"path":
            path = _text(record[match.end() : length - 1])
        if length < match.end():
            break
        record = record[length:]
    return path


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("cp437")


def _damaged(kind: str, why: str) -> ValueError:
    return ValueError(f"input_images: the {kind} is cut short or damaged ({why}). Pack and upload it again.")


def _listed(title: str, faults: list[str]) -> str:
    more = [f"… and {len(faults) - _FAULTS_SHOWN} more"] if len(faults) > _FAULTS_SHOWN else []
    return "\n".join([title, *(f"  {fault}" for fault in [*faults[:_FAULTS_SHOWN], *more])])
