"""Waiting for other machines in such a way that a cancel comes through, and what they refuse."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
TURN = 0.2
"""Seconds."""


def interruptibly(act: Callable[[], Result], look: Callable[[], object] = lambda: None) -> Result:
    """What `act` returns or raises, from a thread of its own. `look` is called a few times a second meanwhile, and may
    raise what makes waiting senseless.

    Cog cancels by raising an exception in the training's thread at its next bytecode, of which a thread that waits for
    a socket runs none. `act` is then left behind: it goes on until it ends by itself, or the process does, which does
    not wait for it (it would for a thread of an executor, and still does for those that `act` makes).
    """
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="interruptibly", daemon=True).start()
    while not concurrent.futures.wait([future], TURN).done:
        look()
    return future.result()


def meanwhile(act: Callable[[], object]) -> None:
    """Has `act` done in a thread of its own that nobody waits for. Where it fails nothing is said: whoever needs what
    it brings does it again, and is told."""

    def work() -> None:
        with contextlib.suppress(Exception):
            act()

    threading.Thread(target=work, name="meanwhile", daemon=True).start()


def refused(error: BaseException | None) -> bool:
    """Whether another machine refuses the token: it answers 401 or 403, here or in what this error came of."""
    while error is not None:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            return True
        error = error.__cause__ or error.__context__
    return False
