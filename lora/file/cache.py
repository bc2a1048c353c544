"""LoRAs that were asked for before: each is fetched once, and the last few stay on the disk.

What is kept is bounded, so that a server may draw with any number of LoRAs.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit, urlunsplit

from safetensors import SafetensorError, safe_open

from lora.file import source

KEPT = 8
"""LoRAs on the disk besides those in use; one of rank 16 for FLUX.1-dev has 130 MB."""
CIVITAI = ("civitai.com", "www.civitai.com")
_SHOWN = 60
"""Characters of a name."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A LoRA's file, and what it says of itself."""

    file: Path
    """A safetensors, as `source.fetch` gives it."""
    name: str
    """For people and for other tools: the header's title, else the file's name; letters, digits and ` ._-` only."""
    trigger: str
    """The trigger word or phrase in its header; "" where there is none."""
    sha256: str
    """Of the tensors alone, without the header: what A1111, Forge and Civitai (AutoV3) know a LoRA by."""


class Cache:
    """Fetched LoRAs below a folder that lives as long as the cache."""

    def __init__(self, folder: Path, kept: int = KEPT) -> None:
        self._folder = folder
        self._kept = kept
        self._entries: OrderedDict[tuple[object, ...], tuple[Fetched, Path]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self, origin: str, called: str, hf_token: str | None = None, civitai_token: str | None = None
    ) -> tuple[Fetched, bool]:
        """The LoRA that `origin` means (see `source.fetch`), and whether it was here already.

        What was fetched with a token is given only to who has the same token; a file of this machine that has changed
        is read again. Raises ValueError that begins with `called`, the input's name.
        """
        called_by = hashlib.sha256(origin.encode("utf-8", "replace")).digest()  # a data: address may be a whole file
        key = (called_by, hf_token, civitai_token, _state(origin))
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0], True
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            file = source.fetch(_with_token(origin, civitai_token), folder, called, hf_token)
            self._entries[key] = (about(file), folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return self._entries[key][0], False

    def forget(self, in_use: int) -> None:
        """Deletes what has not been asked for longest: what stays is the last `in_use` that were, and KEPT more."""
        while len(self._entries) > in_use + self._kept:
            _, (_, folder) = self._entries.popitem(last=False)
            shutil.rmtree(folder, ignore_errors=True)


def about(file: Path) -> Fetched:
    """What a safetensors says of itself; of a file that is none only the name and the hash of all its bytes."""
    header: dict[str, str] = {}
    start = 0
    with contextlib.suppress(SafetensorError, OSError):  # whoever reads its weights says what is wrong with it
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
    with file.open("rb") as stream:
        stream.seek(start)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    title = header.get("modelspec.title") or header.get("ss_output_name") or ""
    plain = _plain(title) or _plain(file.stem) or "lora"
    trigger = " ".join(header.get("modelspec.trigger_phrase", "").split())
    return Fetched(file=file, name=plain[:_SHOWN], trigger=trigger, sha256=digest)


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[^\w.-]+", " ", name).split())


def _state(origin: str) -> tuple[int, int] | None:
    """What changes when a file of this machine is written anew; None for all that is elsewhere."""
    try:
        found = os.stat(origin.strip())
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


def _with_token(origin: str, token: str | None) -> str:
    """An address at Civitai with the token that it asks for (https://education.civitai.com, "token" in the query)."""
    address = origin.strip()
    if address.startswith(tuple(f"{host}/" for host in CIVITAI)):
        address = f"https://{address}"
    try:
        url = urlsplit(address)
        host = url.hostname
    except ValueError:
        return origin
    if not token or url.scheme != "https" or host not in CIVITAI or "token=" in url.query:
        return origin
    query = f"{url.query}&{urlencode({'token': token})}" if url.query else urlencode({"token": token})
    return urlunsplit(url._replace(query=query))
