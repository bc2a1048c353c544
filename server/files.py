"""Files in the store (a folder, or a bucket), and the signed links by which they are fetched."""

import asyncio
import contextlib
import hashlib
import hmac
import mimetypes
import re
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import obstore
from obstore.store import LocalStore, ObjectStore, from_url
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.accounts import new_id
from server.records import File, Json

BLOCK = 2**20
MEDIA_TYPE = re.compile(r"(?=.{3,127}$)[\w.+-]+/[\w.+-]+( *; *[\w.+-]+=[\w.+-]+)*", re.ASCII)
"""What may stand in a header; anything else that a caller names is passed over."""
GONE = (FileNotFoundError, obstore.exceptions.NotFoundError)


class Store:
    """The bytes of files, each under its id."""

    def __init__(self, url: str) -> None:
        if url.startswith("file://"):
            self._store: ObjectStore = LocalStore(url.removeprefix("file://"), mkdir=True)
        else:
            self._store = from_url(url)

    async def write(self, id: str, source: BinaryIO | Path) -> tuple[int, str]:
        """Copies the source, whole or not at all. Returns its size in bytes and its SHA-256."""
        if isinstance(source, Path):
            with await asyncio.to_thread(source.open, "rb") as file:
                return await self.write(id, file)
        size, digest = await asyncio.to_thread(_measure, source)
        await obstore.put_async(self._store, id, source)
        return size, digest

    async def read(self, id: str) -> AsyncIterator[bytes]:
        """Its bytes in blocks. Raises FileNotFoundError before the first."""
        try:
            answer = await obstore.get_async(self._store, id)
        except GONE as error:
            raise FileNotFoundError(id) from error
        return _blocks(answer)

    async def copy_to(self, id: str, path: Path) -> None:
        """Into the file `path`, which is there when it is whole."""
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            async for block in await self.read(id):
                file.write(block)
        part.replace(path)

    async def older_than(self, moment: datetime) -> AsyncIterator[list[str]]:
        """The ids of files that were written before, in batches."""
        async for batch in self._store.list():
            yield [entry["path"] for entry in batch if entry["last_modified"] < moment]

    async def delete(self, ids: Iterable[str]) -> None:
        for id in ids:
            with contextlib.suppress(*GONE):
                await obstore.delete_async(self._store, id)


def _measure(file: BinaryIO) -> tuple[int, str]:
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while block := file.read(BLOCK):
        digest.update(block)
        size += len(block)
    file.seek(0)
    return size, digest.hexdigest()


async def _blocks(answer: Any) -> AsyncIterator[bytes]:
    async for block in answer.stream(min_chunk_size=BLOCK):
        yield bytes(block)


async def keep(
    session: AsyncSession,
    store: Store,
    account: int,
    source: BinaryIO | Path,
    *,
    name: str,
    content_type: str = "",
    run: str | None = None,
    details: Json | None = None,
) -> File:
    """Stores the bytes, then adds the record. What a crash leaves between them is removed by `retention.strays`."""
    id = new_id()
    size, digest = await store.write(id, source)
    if not MEDIA_TYPE.fullmatch(content_type):
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    name = re.sub(r"[^\w. ()+-]", "_", name.rpartition("/")[2])[-200:] or "file"
    file = File(
        id=id,
        account_id=account,
        run_id=run,
        name=name,
        content_type=content_type,
        size=size,
        sha256=digest,
        details=details or {},
    )
    session.add(file)
    await session.flush()
    return file


async def remove(session: AsyncSession, store: Store, ids: list[str]) -> None:
    """Removes the records, and the bytes when the transaction has been written down."""
    await session.execute(delete(File).where(File.id.in_(ids)))
    await session.commit()
    await store.delete(ids)


async def owned(session: AsyncSession, account: int, id: str) -> File | None:
    return await session.scalar(select(File).where(File.id == id, File.account_id == account))


@dataclass(frozen=True)
class Links:
    """Addresses of this server as its caller knows them; whoever holds one of a file or stream needs no token."""

    base: str
    """https://host, without /v1."""
    key: bytes
    seconds: int

    def file(self, id: str) -> str:
        return f"{self.base}/v1/files/{id}/download?{self._signed('file', id)}"

    def stream(self, id: str) -> str:
        return f"{self.base}/v1/runs/{id}/stream?{self._signed('stream', id)}"

    def _signed(self, what: str, id: str) -> str:
        # Whole half-hours: an object that is asked for twice shows the same link, so that a client may compare.
        expires = (int(time.time()) // 1800 + 1) * 1800 + self.seconds
        return f"expires={expires}&signature={_signature(self.key, what, id, expires)}"


def is_signed(key: bytes, what: str, id: str, expires: str, signature: str) -> bool:
    """Whether this server made the link, and it has not expired."""
    if not re.fullmatch(r"\d{1,12}", expires) or int(expires) < time.time():
        return False
    return hmac.compare_digest(_signature(key, what, id, int(expires)), signature)


def _signature(key: bytes, what: str, id: str, expires: int) -> str:
    return hmac.new(key, f"{what}:{id}:{expires}".encode(), hashlib.sha256).hexdigest()


def named_by(address: str, bases: Iterable[str]) -> str | None:
    """The id of the file of this server that an address means; None where it is another's address."""
    url = urlsplit(address)
    found = re.fullmatch(r"(?:/v1)*/files/([a-z2-7]{26})(?:/download)?", url.path)
    ours = {urlsplit(base).netloc for base in bases if base}
    return found[1] if found and url.netloc in ours else None
