"""Makes a virtual environment (the argument) with the requirements that come on standard input.

Standard library only. Safe against an interruption and against a second one at the same time: the environment counts as
made when it holds `installed.txt`, which is written last, and a lock (on this file) keeps the second one waiting.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ERROR_LINES = 15


def main() -> int:
    folder = Path(sys.argv[1])
    requirements = sys.stdin.read()
    try:
        with open(__file__, encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stamp = folder / "installed.txt"
            if stamp.is_file() and stamp.read_text(encoding="utf-8") == requirements:
                return 0  # another one has just made it
            return make(folder, requirements, stamp)
    except KeyboardInterrupt:
        say("interrupted; the next use starts again, with what was downloaded")
        return 130


def make(folder: Path, requirements: str, stamp: Path) -> int:
    """Creates the environment, or brings a whole one up to date, and stamps it. Returns the exit status."""
    whole = stamp.is_file() and (folder / "bin" / "python").exists()
    pins = [line for line in requirements.splitlines() if "==" in line and not line.startswith("#")]
    doing = "updating" if whole else "making"
    say(f"{doing} {folder.name}, once: {len(pins)} packages, Python {sys.version.split()[0]}")
    if whole:
        stamp.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            venv.create(folder, with_pip=True)
        except subprocess.CalledProcessError:  # Debian and Ubuntu keep pip for environments in a package of its own
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            say(f"this Python cannot put pip into an environment: install python{version}-venv, and try again")
            return 1
    wanted = folder / "requirements.txt"
    wanted.write_text(requirements, encoding="utf-8")
    python = folder / "bin" / "python"
    status = pip(python, "-r", str(wanted))
    if status == 0:
        wanted.replace(stamp)
        say("ready")
    return status


def pip(python: Path, *arguments: str) -> int:
    """Runs pip install, showing its large downloads, and the end of its output where it fails. Returns its status."""
    output: list[str] = []
    with subprocess.Popen(
        [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                output.append(line)
                words = line.split()
                if words[:1] == ["Downloading"] and ("MB" in line or "GB" in line):
                    say("downloading " + " ".join([words[1].rsplit("/", 1)[-1], *words[2:]]))
                elif line.startswith("Installing collected packages"):
                    say(f"unpacking {line.count(',') + 1} packages")
        except KeyboardInterrupt:
            process.terminate()
            raise
    status = process.returncode
    if status:
        say("pip failed:")
        print("".join(output[-ERROR_LINES:]), file=sys.stderr)
    return status


def say(text: str) -> None:
    print(f"script/python: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
