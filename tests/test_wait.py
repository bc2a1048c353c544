"""A cancel, as Cog raises it, while the trainer waits for a server that says nothing."""

import ctypes
import socket
import threading
import time
from pathlib import Path

import pytest

from lora import source, wait


class Cancelled(BaseException):
    """As cog.CancelationException: no Exception."""


def test_what_is_waited_for_comes_back_or_is_raised() -> None:
    assert wait.interruptibly(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        wait.interruptibly(lambda: 1 // 0)


def test_a_cancel_does_not_wait_for_a_download_that_has_stalled(tmp_path: Path) -> None:
    ends: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def fetch() -> None:
            try:
                source.fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/lora.safetensors", tmp_path, "resume_from")
            except BaseException as error:
                ends.append(error)

        training = threading.Thread(target=fetch)
        training.start()
        connection, _ = silent.accept()
        with connection:
            connection.recv(1)
            cancelled = time.monotonic()
            assert training.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(training.ident), ctypes.py_object(Cancelled))
            training.join(source.TIMEOUT)
            seconds = time.monotonic() - cancelled
    assert [type(end) for end in ends] == [Cancelled]
    assert seconds < 2
