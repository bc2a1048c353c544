"""The archive that comes in (zip, tar or tar.gz, told apart by their bytes) and the tar that goes out.

Archives come from strangers, so nothing an archive says of itself is believed: sizes are counted while reading, names
are checked before anything is written, and only plain files are ever made. Covered: path tricks, links and devices,
encrypted entries, names that collide, bombs, cut and damaged archives, and the junk that phones and desktops add.
Not covered: what lies inside the files (`photos.py` reads the captions, `buckets.py` the pictures).
"""

import contextlib
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

from lora import disk

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
_HEADERS_EACH = 3  # of an entry in a tar: its own, and one each for a long name and further facts
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
    in one message; a limit that is passed ends the reading at once. Raises DiskError where the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert not any(folder.iterdir()), f"{folder} must be empty"
    try:
        if archive.is_dir():
            raise ValueError("must be a zip, tar or tar.gz of pictures, but it is a folder: pack it.")
        with open(archive, "rb") as file:
            source = _Counted(file)
            return sorted(_write(_entries(source), folder, source))
    except ValueError as error:
        raise ValueError(f"input_images: {error}") from error


def is_tar(path: Path) -> bool:
    """Whether the file begins as a tar or a gzip does, or is nothing but zeros there, as a tar without files is."""
    with open(path, "rb") as file:
        head = file.read(512)
    return _is_gzip(head) or _is_tar(head) or head == bytes(512)


def tar_files(tar: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The name and the bytes of each plain file of a tar or tar.gz, in one pass; what nobody asks for is skipped.

    Raises ValueError where it is damaged, and as soon as it passes MAX_ENTRIES, MAX_BYTES or MAX_RATIO, whether the
    bytes are asked for or skipped.
    """
    with open(tar, "rb") as file:
        source = _Counted(file)
        for seen, entry in enumerate(_tar_entries(source), start=1):
            if seen > MAX_ENTRIES:
                raise ValueError(f"more than {MAX_ENTRIES:,} entries")
            if not entry.is_folder and not entry.fault:
                yield entry.name, _limited(entry, 0, source)


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins so is what a server answers in place of the file that was asked for."""
    return bool(re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|\?xml)", head, re.IGNORECASE))


def is_junk(name: str) -> bool:
    """Whether an archive name (parts joined by `/`) is a hidden or system file, which nobody means to send."""
    name = name.casefold()
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return name.endswith(_JUNK_SUFFIXES) or any(part.startswith(".") or part in _JUNK_NAMES for part in parts)


def pack(members: Mapping[str, Path], tar: Path) -> None:
    """Write an uncompressed tar of the given files under the given member names: the same bytes for the same files.

    Sorted by name; time 0, user and group 0, mode 0644. Written beside `tar` and moved into place when complete, so
    that `tar` is never seen half written. Raises DiskError where the disk does not take it.
    """
    aside = tar.with_name(tar.name + ".part")
    try:
        with disk.writing(tar):
            with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as out:
                for name in sorted(members):
                    with open(members[name], "rb") as file:
                        info = tarfile.TarInfo(name)
                        info.size = os.fstat(file.fileno()).st_size
                        out.addfile(info, file)
            os.replace(aside, tar)
    finally:
        with contextlib.suppress(NotADirectoryError):
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
            raise ValueError(f"its directory claims {size:,} bytes, of at most {_MAX_HEADER:,}")
        data = self.file.read(_MAX_HEADER if size < 0 else size)
        self.count += len(data)
        return data


def _write(entries: Iterable[_Entry], folder: Path, source: _Counted) -> Iterator[Path]:
    """Write each entry that is a file and no junk below `folder`; yield its path. All faults are raised at the end."""
    faults: list[str] = []
    names = _Names()
    total = 0
    for seen, entry in enumerate(entries, start=1):
        if seen > MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES:,} entries. Send only the pictures and captions.")
        try:
            parts = _parts(entry.name)
            if is_junk("/".join(parts)) or (entry.is_folder and not entry.fault):
                continue
            names.claim(entry.name, parts)
            if entry.fault:
                raise _BadEntry(entry.fault)
            path = folder.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk.writing(path), open(path, "xb") as out:
                for chunk in _limited(entry, total, source):
                    out.write(chunk)
                total += out.tell()
            yield path
        except _BadEntry as fault:
            faults.append(f"{_shown(entry.name)} {fault}")
    if faults:
        more = [f"… and {len(faults) - _FAULTS_SHOWN} more"] if len(faults) > _FAULTS_SHOWN else []
        lines = ["these entries of the archive cannot be used:", *faults[:_FAULTS_SHOWN], *more]
        raise ValueError("\n  ".join(lines))


