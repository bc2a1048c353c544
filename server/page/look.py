"""Asks the trainer's environment about pictures: `script.look` and `script/caption`, as processes of their own."""

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from server.cog import KEPT_FROM_IT, PYTHON
from server.records import Json
from server.settings import ROOT

SECONDS, CAPTION_SECONDS = 300, 1800
_LOOKING, _CAPTIONING = asyncio.Semaphore(2), asyncio.Semaphore(1)
"""How many at once: pictures are large when they are open, and a captioning model wants a GPU."""


class Fault(ValueError):
    """It could not; the message is for the person who asked."""


async def look(folder: Path, without: Path) -> Json:
    async with _LOOKING:
        told = await _run(["-m", "script.look", str(folder), "--without", str(without)], SECONDS)
    found = json.loads(told)
    assert isinstance(found, dict)
    return found


async def pack(folder: Path, without: Path, captions: Path, out: Path) -> None:
    more = ["--without", str(without), "--captions", str(captions), "--pack", str(out)]
    async with _LOOKING:
        await _run(["-m", "script.look", str(folder), *more], SECONDS)


async def write_captions(folder: Path, without: Path, captions: Path, out: Path, inputs: Sequence[str]) -> Json:
    """Captions by picture's name, those that were there among them. Raises Fault where no model can write them."""
    more = ["--without", str(without), "--captions", str(captions), "--unpack", str(out)]
    async with _LOOKING:
        await _run(["-m", "script.look", str(folder), *more], SECONDS)
    given = [word for text in inputs for word in ("-i", text)]
    async with _CAPTIONING:
        await _run(["-m", "script.caption", str(out), *given], CAPTION_SECONDS)
    texts = {path: path.read_text(encoding="utf-8").strip() for path in out.rglob("*.txt")}
    names = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    found: Json = {}
    for name in names:
        for text in (out / f"{name}.txt", (out / name).with_suffix(".txt")):
            if text in texts and not name.endswith(".txt"):
                found[name] = texts[text]
                break
    return found


async def _run(arguments: Sequence[str], seconds: int) -> str:
    """What it prints. Raises Fault with the end of what it says went wrong."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(KEPT_FROM_IT)}
    environ |= {"PYTHONPATH": str(ROOT), "TMPDIR": tempfile.gettempdir()}
    process = await asyncio.create_subprocess_exec(
        str(PYTHON),
        *arguments,
        cwd=ROOT,
        env=environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        told, wrong = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        raise Fault(f"this took longer than {seconds} s: use fewer or smaller pictures") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        raise Fault(wrong.decode("utf-8", "replace").strip().rpartition("\nValueError: ")[2][-1000:])
    return told.decode("utf-8")
