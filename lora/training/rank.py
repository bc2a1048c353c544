"""A further process of a training on several GPUs: `python -m lora.training.rank RANK SIZE FOLDER`.

Started by `lora.training.ranks` and never by a user. It takes its work from the folder, trains its rows of every batch,
and is ended by the process that started it; should that one be gone, it ends itself.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from lora.flux import hardware
from lora.training import learn, ranks
from lora.training.ranks import World


def main(arguments: list[str]) -> None:
    rank, size, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    # A terminal, or `timeout`, sends them to all; rank 0 answers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    store = ranks.meeting(folder, size)
    try:
        store.wait(["work"])
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        work = torch.load(folder / "work.pt", mmap=True, weights_only=False)  # rank 0's own, in its own folder

        def joined() -> World:
            store.set(f"ready/{rank}", "")
            ranks.join(store, rank, size, work.plan.device)
            return World(rank, size, _wait_for_the_end)

        learn.assist(work, joined)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        kind = "OutOfMemoryError" if hardware.is_out_of_memory(error) else type(error).__name__
        store.set(f"error/{rank}", json.dumps([kind, str(error)[:2000]]))
        os._exit(1)
    _wait_for_the_end(float("inf"))


def _end_with_rank_0() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _wait_for_the_end(seconds: float = 10.0) -> None:
    """Until rank 0 ends this process. Where a third rank is lost, rank 0 knows better which than this one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1:])
