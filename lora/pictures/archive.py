"""A stranger's archive (zip, tar or tar.gz) is unpacked into a folder.

Nothing an archive says of itself is believed: sizes are counted while reading, names are checked before anything is
written, and only plain files are ever made. Covered: path tricks, links and devices, encrypted entries, names that
collide, bombs, cut and damaged archives, and the junk that phones and desktops add. Not covered: what lies inside the
files (`photos.py` reads the captions, `buckets.py` the pictures).
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora import disk
from lora.pictures import entries, kinds, limits, names
from lora.pictures.entries import Counted, Entry, is_gzip, is_tar_header, too_large
from lora.pictures.names import BadEntry, is_junk, shown

_FAULTS_SHOWN = 20
_JUNK_SHOWN = 3


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip, tar or tar.gz into `folder`, which is new or empty; return the files, sorted by name.

    A file's path below `folder` is its name in the archive, in Unicode's NFC, a part of it shortened where it is too
    long for a file system. Junk (see `is_junk`) is left out. Nothing is written outside `folder`; after an error or a
    cancel `folder` is half filled, and whoever made it removes it.

    Raises ValueError that names the entries and the limit: bad names, links, devices, encrypted and damaged entries all
    in one message; a limit that is passed ends the reading at once; so does an archive of nothing but junk. Raises
    DiskError where the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert not any(folder.iterdir()), f"{folder} must be empty"
    try:
        if archive.is_dir():
            raise ValueError("must be a zip, tar or tar.gz of pictures, but it is a folder: pack it.")
        with open(archive, "rb") as file:
            source = Counted(file)
            return sorted(_write(_entries(source), folder, source))
    except ValueError as error:
        raise ValueError(f"input_images: {error}") from error


def is_tar(path: Path) -> bool:
    """Whether the file begins as a tar or a gzip does, or is nothing but zeros there, as a tar without files is."""
    with open(path, "rb") as file:
        head = file.read(512)
    return is_gzip(head) or is_tar_header(head) or head == bytes(512)


def tar_files(tar: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The name and the bytes of each plain file of a tar or tar.gz, in one pass; what nobody asks for is skipped.

    Raises ValueError where it is damaged, and as soon as it passes MAX_ENTRIES, MAX_BYTES or MAX_RATIO, whether the
    bytes are asked for or skipped.
    """
    with open(tar, "rb") as file:
        source = Counted(file)
        for seen, entry in enumerate(entries.of_tar(source), start=1):
            if seen > limits.MAX_ENTRIES:
                raise ValueError(f"more than {limits.MAX_ENTRIES:,} entries")
            if not entry.is_folder and not entry.fault:
                yield entry.name.text, _limited(entry, 0, source)


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins so is what a server answers in place of the file that was asked for."""
    return bool(re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|\?xml)", head, re.IGNORECASE))


def _entries(source: Counted) -> Iterator[Entry]:
    head = source.read(512)
    source.seek(0)
    found = entries.of(source, head)
    if found is None:
        raise ValueError(f"must be a zip, tar or tar.gz of pictures, but {_what_it_is(head)}.")
    return found


def _what_it_is(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if is_web_page(head):
        return "it is a web page: give a link to the file itself, not to a page that offers it"
    kind = kinds.kind(head)
    if kind in kinds.PICTURES:
        return f"it is a single {kind} picture: pack it into a zip, together with others"
    if kind == "film":
        return "it is a film: save some of its frames as JPEG or PNG and pack those into a zip"
    if kind:
        return f"it is a {kind}: pack the pictures into a zip"
    return f"it starts with the bytes {head[:8]!r}"


def _write(found: Iterable[Entry], folder: Path, source: Counted) -> Iterator[Path]:
    """Write each entry that is a file and no junk below `folder`; yield its path. All faults are raised at the end."""
    faults: list[str] = []
    junk: list[str] = []
    taken = names.Taken()
    total = 0
    for seen, entry in enumerate(found, start=1):
        if seen > limits.MAX_ENTRIES:
            raise ValueError(f"more than {limits.MAX_ENTRIES:,} entries. Send only the pictures and captions.")
        try:
            parts = names.parts(entry.name)
            if entry.is_folder and not entry.fault:
                continue
            if is_junk("/".join(parts)):
                junk.append(entry.name.text)
                continue
            taken.claim(entry.name, parts)
            if entry.fault:
                raise BadEntry(entry.fault)
            path = folder.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk.writing(path), open(path, "xb") as out:
                for chunk in _limited(entry, total, source):
                    out.write(chunk)
                total += out.tell()
            yield path
        except BadEntry as fault:
            faults.append(f"{shown(entry.name.text)} {fault}")
    if faults:
        more = [f"… and {len(faults) - _FAULTS_SHOWN} more"] if len(faults) > _FAULTS_SHOWN else []
        lines = ["these entries of the archive cannot be used:", *faults[:_FAULTS_SHOWN], *more]
        raise ValueError("\n  ".join(lines))
    if junk and not taken.files:
        some = ", ".join(shown(name) for name in junk[:_JUNK_SHOWN]) + (", …" if len(junk) > _JUNK_SHOWN else "")
        raise ValueError(
            f"every file in the archive is hidden or a system's own, and such files are left out: {some}."
            " Pack the pictures in a folder whose name does not begin with a dot."
        )


def _limited(entry: Entry, total: int, source: Counted) -> Iterator[bytes]:
    """The bytes of an entry, as long as it and the `total` unpacked before it keep the limits."""
    before, size = source.count, 0
    for chunk in entry.chunks():
        size += len(chunk)
        if total + size > limits.MAX_BYTES:
            raise too_large(entry.name.text)
        if size > limits.RATIO_FROM and size > limits.MAX_RATIO * (source.count - before):
            raise ValueError(
                f"{shown(entry.name.text)} unpacks to more than {limits.MAX_RATIO} times its packed size, which entries"
                f" over {limits.RATIO_FROM / 2**20:g} MiB may not. Pack it without compression, or save a picture as"
                " JPEG or PNG."
            )
        yield chunk
