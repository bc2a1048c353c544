"""A cancel, as Cog raises it, while the trainer waits for a server that says nothing."""

import ctypes
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora import wait, web
from lora.file import source

ROOT = Path(__file__).parent.parent


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
            training.join(web.TIMEOUT)
            seconds = time.monotonic() - cancelled
    assert [type(end) for end in ends] == [Cancelled]
    assert seconds < 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_interrupted_does_not_wait_for_what_it_left(how: signal.Signals) -> None:
    code = """
import signal, sys, time
from lora import wait

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as script/cli.py
wait.interruptibly(lambda: (print("begun", flush=True), time.sleep(20)))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(how)
        interrupted = time.monotonic()
        assert process.wait(60) != 0
        assert time.monotonic() - interrupted < 5
