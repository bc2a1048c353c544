"""What a run needs on the worker's machine: its input's files, and the LoRAs that it names."""

import asyncio
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import select

from server import inputs, schema
from server.context import Context
from server.loopback import Loopback
from server.outside import Outside
from server.records import File, Json, Run

KNOWN_HOSTS = ("huggingface.co", "civitai.com", "civitai.green", "civitai.red")
"""Whose addresses the model reads itself: pages too, and with the caller's token for them."""
CACHE_BYTES = 20 * 2**30
"""Of LoRAs kept on the worker's disk."""


class Intake:
    def __init__(self, context: Context, outside: Outside, loopback: Loopback, folder: Path) -> None:
        self.context = context
        self.outside = outside
        self.loopback = loopback
        self.folder = folder
        self.cache = context.settings.data / "cache"

    async def prepare(self, run: Run, word: str) -> Json:
        """The run's input as Cog takes it: files as addresses on loopback, LoRAs as paths, secrets in place.

        Raises ValueError for what is wrong with the input, and FileNotFoundError for what the store has lost.
        """
        document = schema.read().documents["generator" if run.cog == "generator" else "trainer"]
        properties = schema.inputs(document, run.cog == "trainer")
        folder = self.folder / "inputs" / word
        folder.mkdir(parents=True, exist_ok=True)
        values: Json = {}
        for name, value in {**run.input, **run.secrets}.items():
            if name not in properties:
                continue
            own = properties[name]
            try:
                if schema.is_file(own):
                    many = value if isinstance(value, list) else [value]
                    found: list[Any] = [
                        await self._file(run, entry, folder, f"{name}-{i}") for i, entry in enumerate(many)
                    ]
                    values[name] = found if isinstance(value, list) else found[0]
                elif schema.is_weights(name, own):
                    kept = run.weights.get(name)
                    many = value if isinstance(value, list) else [value]
                    kept = kept if isinstance(kept, list) else [kept] * len(many)
                    found = [await self._weights(run, *pair, folder) for pair in zip(many, kept, strict=True)]
                    values[name] = found if isinstance(value, list) else found[0]
                else:
                    values[name] = value
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for name, file in run.weights.items():
            if name in properties and name not in values:
                values[name] = str(await self._cached(run, file))
        return values

    async def _file(self, run: Run, value: Json | str, folder: Path, called: str) -> str:
        if isinstance(value, dict):
            record = await self._record(run, value["$file"])
            path = folder / f"{called}-{_safe(record.name)}"
            await self.context.store.copy_to(record.id, path)
        else:
            path = folder / f"{called}-{_safe(unquote(urlsplit(value).path).rpartition('/')[2])}"
            await self.outside.fetch(value, path, self.context.settings.file_bytes)
        return self.loopback.address(path)

    async def _weights(self, run: Run, value: Json | str, file: str | None, folder: Path) -> str:
        """A path where the LoRA is this server's or at an address; as it was sent where the Hub is to be asked."""
        if file is not None:
            return str(await self._cached(run, file))
        assert isinstance(value, str)
        host = urlsplit(value).hostname if re.match(r"https?://", value) else None
        if host is None or host.removeprefix("www.") in KNOWN_HOSTS:
            return value
        path = folder / f"lora-{len(list(folder.iterdir()))}-{_safe(unquote(urlsplit(value).path).rpartition('/')[2])}"
        await self.outside.fetch(value, path, self.context.settings.file_bytes)
        return str(path)

    async def _cached(self, run: Run, id: str) -> Path:
        """The same LoRA has the same path each time, so that the generator need not load it again."""
        record = await self._record(run, id)
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / f"{record.sha256}{Path(record.name).suffix}"
        if not path.is_file():
            await asyncio.to_thread(self._make_room, record.size)
            part = self.cache / f"{record.sha256}-{run.claim}"
            await self.context.store.copy_to(id, part)
            part.replace(path)
        os.utime(path, (time.time(), time.time()))
        return path

    async def _record(self, run: Run, id: str) -> File:
        """Weights may be of another account's public model; the API has seen to it that this run may have them."""
        async with self.context.sessions() as session:
            found = await session.scalar(select(File).where(File.id == id))
        if found is None:
            raise ValueError("its file has been deleted")
        return found

    def _make_room(self, size: int) -> None:
        kept = sorted((path for path in self.cache.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime)
        held = sum(path.stat().st_size for path in kept)
        while kept and held + size > CACHE_BYTES:
            held -= kept[0].stat().st_size
            kept.pop(0).unlink(missing_ok=True)

    def made(self, output: str, word: str) -> Path | None:
        """The file that an output's text stands for, uploaded or as a data URI; None for plain text."""
        if (path := self.loopback.path(output)) is not None:
            return path
        if not output.startswith("data:"):
            return None
        kind, data = inputs.read_data(output)
        folder = self.folder / "inputs" / word
        ending = {"x-tar": "tar", "jpeg": "jpg"}.get(kind.rpartition("/")[2], kind.rpartition("/")[2])
        path = folder / f"output-{len(list(folder.iterdir()))}.{_safe(ending)}"
        path.write_bytes(data)
        return path

    def clear(self, word: str) -> None:
        """Removes what was fetched for an attempt, and what Cog left."""
        shutil.rmtree(self.folder / "inputs" / word, ignore_errors=True)
        shutil.rmtree(self.loopback.uploads, ignore_errors=True)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)[-80:] or "file"