def _limited(entry: _Entry, total: int, source: _Counted) -> Iterator[bytes]:
    """The bytes of an entry, as long as it and the `total` unpacked before it keep the limits."""
    before, size = source.count, 0
    for chunk in entry.chunks():
        size += len(chunk)
        if total + size > MAX_BYTES:
            raise _too_large(entry.name)
        if size > RATIO_FROM and size > MAX_RATIO * (source.count - before):
            raise ValueError(
                f"{_shown(entry.name)} unpacks to more than {MAX_RATIO} times its packed size, which entries over "
                f"{RATIO_FROM / 2**20:g} MiB may not. Pack it without compression, or save a picture as JPEG or PNG."
            )
        yield chunk


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


class _Names:
    """The names taken so far, as a file system sees them that folds case and Unicode's forms."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.folders: dict[str, str] = {}

    def claim(self, name: str, parts: list[str]) -> None:
        """Take a name, unless another entry has it, or it is a file's where a folder must be, or the reverse."""
        if not parts:
            raise _BadEntry("has no name")
        *above, whole = [_folded("/".join(parts[:depth])) for depth in range(1, len(parts) + 1)]
        other = next((self.files[key] for key in [whole, *above] if key in self.files), self.folders.get(whole))
        if other is not None:
            raise _BadEntry(f"and {_shown(other)} are two entries that become one name: rename one of them")
        self.files[whole] = name
        if len(self.files) > MAX_FILES:
            raise ValueError(f"more than {MAX_FILES:,} files. Send fewer pictures.")
        self.folders.update((key, name) for key in above)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _entries(source: _Counted) -> Iterator[_Entry]:
    """The entries of whatever kind of archive this is, by its first bytes."""
    head = source.read(512)
    source.seek(0)
    if _is_gzip(head) or _is_tar(head):
        return _tar_entries(source)
    if head.startswith((b"PK\3\4", b"PK\5\6")) or zipfile.is_zipfile(source):  # a self-extractor starts otherwise
        return _zip_entries(source)
    raise ValueError(f"must be a zip, tar or tar.gz of pictures, but {_what_it_is(head)}.")


_OTHER_KINDS = {
    b"Rar!": "it is a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "it is a 7z archive",
    b"BZh": "it is compressed by bzip2",
    b"\xfd7zXZ": "it is compressed by xz",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd",
    b"\xff\xd8\xff": "it is a single JPEG",
    b"\x89PNG": "it is a single PNG",
    b"RIFF": "it is a single picture or film",
    b"%PDF": "it is a PDF",
}


def _what_it_is(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if is_web_page(head):
        return "it is a web page: give a link to the file itself, not to a page that offers it"
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic)), None)
    return kind or f"it starts with the bytes {head[:8]!r}"


# What `zipfile` raises on a damaged one; NotImplementedError where it asks for what `zipfile` lacks
_ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError)


