import os
import tarfile

import pytest

from lora.result import tarball


def test_the_tar_is_the_same_bytes_for_the_same_files(tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2" * 1000)
    members = {"output/x/b.safetensors": tmp_path / "two", "captions/é.txt": tmp_path / "one"}
    tarball.pack(members, tmp_path / "a.tar")
    os.utime(tmp_path / "one", (1, 1))
    (tmp_path / "one").chmod(0o600)
    tarball.pack(dict(reversed(members.items())), tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "r:") as tar:
        found = [(m.name, m.size, m.mode, m.mtime, m.uid, m.gid, m.uname) for m in tar]
    assert found == [("captions/é.txt", 1, 0o644, 0, 0, 0, ""), ("output/x/b.safetensors", 1000, 0o644, 0, 0, 0, "")]


def test_a_tar_that_fails_leaves_the_earlier_one_and_no_part(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"earlier")
    with pytest.raises(FileNotFoundError):
        tarball.pack({"a": tmp_path / "missing"}, tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == b"earlier"
