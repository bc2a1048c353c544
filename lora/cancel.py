"""A cancel that Python could not raise where it came."""

import contextlib
import ctypes
import queue
import sys
import threading
import time
from collections.abc import Iterator

BREATH = 0.05
"""Seconds after which a lost cancel is raised again: the callback that it was lost in has ended by then."""


@contextlib.contextmanager
def heard(cancel: type[BaseException]) -> Iterator[None]:
    """Within it, a `cancel` of this thread that Python ignored is raised again.

    Cog cancels by having its exception raised at the thread's next bytecode, once (PyThreadState_SetAsyncExc). If that
    is a bytecode of a finalizer or of a weak reference's callback, Python prints "Exception ignored in" and goes on
    (`sys.unraisablehook`), and the training would run to its end as if nothing had been asked. Raises `cancel` at the
    end, too, where it was lost there. Other ignored exceptions are told as before.

    Before Python 3.12 it may also come to a thread that this one is about to start, which has this one's number until
    it runs (CPython's new_threadstate): that thread ends before its first line, and this one waits for it for ever.
    """
    told, thread = sys.unraisablehook, threading.get_ident()
    # Its put() may interrupt itself, which a finalizer does (the queue module's documentation of SimpleQueue).
    lost: queue.SimpleQueue[bool] = queue.SimpleQueue()
    lock = threading.Lock()
    missed = over = False

    def hook(ignored: "sys.UnraisableHookArgs") -> None:
        nonlocal missed
        if ignored.exc_type is not cancel:
            told(ignored)
        elif threading.get_ident() == thread:
            missed = True
            lost.put(True)  # raised here it would be lost again
        else:
            _raise_in(thread, cancel)
            starting = getattr(ignored.object, "__self__", None)
            if isinstance(starting, threading.Thread):
                starting._started.set()  # type: ignore[attr-defined]

    def raise_later() -> None:
        nonlocal missed
        while lost.get():
            time.sleep(BREATH)
            with lock:
                if not over:
                    missed = False
                    _raise_in(thread, cancel)

    sys.unraisablehook = hook
    try:
        threading.Thread(target=raise_later, name="heard", daemon=True).start()
        yield
    finally:
        with lock:
            over = True
        lost.put(False)
        sys.unraisablehook = told
    if missed:
        raise cancel


def _raise_in(thread: int, error: type[BaseException]) -> None:
    """Has `error` raised at the thread's next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
