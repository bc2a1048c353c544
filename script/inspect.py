"""Says what a LoRA is: the Python behind script/inspect."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from script import cli, files


def main(argv: Sequence[str]) -> int:
    """Prints a page on the LoRA; returns 0 where it is sound, 1 where it has a fault or cannot be read."""
    parser = argparse.ArgumentParser(prog="script/inspect", description="Says what a LoRA is and whether it is sound.")
    parser.add_argument("file", type=Path, help="a safetensors, or a tar with one in it")
    path = parser.parse_args(argv).file
    cli.hush()
    from lora.file import judge, weights  # only now: they load torch

    try:
        path = files.local(str(path))
        with tempfile.TemporaryDirectory() as folder:
            file = weights.take_out(path, Path(folder))
            lora = weights.read(file)
            cli.say(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB\n{judge.describe(lora, file)}")
    except (ValueError, OSError) as error:
        print(f"script/inspect: {error}", file=sys.stderr)
        return 1
    return 1 if judge.faults(lora) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
