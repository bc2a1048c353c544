"""The disk that a run writes to: where it is full or closed, the error names the file and says what to do."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your share of the disk is used up",
    errno.EFBIG: "a file may not be that large here (ulimit -f)",
}
_CLOSED = {
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "that is not permitted",
    errno.EPERM: "that is not permitted",
    errno.ENOTDIR: "a part of its path is no folder",
    errno.EEXIST: "a file is in the way",
}


class DiskError(OSError):
    """What the disk refused: the text is enough by itself."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """For a block that writes the file `path`, or files below it.

    Raises DiskError where the disk does not take them. A full disk does not say at which file: then it is `path`.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        file = Path(error.filename or path)
        if file.parent == path.parent:
            file = path  # `path` is first written under another name
        if error.errno in _FULL:
            raise DiskError(
                f"{file} cannot be written: {_FULL[error.errno]}. Free space, send less, or name a folder on another"
                " disk (TMPDIR is where temporary files go)"
            ) from error
        if error.errno in _CLOSED and error.filename and (file.is_relative_to(path) or path.is_relative_to(file)):
            raise DiskError(f"{file} cannot be written: {_CLOSED[error.errno]}. Name another folder") from error
        raise


def temporary() -> Path:
    """The folder for temporary files, which can be written to. Raises DiskError where there is none."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # it has tried each of them
        raise DiskError(f"{error.strerror}: make room there, or set TMPDIR to a folder that has some") from error


@contextlib.contextmanager
def work_folder(prefix: str) -> Iterator[Path]:
    """A new folder in `temporary()`, gone afterwards with everything in it, however the block ends; errors of the disk
    in the block are told as by `writing`."""
    with writing(temporary()), tempfile.TemporaryDirectory(prefix=prefix) as folder, writing(Path(folder)):
        yield Path(folder)
