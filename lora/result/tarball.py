"""The tar that a training returns: the same bytes for the same files."""

import contextlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from lora import disk

WEIGHTS_MEMBER = "output/flux_train_replicate/lora.safetensors"
"""Where every reader of such a tar looks, and the only safetensors that it may hold."""


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


def finish(members: Mapping[str, Path], output: Path) -> Path:
    """Packs the members into `output / "trained_model.tar"`, which appears there when it is whole; returns its path."""
    with disk.writing(output):
        output.mkdir(parents=True, exist_ok=True)
    tar = output / "trained_model.tar"
    pack(members, tar)
    return tar