def _zip_entries(source: _Counted) -> Iterator[_Entry]:
    try:
        zipped = zipfile.ZipFile(source)
    except _ZIP_DAMAGE as error:
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
            is_folder=info.orig_filename.endswith(("/", "\\")),
            fault=fault,
            chunks=lambda info=info: _zip_chunks(zipped, info),  # type: ignore[misc]
        )


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The whole name as stored (`zipfile` cuts it at a NUL).

    Without the UTF-8 flag the bytes are cp437 by the specification (APPNOTE, appendix D), yet macOS and others write
    UTF-8 there, and WinRAR or 7-Zip put the UTF-8 name into an extra field of type 0x7075 (APPNOTE 4.6.9).
    """
    if info.flag_bits & 0x800:
        return info.orig_filename
    raw = info.orig_filename.encode("cp437")
    extra = info.extra
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 0x7075 and extra[4:9] == b"\1" + struct.pack("<I", zlib.crc32(raw)):
            raw = extra[9 : 4 + length]
        extra = extra[4 + length :]
    return _text(raw)


def _zip_chunks(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with zipped.open(info) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except _ZIP_DAMAGE as error:
        raise _BadEntry(f"is damaged ({error})") from error


class _Gunzip:
    """The bytes in a gzip file, a bounded piece at a time. Rubbish after the last of its streams is left alone."""

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
            self.packed = self.packed or self.source.read(2**12)  # little, for the ratio is counted by it
            if not self.packed:
                raise _damaged("tar.gz", "it ends in the middle")
            try:
                data = self.inflate.decompress(self.packed, size)
            except zlib.error as error:
                raise _damaged("tar.gz", str(error)) from error
            self.packed = self.inflate.unconsumed_tail
            if data:
                return data


def _is_gzip(head: bytes) -> bool:
    return head.startswith(b"\x1f\x8b\x08")  # the third byte is the one method that there is (RFC 1952)


def _is_tar(header: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _tar_entries(file: _Counted) -> Iterator[_Entry]:
    """The entries of a tar or tar.gz, in one pass forward (`tarfile` follows headers wherever they point, and takes a
    damaged header for the end). A long name comes in an entry of its own before the file: GNU's type L, or pax's x."""
    source: _Source = file
    kind = "tar"
    if _is_gzip(file.read(3)):
        source, kind = _Gunzip(file), "tar.gz"
    file.seek(0)
    stream = _TarStream(source, kind)
    name: str | None = None
    headers = 0
    while any(header := stream.exactly(512)):
        headers += 1
        if headers > _HEADERS_EACH * MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES:,} entries. Send only the pictures and captions.")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            if stream.at == len(header):
                raise ValueError(f"the {kind} has no tar in it. Pack and upload it again.") from error
            raise _damaged(kind, str(error)) from error
        if info.size < 0:
            raise _damaged(kind, f"{_shown(info.name)} claims {info.size} bytes")
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
                is_folder=info.isdir() or (name or "").endswith("/"),
                fault="" if plain or info.isdir() else "is a link or a device: send the picture itself",
                chunks=lambda size=info.size: stream.chunks(size),  # type: ignore[misc]
            )
            name = None
        stream.skip(after - stream.at)
    while rest := source.read(_CHUNK):  # the checksum of a gzip is at its end
        stream.count(len(rest))


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
            self.count(len(chunk))
            yield chunk

    def count(self, size: int) -> None:
        self.at += size
        if self.at > MAX_BYTES + MAX_ENTRIES * 1024:  # what is skipped counts too, for it costs time
            raise _too_large("what is skipped")

    def exactly(self, size: int) -> bytes:
        return b"".join(self.chunks(size))

    def skip(self, size: int) -> None:
        for _ in self.chunks(size):
            pass


def _pax_path(record: bytes) -> str | None:
    """The path in a pax header, whose lines are `LENGTH KEY=VALUE`, LENGTH counting the whole line (POSIX, pax)."""
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
    """A name in UTF-8, or else in cp437, where a backslash is no folder's end: in the encodings of Japanese and Chinese
    Windows, which cannot be told from it, that byte is the second half of many letters."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("cp437").replace("\\", "＼")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 150 else name[:150] + "…")


def _damaged(kind: str, why: str) -> ValueError:
    return ValueError(f"the {kind} is cut short or damaged ({why}). Pack and upload it again.")


def _too_large(name: str) -> ValueError:
    return ValueError(f"more than {MAX_BYTES / 2**30:g} GiB unpacked, at {_shown(name)}. Send less.")
