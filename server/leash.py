"""Runs a command that must not outlive whoever started it: `python leash.py COMMAND …`.

The starter holds the other end of standard input. When that closes, for whatever reason (SIGKILL too), the command's
whole process group is killed. Standard library only: it runs in any environment.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    os.setpgid(0, 0) if os.getpgrp() != os.getpid() else None
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: child.send_signal(received))
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
