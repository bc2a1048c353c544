"""Trains from the command line: the Python behind script/train."""

import logging
import os
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora import disk, presets, request
from lora.result import tarball
from script import cli, files, signature

ROOT = Path(__file__).resolve().parent.parent
COMMAND = cli.Command(
    program="script/train",
    summary="Trains a FLUX LoRA on a zip of pictures, as Cog would, without Docker.",
    output="trained_model.tar",
    folders=("input_images",),
)


def main(argv: Sequence[str]) -> int:
    values, output = cli.parse(COMMAND, signature.read(ROOT / "train.py", "train"), argv, os.environ, _contradictions)
    if output.exists():
        cli.say(f"{output} is there already, and is replaced when the training is done; -o FILE would name another")
    return cli.run(COMMAND, lambda: _train(values, output))


def _contradictions(values: Mapping[str, object]) -> list[str]:
    texts = {name: str(values.get(name) or "") for name in request.PARSED}
    return [*presets.settle(presets.Asked.of(values)).all_faults(), *request.faults_of(texts)]


def _train(values: dict[str, object], output: Path) -> None:
    with cli.importing():
        from train import train  # only now: it loads torch

    logging.getLogger("train").addHandler(logging.NullHandler())  # `cli.run` tells what failed

    weights = Path(train(**cli.fetch(values)).weights)  # type: ignore[arg-type]
    try:
        cli.move_into_place({output: weights})
    except disk.DiskError as error:
        raise disk.DiskError(f"{error}\nThe LoRA is kept in {cli.move_out(weights)}") from error
    print(f"The LoRA:            {output} ({output.stat().st_size / 1e6:.1f} MB)")
    for member, (ending, called) in files.BESIDE.items():
        content = read_member(weights, member)
        if content is not None:
            path = output.with_name(f"{output.stem}-{ending}")
            cli.move_into_place({path: content})
            print(f"{called + ':':<20} {path}")
    others = sorted((weights.parent / tarball.BESIDE).glob("*.safetensors"))
    if others:
        folder = output.with_name(f"{output.stem}-{tarball.BESIDE}")
        with disk.writing(folder):
            folder.mkdir(exist_ok=True)
        cli.move_into_place({folder / other.name: other for other in others})
        print(f"Other checkpoints:   {folder} ({', '.join(other.stem for other in others)})")


def read_member(tar: Path, name: str) -> bytes | None:
    """The bytes of a file in the tar, or None where it has no such file."""
    with tarfile.open(tar) as archive:
        try:
            member = archive.extractfile(name)
        except KeyError:
            return None
        return member.read() if member else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
