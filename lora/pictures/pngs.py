"""A PNG without the texts and profiles that Pillow finds too long: metadata are no pixels.

Programs that draw keep their whole workflow as text in a PNG. Pillow refuses such a picture when a text or profile
unpacks to more than a mebibyte, so those chunks are passed over before Pillow reads it.
"""

import contextlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KINDS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_MOST_CHUNKS = 100_000  # looked at, of one file
_MOST_PACKED = 2**22  # bytes of one such chunk; one that is longer is passed over unseen

TEXT = 2**20
"""Bytes that a text may unpack to; all texts together to sixteen times as many."""
PROFILE = 2**24
"""Bytes that a colour profile may unpack to; printers' have a few million."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open, and where it is a PNG without its overlong texts and profiles."""
    with open(path, "rb") as file:
        dropped = _overlong(file)
        file.seek(0)
        yield io.BufferedReader(_Spliced(file, dropped)) if dropped else file


def _overlong(file: BinaryIO) -> list[tuple[int, int]]:
    """Where the chunks to pass over begin and end (a chunk is length, kind, data and checksum: PNG, 5.3)."""
    dropped: list[tuple[int, int]] = []
    if file.read(8) != _SIGNATURE:
        return dropped
    texts = 0
    for _ in range(_MOST_CHUNKS):
        start = file.tell()
        header = file.read(8)
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        if len(header) < 8 or kind == b"IEND":
            break
        if kind in _KINDS:
            size = _unpacked(kind, file.read(length)) if length <= _MOST_PACKED else PROFILE + 1
            texts += size if kind != b"iCCP" else 0
            if size > (PROFILE if kind == b"iCCP" else TEXT) or texts > 16 * TEXT:
                dropped.append((start, start + length + 12))
        file.seek(start + length + 12)
    return dropped


def _unpacked(kind: bytes, data: bytes) -> int:
    """How many bytes its text or profile has, up to one more than PROFILE; 0 of a broken one, which Pillow ignores."""
    _, _, rest = data.partition(b"\0")
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    else:
        packed, rest = kind != b"tEXt", rest[1:]
    if not packed:
        return len(data)
    try:
        return len(zlib.decompressobj().decompress(rest, PROFILE + 1))
    except zlib.error:
        return 0


class _Spliced(io.RawIOBase):
    """A file in which some ranges are not there."""

    def __init__(self, file: BinaryIO, dropped: list[tuple[int, int]]) -> None:
        self._file, self._at = file, 0
        self._kept: list[tuple[int, int]] = []  # of the file, one after another
        size = file.seek(0, io.SEEK_END)
        begin = 0
        for start, end in [*dropped, (size, size)]:
            self._kept.append((begin, min(start, size)))
            begin = end
        self._size = sum(max(0, end - start) for start, end in self._kept)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        at = self._at
        for start, end in self._kept:
            if at < end - start:
                self._file.seek(start + at)
                data = self._file.read(min(len(buffer), end - start - at))
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            at -= max(0, end - start)
        return 0
