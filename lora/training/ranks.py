"""Several GPUs in one machine: a process for each, which trains its own rows of every batch.

This process, which has the pictures and tells the log, is rank 0; the others (`lora.training.rank`) are its children.
The base is replicated and the gradients are averaged, once a step (data parallelism; Li et al. 2020, arXiv:2006.15704):
the base of FLUX.1 fits on one GPU, and of a LoRA's gradient there are 65 million numbers at rank 16.

Nobody else's port is opened for the meeting: the processes find each other by a file in the work folder.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from lora import disk, wait
from lora.flux.hardware import Gpu
from lora.training import graphs, state

Log = Callable[[str], None]
T = TypeVar("T")

PROGRAM: tuple[str, ...] = ("-m", "lora.training.rank")
"""What Python is given to be a further rank."""
ROOT = Path(__file__).parents[2]
PATIENCE = timedelta(hours=2)
"""Longer than anything that one rank does while the others wait: whether they still live is watched in another way."""
TURN = 0.1
"""Seconds between two looks at the others."""
LEAVING = 30.0
"""Seconds that closing the connection may take: NCCL has hung there, with lost ranks and without (NVIDIA/nccl#1777,
pytorch/pytorch#149153), and the training is over by then."""
GRACE = 2.0
"""Seconds in which a process whose connection broke is seen to have ended."""
ON_A_CPU = "cpu:"
"""How GPUS begins where tests and benchmarks want several processes without a GPU."""


class Lost(RuntimeError):
    """A further rank has ended, and with it the training."""


class World:
    """A process's place among those that train together."""

    def __init__(self, rank: int = 0, size: int = 1, broken: Callable[[], None] = lambda: None) -> None:
        """`broken` is called where another rank no longer answers; it raises what is known of that, or returns."""
        self.rank, self.size, self._broken = rank, size, broken

    def rows(self, batch: Sequence[T]) -> Sequence[T]:
        """This rank's part of a batch for all of them, whose length is a multiple of `size`."""
        own = len(batch) // self.size
        return batch[self.rank * own : (self.rank + 1) * own]

    def average(self, flat: Tensor) -> None:
        """Puts the mean over all ranks in place of a tensor; on a GPU without waiting for it.

        A value that is not finite on one rank is so on all afterwards: they skip the same steps.
        """
        if self.size > 1:
            self._together(lambda: dist.all_reduce(flat))
            flat.div_(self.size)

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Puts rank 0's values in place of every rank's; the tensors are as many, of the same shapes, on all."""
        if self.size > 1:
            self._together(lambda: [dist.broadcast(tensor, 0) for tensor in tensors])

    def gather(self, own: Sequence[T]) -> list[T]:
        """What every rank has, by rank; all get the same list, in their machine's memory."""
        if self.size == 1:
            return list(own)
        # Not by pickle alone, which writes a whole batch for each row that is cut out of it.
        written = io.BytesIO()
        torch.save(list(own), written)
        parts: list[bytes] = [b""] * self.size
        self._together(lambda: wait.interruptibly(lambda: dist.all_gather_object(parts, written.getvalue())))
        return [one for part in parts for one in torch.load(io.BytesIO(part), weights_only=False)]

    def _together(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (RuntimeError, ValueError):  # the second where a lost rank has had the connection closed
            self._broken()
            raise


ALONE = World()


def how_many(asked: str | None, gpu: Gpu | None, log: Log, alone: str = "") -> int:
    """The number of processes, one a GPU; `asked` is what GPUS says: a number, or nothing for all there are. Told where
    it is more than one, or would be: `alone` says why a training takes one alone.

    Without a GPU there is one process, whatever the number; only "cpu:2", for tests, makes two there. GPUs of another
    kind than the first are left alone: all would wait for the slowest. Raises ValueError where it is no such value, or
    there are fewer GPUs.
    """
    told = (asked or "").strip()
    on_a_cpu, number = told.startswith(ON_A_CPU), told.removeprefix(ON_A_CPU)
    if told and not (number.isascii() and number.isdigit() and 0 < int(number) <= 64):
        raise ValueError(f"GPUS: {told[:40]!r} is not a number of GPUs; give 1 or more, or leave it empty for all")
    if gpu is None:
        if on_a_cpu and not alone:
            log(f"GPUs: none, but {number} processes train on the CPU, as GPUS asks for")
        elif told and not on_a_cpu and int(number) > 1:
            log(f"GPUS asks for {number} GPUs, but none is visible here")
        return int(number) if on_a_cpu and not alone else 1
    there = _alike(gpu)
    if on_a_cpu:
        raise ValueError(f"GPUS: {told!r} is for machines without a GPU, and there is one here; give a number")
    if told and int(number) > there:
        raise ValueError(
            f"GPUS: {number} are asked for, and of {gpu.name} there are {there} in a row; give {there} or fewer, or"
            " leave it empty for all"
        )
    count = int(number) if told else there
    if alone and count > 1:
        log(f"GPUs: one of {there} trains: {alone}")
        return 1
    if count > 1:
        log(
            f"GPUs: {count} of {there}, as GPUS asks for" if told else f"GPUs: all {there} train; GPUS=1 would take one"
        )
    return count


def _alike(gpu: Gpu) -> int:
    """How many GPUs there are of the first one's kind, in a row from it on."""
    count = torch.cuda.device_count()
    found = [torch.cuda.get_device_properties(number) for number in range(count)]
    return next((i for i, one in enumerate(found) if (one.name, one.total_memory) != (gpu.name, gpu.memory)), count)


@contextlib.contextmanager
def started(size: int, device: str, folder: Path, log: Log) -> "Iterator[Ranks]":
    """The further processes for the length of a `with`; they load their libraries while this one goes on."""
    ranks = Ranks(size, device, folder, log)
    try:
        ranks.start()
        yield ranks
    finally:
        ranks.stop()


class Ranks:
    """The further processes of a training, each attempt's own."""

    def __init__(self, size: int, device: str, folder: Path, log: Log) -> None:
        """`size` counts this process too; `device` is "cuda" or "cpu"; `folder` is one of the run's own."""
        self.size, self._device, self._parent, self._log = size, device, folder, log
        self._children: list[subprocess.Popen[bytes]] = []
        self._ended = threading.Event()
        self._leaving = threading.Lock()

    def start(self) -> None:
        """Starts them, unless they run."""
        if self._children or self.size == 1:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=self._parent))
        self._store = meeting(self._folder, self.size)
        search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        for rank in range(1, self.size):
            with (self._folder / f"{rank}.log").open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, *PROGRAM, str(rank), str(self.size), str(self._folder)],
                    stdin=subprocess.PIPE,  # never written to: it closes when this process ends, however it does
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": search_path},
                )
            self._children.append(child)
        self._ended = threading.Event()

    @contextlib.contextmanager
    def together(self, work: object) -> Iterator[Callable[[], World]]:
        """Has the others do `work` (see `learn.assist`); what it yields, once called, waits for them to be ready.

        At the end they are ended, whatever they do then. Raises Lost or what a further rank raised, in place of what
        came of it here.
        """
        if self.size == 1:
            yield lambda: ALONE
            return
        self.start()
        try:
            with disk.writing(self._folder):
                state.write(self._folder / "work.pt", work)
            self._store.set("work", "there")
            yield self._join
        except Exception:
            self._raise_lost()
            raise
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends them at once; they have nothing to put away."""
        if not self._children:
            return
        self._ended.set()
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        self._children = []
        closing = threading.Thread(target=self._close, name="leaving", daemon=True)
        closing.start()
        closing.join(LEAVING)
        if closing.is_alive():
            self._log(f"the connection with the other GPUs did not close within {LEAVING:g} s and is left as it is")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _join(self) -> World:
        ready = [f"ready/{rank}" for rank in range(1, self.size)]
        while not self._store.check(ready):
            self._raise_lost()
            time.sleep(TURN)
        wait.interruptibly(lambda: join(self._store, 0, self.size, self._device), self._raise_lost)
        if self._device == "cuda":
            threading.Thread(target=self._watch, args=(self._ended,), name="ranks", daemon=True).start()
        return World(0, self.size, lambda: self._raise_lost(GRACE))

    def _watch(self, ended: threading.Event) -> None:
        """NCCL waits for ever for a rank that is gone; closing its connection ends the wait, and `average` raises."""
        while not ended.wait(TURN):
            if any(child.poll() is not None for child in self._children):
                return self._close(unless=ended)

    def _close(self, unless: threading.Event | None = None) -> None:
        """Closes the connection where it is open; one thread at a time."""
        with self._leaving:
            if dist.is_initialized() and not (unless and unless.is_set()):
                leave(self._device)

    def _raise_lost(self, seconds: float = 0.0) -> None:
        """Raises what became of the first rank that has ended, if one has within so many seconds."""
        until = time.monotonic() + seconds
        while True:
            for rank, child in enumerate(self._children, 1):
                if child.poll() is not None:
                    self._raise(rank, child.returncode)
            if time.monotonic() >= until:
                return
            time.sleep(TURN / 10)

    def _raise(self, rank: int, code: int) -> NoReturn:
        where = f"{'GPU' if self._device == 'cuda' else 'process'} {rank + 1} of {self.size}"
        if self._store.check([f"error/{rank}"]):
            kind, message = json.loads(self._store.get(f"error/{rank}"))
            why = f"{where}: {message}"
            if raised := KINDS.get(kind):
                raise raised(why)
            why = f"{where}: {kind}: {message}"
        elif code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            why = f"{where} was ended by {name}"
        else:
            why = f"{where} ended by itself, with status {code}"
        for line in (self._folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-20:]:
            self._log(f"{where}: {line}")
        raise Lost(f"{why}; the training cannot go on without it. Start it again; GPUS=1 trains on one GPU alone")


KINDS: dict[str, type[Exception]] = {
    "CannotRecord": graphs.CannotRecord,
    "NoRoomToRecord": graphs.NoRoomToRecord,
    "OutOfMemoryError": torch.OutOfMemoryError,
    "ValueError": ValueError,
}
"""What a further rank raises that is answered, or told, as if rank 0 had raised it."""


def meeting(folder: Path, size: int) -> dist.FileStore:
    """Where the processes of one attempt leave each other word."""
    store = dist.FileStore(str(folder / "meeting"), size)
    store.set_timeout(PATIENCE)
    return store


def join(store: dist.Store, rank: int, size: int, device: str) -> None:
    """Connects this process with the others; waits until all do."""
    # Otherwise torch's watchdog ends the whole process where NCCL reports a lost rank, and this is a server's worker.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    # With its GPU NCCL connects at once, and not in the first exchange: whoever waits there for a rank that is lost by
    # then cannot be woken (NVIDIA/nccl#289), and here rank 0 looks after them meanwhile.
    own = torch.device("cuda", rank) if device == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE, device_id=own)


def leave(device: str) -> None:
    """Closes the connection, without waiting for anybody."""
    if device == "cuda":
        distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
