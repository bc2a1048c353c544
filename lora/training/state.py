"""The state of an unfinished training: put aside now and then, and taken up when the same request is begun again."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lora import disk
from lora.flux.base import Base
from lora.request import TrainRequest
from lora.result import record

Log = Callable[[str], None]

FORMAT = 2
SECONDS_BETWEEN = 120.0
"""Between two savings. With FLUX.1-dev at rank 16 a state has up to 1.6 GB: weights and AdamW's two moments in float32,
and up to six checkpoints in bf16."""
ECHO_SECONDS = 2.0
"""A second signal so soon is the first one's echo: `timeout` and others signal a process and its group."""
KEPT_DAYS = 30
"""After which a state that nobody came back for is deleted."""
ENDING, PART = ".state", ".part"
"""Of a state's file; and behind that while it is written."""
READ_OF_A_BASE = 2**20
"""Bytes of each of its files, that tell it from another."""


class Keeper:
    """Keeps the state of one request in a file; keeps nothing where it has none.

    What it finds there stands in `found`: what `remember` was given, and for the training what `save` was. It is the
    user's own file, and is read as data alone (torch's `weights_only`).
    """

    def __init__(self, file: Path | None = None, log: Log = lambda line: None) -> None:
        self.file, self._log = file, log
        self.found: Mapping[str, Any] = self._read() if file else {}
        self._job: dict[str, Any] = {}
        self._saved_at = -float("inf")
        self._asked: int | None = None
        self._asked_at = 0.0
        self._handlers: dict[int, Any] = {}

    @property
    def keeps(self) -> bool:
        return self.file is not None

    def remember(self, **values: Any) -> None:
        """What the job needs of itself when it goes on, beside the training's state; saved with that."""
        self._job |= values

    def training(self, settings: str) -> Mapping[str, Any] | None:
        """The state of a training with these `settings` (`settings_of`), where there is one."""
        found = self.found.get("training")
        if found is None:
            return None
        if found["settings"] != settings:
            self._log(
                "the interrupted training had other settings (another version, or number of GPUs), so this one starts"
                " from the beginning"
            )
            return None
        self._log(f"an interrupted training of this request continues after step {found['step']}")
        return found["state"]

    def due(self, looked: bool, alone: bool) -> bool:
        """Whether to save now: after a step that was looked at, every SECONDS_BETWEEN, or because the process is asked
        to end. Several ranks (not `alone`) can save at such steps only."""
        if self.file is None or not (looked or alone):
            return False
        return self._asked is not None or (looked and time.monotonic() - self._saved_at >= SECONDS_BETWEEN)

    def save(self, step: int, settings: str, state: Mapping[str, Any]) -> None:
        """Puts the state of a training after `step` in place of the one before. A disk that does not take it is told,
        and ends nothing."""
        assert self.file is not None
        training = {"step": step, "settings": settings, "state": dict(state)}
        part = self.file.with_name(f"{self.file.name}{PART}")
        try:
            with disk.writing(self.file):
                write(part, {"format": FORMAT, "name": self.file.name, **self._job, "training": training})
            os.replace(part, self.file)
            self._log(f"state after step {step} saved: the same request would continue from there")
        except OSError as error:
            self._log(f"the state after step {step} could not be saved: {error}")
            part.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def done(self) -> None:
        """The training is over: its state is deleted."""
        if self.file:
            self.file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, SIGINT and SIGTERM wait until `leave_if_asked` is called, where a state can be saved; another
        one, ECHO_SECONDS later, does not wait."""
        mine = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.file and mine:
            self._handlers = {number: handler for number, handler in before.items() if handler not in _DEAF}
        for number in self._handlers:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            self._listen_no_more()

    def leave_if_asked(self) -> None:
        """Does now what a signal asked for since `listening` began: raises what its own handler raises, or ends the
        process."""
        if (number := self._asked) is not None:
            self._listen_no_more()
            signal.raise_signal(number)

    def _note(self, number: int, _: object) -> None:
        if self._asked is None:
            self._asked, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at > ECHO_SECONDS:
            self._listen_no_more()
            signal.raise_signal(number)

    def _listen_no_more(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers, self._asked = {}, None

    def _read(self) -> Mapping[str, Any]:
        assert self.file is not None
        if not self.file.exists():
            return {}
        try:
            found = torch.load(self.file, map_location="cpu", weights_only=True)
            if found["format"] != FORMAT or found["name"] != self.file.name:
                raise ValueError("it is of another request or version")
            return found
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0][:120]
            self._log(f"the state of an interrupted training cannot be read, so this one starts anew: {reason}")
            return {}


def write(path: Path, content: object) -> None:
    """What torch.load reads again, for nobody else's eyes. Raises OSError where the disk does not take it."""
    try:
        with open(path, "wb", opener=_private) as stream:
            torch.save(content, stream)
    except RuntimeError as error:
        # torch's writer closes its archive after the disk's refusal, and complains of that instead.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


_DEAF = (None, signal.SIG_IGN)
"""Handlers of signals that nobody in this process wants to hear of."""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def keeper(folder: str | None, request: TrainRequest, data: str, flux: Base, log: Log) -> Keeper:
    """For a request over pictures whose hash is `data`, on this base; `folder` is what CHECKPOINTS says. States that
    nobody came back for are deleted there, whole or not. Raises DiskError where it cannot be made."""
    if not folder:
        return Keeper()
    place = Path(folder)
    try:
        with disk.writing(place):
            place.mkdir(parents=True, exist_ok=True)
    except disk.DiskError as error:
        raise disk.DiskError(f"CHECKPOINTS: {error}") from error
    for old in (*place.glob(f"*{ENDING}"), *place.glob(f"*{ENDING}{PART}")):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT_DAYS * 86400:
                old.unlink()
    return Keeper(place / (_name(request, data, flux) + ENDING), log)


def _name(request: TrainRequest, data: str, flux: Base) -> str:
    """A hash of all that makes a request, whatever the path its files lie at."""
    asked = dataclasses.asdict(request)
    del asked["input_images"], asked["notes"]
    if request.resume_from and os.path.isfile(request.resume_from):
        asked["resume_from"] = record.file_hash(Path(request.resume_from))
    digest = hashlib.sha256(json.dumps([asked, data, flux.name], sort_keys=True).encode())
    for file in sorted(file for file in (flux.folder / "transformer").iterdir() if file.is_file()):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + stream.read(READ_OF_A_BASE))
    return digest.hexdigest()[:32]


def settings_of(*parts: object) -> str:
    """A hash of plain values and dataclasses of them."""
    told = json.dumps(parts, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(told.encode()).hexdigest()
