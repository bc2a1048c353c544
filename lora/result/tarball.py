"""The tar that a training returns: the same bytes for the same files."""

import contextlib
import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora import disk

WEIGHTS_MEMBER = "output/flux_train_replicate/lora.safetensors"
"""Where every reader of such a tar looks, and the only safetensors that it may hold."""
BESIDE = "checkpoints"
"""The folder of weights that lie beside the tar. With this in its name diffusers takes none of them for the LoRA of a
repository (`_best_guess_weight_name`)."""


def pack(members: Mapping[str, Path], tar: Path) -> None:
    """Write an uncompressed tar of the given files under the given member names: the same bytes for the same files.

    Sorted by name; time 0, user and group 0, mode 0644. Written beside `tar` and moved into place when complete, so
    that `tar` is never seen half written. Raises DiskError where the disk does not take it.
    """
    aside = tar.with_name(tar.name + ".part")
    try:
        with disk.writing(tar):
            with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as out:
                for name in sorted(members):
                    with open(members[name], "rb") as file:
                        info = tarfile.TarInfo(name)
                        info.size = os.fstat(file.fileno()).st_size
                        out.addfile(info, file)
            os.replace(aside, tar)
    finally:
        with contextlib.suppress(NotADirectoryError):
            aside.unlink(missing_ok=True)


def captions(folder: Path, texts: Mapping[str, str]) -> dict[str, Path]:
    """Writes the caption of every picture (by name) to a file in a new folder; member names, which keep the archive's
    folders, and paths."""
    members = {}
    folder.mkdir()
    for number, (name, text) in enumerate(texts.items()):
        file = members[f"output/flux_train_replicate/captions/{name}.txt"] = folder / f"{number}.txt"
        file.write_text(text + "\n", encoding="utf-8")
    return members


def finish(members: Mapping[str, Path], output: Path, beside: Sequence[Path] = ()) -> Path:
    """Packs the members into `output / "trained_model.tar"`, which appears there when it is whole; returns its path.

    The files `beside` are moved to `output / BESIDE` before.
    """
    with disk.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for file in beside:
            (output / BESIDE).mkdir(exist_ok=True)
            shutil.move(file, output / BESIDE / file.name)
    tar = output / "trained_model.tar"
    pack(members, tar)
    return tar
