"""A disk that is full, and folders that cannot be written to, by means that hold for root too: a limit on the size of
files, /dev/full, and paths through a file."""

import contextlib
import errno
import io
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lora import disk
from lora.disk import DiskError
from lora.file import weights
from lora.pictures import archive
from lora.result import tarball
from script import cli
from tests.file.test_names import a_lora
from tests.pictures.test_archive import a_zip
from tests.test_job import _run

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can be written past `size` bytes: what a full disk is to a program, but for the error's number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught, disk.writing(tmp_path), Path("/dev/full").open("wb") as file:
        file.write(b"x")
    assert str(caught.value).startswith(f"{tmp_path} cannot be written: the disk is full. Free space, send less, or")


def test_a_closed_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "below"
    match = "file/below cannot be written: a part of its path is no folder"
    with pytest.raises(DiskError, match=match), disk.writing(path), path.open("wb"):
        pass


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (ConnectionRefusedError(errno.ECONNREFUSED, "no"), PermissionError(errno.EACCES, "no", "/elsewhere")):
        with pytest.raises(type(error)), disk.writing(tmp_path):
            raise error


def test_without_any_temporary_folder_it_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    match = r"No usable temporary directory found in .*gone.*set TMPDIR"
    with pytest.raises(DiskError, match=match), disk.work_folder("x-"):
        pass


def test_an_archive_that_does_not_fit_on_the_disk_names_the_picture(tmp_path: Path) -> None:
    path = a_zip(tmp_path / "x.zip", {"a.jpg": b"1", "b.jpg": os.urandom(9000)})
    with largest_file(5000), pytest.raises(DiskError, match=r"out/b\.jpg cannot be written"):
        archive.unpack(path, tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_tar_that_does_not_fit_leaves_the_earlier_one_and_no_part(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(50_000))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.tar").write_bytes(b"earlier")
    with largest_file(30_000), pytest.raises(DiskError, match=r"out/x\.tar cannot be written: a file may not be that"):
        tarball.pack({"big": tmp_path / "big"}, tmp_path / "out" / "x.tar")
    os.symlink("/dev/full", tmp_path / "out" / "x.tar.part")
    with pytest.raises(DiskError, match=r"out/x\.tar cannot be written: the disk is full"):
        tarball.pack({"big": tmp_path / "big"}, tmp_path / "out" / "x.tar")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.tar"]
    assert (tmp_path / "out" / "x.tar").read_bytes() == b"earlier"
    with pytest.raises(DiskError, match=r"big/x\.tar cannot be written: a part of its path is no folder"):
        tarball.pack({"big": tmp_path / "big"}, tmp_path / "big" / "x.tar")


def test_a_lora_taken_out_of_a_tar_names_where_it_did_not_fit(tmp_path: Path) -> None:
    weights.write(tmp_path / "a.safetensors", a_lora(2, width=48), {})
    tarball.pack({"a.safetensors": tmp_path / "a.safetensors"}, tmp_path / "x.tar")
    with largest_file(2000), pytest.raises(DiskError, match=r"lora\.safetensors cannot be written"):
        weights.take_out(tmp_path / "x.tar", tmp_path)


@pytest.mark.parametrize("size", [3000, 30_000], ids=["the picture", "the weights"])
def test_a_training_without_room_says_where_and_leaves_nothing(
    size: int,
    work: Path,
    tmp_path: Path,
) -> None:
    pictures = a_zip(tmp_path / "pictures.zip", {"a.bmp": _bitmap(16), "b.bmp": _bitmap(64)})
    file = "b.bmp" if size == 3000 else "lora.safetensors"
    with largest_file(size), pytest.raises(DiskError, match=rf"flux-lora-\w+/.*{file} cannot be written"):
        _run(pictures, tmp_path / "out", resolution="64", preview_prompts="a [trigger]")
    assert list(work.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_training_whose_output_cannot_be_says_so_and_leaves_nothing(
    work: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DiskError, match=r"/out cannot be written: a file is in the way\. Name another folder"):
        _run(
            a_zip(tmp_path / "x.zip", {"a.bmp": _bitmap(64)}),
            tmp_path / "out",
            resolution="64",
            training_steps=1,
            preview_prompts="a house",
        )
    assert (tmp_path / "out").read_text() == "mine"
    assert list(work.iterdir()) == []


def _bitmap(side: int) -> bytes:
    data = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(data, "BMP")
    return data.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_outputs_come_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"earlier")
    os.symlink("/dev/full", tmp_path / f".y.html.{os.getpid()}")
    with pytest.raises(DiskError, match=r"y\.html cannot be written: the disk is full"):
        cli.move_into_place({tmp_path / "x.tar": b"new", tmp_path / "y.html": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    assert (tmp_path / "x.tar").read_bytes() == b"earlier"


def test_a_lora_that_finds_no_room_is_kept_beside_the_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "of the work"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    (folder / "trained_model.tar").write_bytes(b"an hour")
    kept = cli.move_out(folder / "trained_model.tar")
    assert kept == tmp_path / f"trained_model-{os.getpid()}.tar"
    assert kept.read_bytes() == b"an hour"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("output", ["taken/below/x.tar", "taken/x.tar", "/proc/x.tar", "nowhere/x.tar"])
def test_an_output_that_cannot_be_written_is_refused_before_the_training(output: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    a_zip(tmp_path / "pictures.zip", {"a.bmp": _bitmap(64)})
    done = subprocess.run(
        [sys.executable, "-m", "script.train", "-i", "input_images=@pictures.zip", "-o", output],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nothing was started:\n  -o: " in done.stderr
    assert str(Path(output).parent) in done.stderr
