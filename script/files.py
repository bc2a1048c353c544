"""The files that a command line names: on this machine, in a folder, or on the web."""

import base64
import os
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import cog

from lora import disk, web
from lora.request import without_secrets
from lora.result import tarball

SHOWN = 100
"""Characters of a value that a message shows."""
BESIDE = {
    "report/preview.webp": ("preview.webp", "Before and after"),
    "report/index.html": ("report.html", "The report"),
}
"""What script/train takes out of its tar and lays beside it: its name's ending, and what it is called."""
MAX_DOWNLOAD = 4 * 2**30
"""Bytes, as of an archive."""


def meant(text: str, wanted: str, folder: bool) -> cog.Path:
    """What a text means where a file is wanted: an address, a file, or a folder where that is allowed.

    Raises ValueError with one sentence; `wanted` says in it what is.
    """
    if not text:
        raise ValueError(f"it is empty; it must be {wanted}")
    scheme, colon, rest = text.partition(":")
    if colon and scheme.lower() == "data":
        if "," not in rest:
            raise ValueError(f"{cut(text)!r} is no data address, which is data:TYPE;base64,CONTENT")
        head, _, content = rest.partition(",")
        try:  # what reads it for Cog passes over signs that are no base64
            if head.lower().endswith(";base64"):
                base64.b64decode(unquote(content), validate=True)
            return cog.Path.validate(f"data:{rest}")
        except ValueError:
            raise ValueError(f"{cut(text)!r}: the content of this data address is damaged; copy it whole") from None
    if colon and scheme.lower() in ("http", "https"):
        try:
            named = urlsplit(text).hostname
        except ValueError:
            named = None
        if not named or any(sign.isspace() for sign in text):
            raise ValueError(f"{cut(text)!r} names no server, or holds a space; copy the address again")
        return cog.Path.validate(f"{scheme.lower()}:{rest}")
    if rest.startswith("//"):
        raise ValueError(f"{cut(text)!r} cannot be fetched; give an https address, or a file that is here")
    path = Path(text).expanduser()
    if folder and os.path.isdir(path):
        return cog.Path(path.absolute())
    return cog.Path(local(text))


def cut(text: str) -> str:
    """A value as a message shows it: without an address' secrets, and not for pages."""
    return without_secrets(text)[:SHOWN]


def local(name: str) -> Path:
    """The file of this name, in full. Raises ValueError where there is none."""
    if "://" in name:
        raise ValueError("@ takes a file that is here; write an address without the @")
    path, shown = Path(name).expanduser(), name[:SHOWN]
    if os.path.isdir(path):
        raise ValueError(f"{shown} is a folder, and a file is wanted")
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long, before Python 3.14
        raise ValueError(f"no file {shown}" if path.is_absolute() else f"there is no file {shown} in {Path.cwd()}")
    return path.absolute()


def fetched(name: str, value: Path) -> Path:
    """The input's value as a file on this machine: an address is downloaded, a folder packed, into temporary files.

    Raises ValueError that begins with the input's name.
    """
    folder = Path(tempfile.gettempdir())
    if not isinstance(value, cog.URLPath):
        return cog.Path(packed(value, folder / f"{name}.zip")) if value.is_dir() else value
    address = value.source
    try:
        if address.startswith("data:"):
            return value.convert()
        # With its suffix, by which the trainer names what came
        target = folder / f"{name}{PurePosixPath(urlsplit(address).path).suffix[:10]}"
        web.download(address, target, MAX_DOWNLOAD)
    except disk.DiskError:
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from None
    return cog.Path(target)


def packed(folder: Path, target: Path) -> Path:
    """The files of a folder, hidden ones and what a training left there left out, as a zip without compression. Raises
    DiskError."""
    endings = (".tar", f"-{tarball.BESIDE}", *(f"-{ending}" for ending, _ in BESIDE.values()))
    left = {folder / f"{tar.stem}{ending}" for tar in folder.glob("*.tar") for ending in endings}
    with disk.writing(target), zipfile.ZipFile(target, "w", strict_timestamps=False) as archive:
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts)
            if file.is_file() and not hidden and left.isdisjoint({file, *file.parents}):
                archive.write(file, name.as_posix())
    return target
