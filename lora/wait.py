"""Waiting for other machines in such a way that a cancel comes through."""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
TURN = 0.2
"""Seconds."""


def interruptibly(act: Callable[[], Result]) -> Result:
    """What `act` returns or raises, from a thread of its own.

    Cog cancels by raising an exception in the training's thread at its next bytecode, of which a thread that waits for
    a socket runs none. `act` is then left behind, and ends with its own time limit.
    """
    executor = concurrent.futures.ThreadPoolExecutor(1)
    try:
        future = executor.submit(act)
        while not concurrent.futures.wait([future], TURN).done:
            pass
        return future.result()
    finally:
        executor.shutdown(wait=False)
