"""A cancel as Cog raises it, which comes where Python can only ignore it."""

import ctypes
import sys
import threading
import time

import pytest

from lora import cancel

LONG = 10
"""Seconds; a cancel that is heard ends what takes so long at once."""


class Cancelled(BaseException):
    """As cog.CancelationException: no Exception."""


class Slow:
    """What takes its time to go."""

    def __init__(self, seconds: float = 0.3) -> None:
        self.seconds, self.going = seconds, threading.Event()

    def __del__(self) -> None:
        end = time.monotonic() + self.seconds
        self.going.set()
        while time.monotonic() < end:
            pass


def ask(thread: int | None) -> None:
    """As Cog does it."""
    assert thread is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Cancelled))


def cancelled_while_it_goes(slow: list[Slow], then: float) -> tuple[list[str], float]:
    """What a thread that works for `then` seconds after `slow` has gone was ended by, and how long that took."""
    ends: list[str] = []
    going = slow[0].going

    def work() -> None:
        try:
            with cancel.heard(Cancelled):
                slow.clear()
                end = time.monotonic() + then
                while time.monotonic() < end:
                    pass
            ends.append("done")
        except Cancelled:
            ends.append("cancelled")

    thread = threading.Thread(target=work)
    thread.start()
    assert going.wait(LONG)
    begun = time.monotonic()
    ask(thread.ident)
    thread.join()
    return ends, time.monotonic() - begun


def test_a_cancel_that_is_lost_in_a_finalizer_is_raised_again() -> None:
    ends, seconds = cancelled_while_it_goes([Slow()], then=LONG)
    assert ends == ["cancelled"]
    assert seconds < LONG / 2


def test_a_cancel_that_is_lost_in_the_last_moment_is_raised_at_the_end() -> None:
    assert cancelled_while_it_goes([Slow()], then=0)[0] == ["cancelled"]


def test_nothing_is_raised_once_it_is_over() -> None:
    """What the training itself ended by is what is told, and the thread goes on with what comes next."""
    ends: list[str] = []
    slow = [Slow()]
    going = slow[0].going

    def work() -> None:
        try:
            with cancel.heard(Cancelled):
                slow.clear()
                raise ZeroDivisionError
        except ZeroDivisionError:
            end = time.monotonic() + 6 * cancel.BREATH
            while time.monotonic() < end:
                pass
            ends.append("its own end")

    thread = threading.Thread(target=work)
    thread.start()
    assert going.wait(LONG)
    ask(thread.ident)
    thread.join()
    assert ends == ["its own end"]


def test_other_ignored_exceptions_are_told_as_before() -> None:
    class Broken:
        def __del__(self) -> None:
            raise KeyError("broken")

    told: list[object] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda ignored: told.append(ignored.exc_type)
    try:
        with cancel.heard(Cancelled):
            Broken()
    finally:
        sys.unraisablehook = before
    assert told == [KeyError]


def test_a_cancel_that_comes_while_a_thread_starts_ends_the_one_that_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes right after the new thread was made and before that one runs."""
    ends: list[str] = []
    name = "_start_new_thread" if sys.version_info < (3, 13) else "_start_joinable_thread"
    start = getattr(threading, name)

    def start_and_cancel(*arguments: object, **named: object) -> object:
        begun = start(*arguments, **named)
        ask(threading.get_ident())
        return begun

    def work() -> None:
        try:
            with cancel.heard(Cancelled):
                monkeypatch.setattr(threading, name, start_and_cancel)
                threading.Thread(target=int).start()
        except Cancelled:
            ends.append("cancelled")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LONG)
    assert ends == ["cancelled"]
