"""What an archive holds, entry by entry: a zip, a tar or a tar.gz, told apart by their bytes.

Read forward, in bounded pieces; what an archive says of its own sizes is not believed. Covered: links and devices,
encrypted entries, cut and damaged archives. Not covered: limits on what is unpacked, and names (`archive.py`).
"""

import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from lora.pictures import limits, names
from lora.pictures.names import BadEntry, Name, shown

_MAX_HEADER = 4 * 2**20  # a zip's whole directory, or one tar header: far more than MAX_FILES honest names need
_HEADERS_EACH = 3  # of an entry in a tar: its own, and one each for a long name and further facts
_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing in an archive: its name as given, why it may not be taken (or ""), and its bytes, read when asked."""

    name: Name
    is_folder: bool
    fault: str
    chunks: Callable[[], Iterator[bytes]]


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Counted:
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


def of(source: Counted, head: bytes) -> Iterator[Entry] | None:
    """The entries of whatever kind of archive this is, by its first 512 bytes; None where it is no archive."""
    if is_gzip(head) or is_tar_header(head):
        return of_tar(source)
    if head.startswith((b"PK\3\4", b"PK\5\6")) or zipfile.is_zipfile(source):  # a self-extractor starts otherwise
        return _of_zip(source)
    return None


# What `zipfile` raises on a damaged one; NotImplementedError where it asks for what `zipfile` lacks
_ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError)


def _of_zip(source: Counted) -> Iterator[Entry]:
    try:
        zipped = zipfile.ZipFile(source)
    except _ZIP_DAMAGE as error:
        raise _damaged("zip", str(error)) from error
    infos = zipped.infolist()
    for info, name in zip(infos, names.of_zip(infos), strict=True):
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
        yield Entry(
            name=name,
            is_folder=name.text.endswith(("/", "\\")),
            fault=fault,
            chunks=lambda info=info: _zip_chunks(zipped, info),  # type: ignore[misc]
        )


def _zip_chunks(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with zipped.open(info) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except _ZIP_DAMAGE as error:
        raise BadEntry(f"is damaged ({error})") from error


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


def is_gzip(head: bytes) -> bool:
    return head.startswith(b"\x1f\x8b\x08")  # the third byte is the one method that there is (RFC 1952)


def is_tar_header(header: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def of_tar(file: Counted) -> Iterator[Entry]:
    """The entries of a tar or tar.gz, in one pass forward (`tarfile` follows headers wherever they point, and takes a
    damaged header for the end). A long name comes in an entry of its own before the file: GNU's type L, or pax's x."""
    source: _Source = file
    kind = "tar"
    if is_gzip(file.read(3)):
        source, kind = _Gunzip(file), "tar.gz"
    file.seek(0)
    stream = _TarStream(source, kind)
    name: bytes | None = None
    headers = 0
    while any(header := stream.exactly(512)):
        headers += 1
        if headers > _HEADERS_EACH * limits.MAX_ENTRIES:
            raise ValueError(f"more than {limits.MAX_ENTRIES:,} entries. Send only the pictures and captions.")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            if stream.at == len(header):
                raise ValueError(f"the {kind} has no tar in it. Pack and upload it again.") from error
            raise _damaged(kind, str(error)) from error
        if info.size < 0:
            raise _damaged(kind, f"{shown(info.name)} claims {info.size} bytes")
        after = stream.at + -(-info.size // 512) * 512  # entries are padded to whole blocks
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if info.size > _MAX_HEADER:
                raise _damaged(kind, f"a header claims {info.size:,} bytes")
            record = stream.exactly(info.size)
            name = (record.rstrip(b"\0") if info.type == tarfile.GNUTYPE_LONGNAME else _pax_path(record)) or name
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
            yield Entry(
                name=names.of_bytes([name or info.name.encode("utf-8", "surrogateescape")])[0],
                is_folder=info.isdir() or (name or b"").endswith(b"/"),
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
        if self.at > limits.MAX_BYTES + limits.MAX_ENTRIES * 1024:  # what is skipped counts too, for it costs time
            raise too_large("what is skipped")

    def exactly(self, size: int) -> bytes:
        return b"".join(self.chunks(size))

    def skip(self, size: int) -> None:
        for _ in self.chunks(size):
            pass


def _pax_path(record: bytes) -> bytes | None:
    """The path in a pax header, whose lines are `LENGTH KEY=VALUE`, LENGTH counting the whole line (POSIX, pax)."""
    path = None
    while match := re.match(rb"(\d{1,9}) ([^=\n]+)=", record):
        length = int(match[1])
        if match[2] == b"path":
            path = record[match.end() : length - 1]
        if length < match.end():
            break
        record = record[length:]
    return path


def _damaged(kind: str, why: str) -> ValueError:
    return ValueError(f"the {kind} is cut short or damaged ({why}). Pack and upload it again.")


def too_large(name: str) -> ValueError:
    return ValueError(f"more than {limits.MAX_BYTES / 2**30:g} GiB unpacked, at {shown(name)}. Send less.")
