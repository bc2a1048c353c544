import gzip
import io
import os
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest

from lora.pictures import archive, limits

FILES = {"a.jpg": b"picture a", "a.txt": b"caption", "holiday 1/b (2).JPG": b"picture b" * 500}


def a_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def a_tar(path: Path, files: dict[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=form) as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def a_targz(path: Path, files: dict[str, bytes]) -> Path:
    return a_tar(path, files, "w:gz")


def a_windows_zip(path: Path, names: dict[bytes, bytes]) -> Path:
    """Names as raw bytes that nothing marks, as Explorer packs them."""
    marks = {bytes([ord("p") + number]) * len(name): name for number, name in enumerate(names)}
    data = a_zip(path, dict(zip((mark.decode() for mark in marks), names.values(), strict=True))).read_bytes()
    for mark, name in marks.items():
        assert data.count(mark) == 2
        data = data.replace(mark, name)
    path.write_bytes(data)
    return path


MAKERS = [a_zip, a_tar, a_targz]


def unpacked(path: Path, folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in archive.unpack(path, folder)}


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(ValueError, match="input_images") as error:
        archive.unpack(path, folder)
    return str(error.value)


@pytest.mark.parametrize("make", MAKERS)
def test_the_bytes_and_not_the_name_say_what_an_archive_is(make, tmp_path):
    assert unpacked(make(tmp_path / "upload", FILES), tmp_path / "out") == FILES


def test_files_come_back_sorted_and_lie_where_their_names_say(tmp_path):
    files = archive.unpack(a_zip(tmp_path / "x", dict(reversed(FILES.items()))), tmp_path / "out")
    assert files == sorted(tmp_path / "out" / name for name in FILES)


@pytest.mark.parametrize("make", MAKERS)
def test_junk_is_left_out_anywhere_in_the_tree(make, tmp_path):
    junk = ["__MACOSX/._a.jpg", "in/__MACOSX/a.jpg", "in/._a.jpg", ".DS_Store", "in/Thumbs.db", "in/desktop.ini"]
    junk += [".hidden/a.jpg", "in/.a.jpg", "IMG_1.AAE", "Icon\r", "x/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg"]
    files = {**dict.fromkeys(junk, b"junk"), **FILES}
    assert unpacked(make(tmp_path / "x", files), tmp_path / "out") == FILES


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_script_and_length_come_out_of_either_kind_of_tar(form, tmp_path):
    files = {"ein Bär.jpg": b"1", "写真/猫.png": b"2", f"{'deep/' * 30}{'long' * 30}.jpg": b"3", "./dot.jpg": b"4"}
    expected = {name.removeprefix("./"): data for name, data in files.items()}
    assert unpacked(a_tar(tmp_path / "x", files, form=form), tmp_path / "out") == expected


def test_a_tar_name_that_is_not_utf_8_is_read_as_cp437(tmp_path):
    path = a_tar(tmp_path / "x", {"B\udc84r.jpg": b"1"}, form=tarfile.GNU_FORMAT)
    assert set(unpacked(path, tmp_path / "out")) == {"Bär.jpg"}


def test_zip_names_are_utf_8_or_cp437_or_in_their_unicode_field(tmp_path):
    """As WinZip, macOS and WinRAR write them; the same byte string, told apart by flag, form and field."""
    raw = {
        "cp437 Ü.jpg".encode("cp437"): "",
        "macOS U\u0308.jpg".encode(): "",
        "RAR 图.jpg".encode("gbk"): "RAR 图.jpg",
    }
    with zipfile.ZipFile(tmp_path / "x", "w") as out:
        out.writestr("flagged Ü.jpg", b"")  # Python sets the flag
        for mark, (name, unicode) in zip("123", raw.items(), strict=True):
            info = zipfile.ZipInfo(mark * len(name))
            if unicode:
                field = b"\1" + struct.pack("<I", zlib.crc32(name)) + unicode.encode()
                info.extra = struct.pack("<HH", 0x7075, len(field)) + field
            out.writestr(info, b"")
    data = (tmp_path / "x").read_bytes()
    for mark, name in zip(b"123", raw, strict=True):
        data = data.replace(bytes([mark]) * len(name), name)
    (tmp_path / "x").write_bytes(data)
    assert set(unpacked(tmp_path / "x", tmp_path / "out")) == {
        "flagged Ü.jpg", "cp437 Ü.jpg", "macOS Ü.jpg", "RAR 图.jpg",
    }  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_a_name_too_long_for_a_disk_is_cut_and_still_matches_its_caption(make, tmp_path):
    stem = "写" * 100  # 300 bytes, as a Mac or Windows disk allows
    files = unpacked(
        make(tmp_path / "x", {f"{stem}.jpg": b"1", f"{stem}.txt": b"2", f"{stem}!.jpg": b"3"}), tmp_path / "o"
    )
    stems = [name.rsplit(".", 1)[0] for name, data in sorted(files.items(), key=lambda item: item[1])]
    assert stems[0] == stems[1] != stems[2]
    assert all(len(name.encode()) < 256 for name in files)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/etc/passwd.jpg", "absolute"),
        ("C:/a.jpg", "absolute"),
        ("C:\\a.jpg", "absolute"),
        ("\\\\host\\share\\a.jpg", "absolute"),
        ("../a.jpg", "'..'"),
        ("in/../../a.jpg", "'..'"),
        ("in\\..\\..\\a.jpg", "'..'"),
        ("__MACOSX/../../a.jpg", "'..'"),
        ("a\nb.jpg", "control character"),
        ("a\x1b[2J.jpg", "control character"),
        ("x/" * 600 + "a.jpg", "longer than 1,000 bytes"),
        ("./", "no name"),
    ],
)
def test_a_name_that_is_no_safe_relative_path_is_refused(make, name, why, tmp_path):
    if name == "./":
        name = "." if make is a_zip else "./."
    message = refusal(make(tmp_path / "x", {"fine.jpg": b"", name: b"evil"}), tmp_path / "in" / "out")
    assert why in message
    assert repr(name)[1:100] in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "x"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]


def test_a_nul_in_a_name_is_refused_and_not_cut_at(tmp_path):
    path = a_zip(tmp_path / "x", {"a.jpg@.txt": b""})
    path.write_bytes(path.read_bytes().replace(b"a.jpg@.txt", b"a.jpg\0.txt"))
    assert "NUL" in refusal(path, tmp_path / "zip")
    data = bytearray(
        a_tar(tmp_path / "y", {"Ä.jpg@.txt": b""}).read_bytes().replace(b"\x84.jpg@.txt\n", b"\x84.jpg\0.txt\n")
    )
    (tmp_path / "y").write_bytes(data)
    assert "NUL" in refusal(tmp_path / "y", tmp_path / "tar")


def test_backslashes_are_folders_as_old_windows_zips_mean_them(tmp_path):
    assert unpacked(a_zip(tmp_path / "x", {"in\\": b"", "in\\a.jpg": b"1"}), tmp_path / "out") == {"in/a.jpg": b"1"}


def test_the_byte_of_a_backslash_inside_a_japanese_letter_is_none(tmp_path):
    """Windows writes zips in Shift-JIS there, in which the second byte of 表 and many others is that of a backslash."""
    names = [name.encode("cp932") for name in ("表.jpg", "写真の表.jpg", "ソファ.jpg")]
    assert all(b"\\" in name for name in names)
    data = a_zip(tmp_path / "x", {mark * len(name): b"" for mark, name in zip("123", names, strict=True)}).read_bytes()
    for mark, name in zip(b"123", names, strict=True):
        data = data.replace(bytes([mark]) * len(name), name)
    (tmp_path / "x").write_bytes(data)
    found = list(unpacked(tmp_path / "x", tmp_path / "out"))
    assert len(found) == 3
    assert all(name.endswith(".jpg") and "/" not in name for name in found)


WINDOWS = [
    ("cp932", ["新しいフォルダー/写真の表.jpg", "新しいフォルダー/ソファ.txt"]),
    ("gbk", ["新建文件夹/我的狗.jpg", "张伟的照片.jpg"]),
    ("cp950", ["新增資料夾/貓咪的照片.jpg"]),
    ("cp949", ["새 폴더/귀여운 강아지.jpg", "나의 사진.png"]),
    ("cp866", ["Новая папка/Собака 1.jpg", "ФОТО.JPG"]),
    ("cp1251", ["Новая папка/Собака 1.jpg", "кот.jpg"]),
    ("cp850", ["São Paulo/Größe für Zoë.jpg"]),
]


@pytest.mark.parametrize(("page", "names"), WINDOWS, ids=[page for page, _ in WINDOWS])
def test_names_of_a_windows_of_another_language_are_shown_in_its_letters(page, names, tmp_path):
    path = a_windows_zip(tmp_path / "x", {name.encode(page): b"" for name in names})
    assert set(unpacked(path, tmp_path / "out")) == set(names)


def test_bytes_that_look_like_an_a_and_an_A_are_not_one_letter_where_the_code_page_is_guessed(tmp_path):
    """カ is 0x83 J and ニ is 0x83 j in the code page of Japanese Windows."""
    names = {"カ.jpg".encode("cp932"): b"1", "ニ.jpg".encode("cp932"): b"2", "カ/ニ.jpg".encode("cp932"): b"3"}
    assert unpacked(a_windows_zip(tmp_path / "x", names), tmp_path / "out") == {
        "カ.jpg": b"1", "ニ.jpg": b"2", "カ/ニ.jpg": b"3",
    }  # fmt: skip
    nobodys = {b"\xff\xfeJ.jpg": b"1", b"\xff\xfej.jpg": b"2"}
    assert sorted(unpacked(a_windows_zip(tmp_path / "y", nobodys), tmp_path / "more").values()) == [b"1", b"2"]


def test_a_guessed_name_that_ends_like_a_folder_is_none(tmp_path):
    path = a_windows_zip(tmp_path / "x", {"表".encode("cp932"): b"1", "写真.jpg".encode("cp932"): b"2"})
    assert unpacked(path, tmp_path / "out") == {"表": b"1", "写真.jpg": b"2"}


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_devices_and_sparse_files_in_a_tar_are_refused(kind, tmp_path):
    with tarfile.open(tmp_path / "x", "w") as out:
        info = tarfile.TarInfo("odd.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        out.addfile(info)
    assert "'odd.jpg' is a link or a device" in refusal(tmp_path / "x", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_link_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as out:
        info = zipfile.ZipInfo("odd.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        out.writestr(info, "/etc/passwd")
    assert "'odd.jpg' is a link" in refusal(tmp_path / "x", tmp_path / "out")


def test_an_encrypted_entry_is_refused(tmp_path):
    path = a_zip(tmp_path / "x", {"secret.jpg": b"x"})
    data = path.read_bytes()
    for magic, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        start = data.index(magic) + at
        data = data[:start] + b"\1\0" + data[start + 2 :]
    path.write_bytes(data)
    assert "'secret.jpg' is encrypted" in refusal(path, tmp_path / "out")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_compression_without_a_bound_on_memory_is_refused(method, tmp_path):
    assert "zip method" in refusal(a_zip(tmp_path / "x", {"a.jpg": b"x" * 99}, method), tmp_path / "out")


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.jpg", "A.JPG"),
        ("in/a.jpg", "IN/a.jpg"),
        ("é.jpg", unicodedata.normalize("NFD", "é.jpg")),
        ("straße.jpg", "STRASSE.jpg"),
        ("a.jpg", "./a.jpg"),
        ("in/a.jpg", "in\\a.jpg"),
        ("a.jpg", "a.jpg/b.jpg"),
        ("a.jpg/b.jpg", "a.jpg"),
    ],
)
def test_two_entries_that_become_one_name_are_refused(make, one, other, tmp_path):
    message = refusal(make(tmp_path / "x", {one: b"1", other: b"2"}), tmp_path / "out")
    assert f"{other!r} and {one!r} are two entries that become one name" in message


def test_the_same_name_twice_is_refused(tmp_path):
    path = a_zip(tmp_path / "x", {"a.jpg": b"1", "b.jpg": b"2"})
    path.write_bytes(path.read_bytes().replace(b"b.jpg", b"a.jpg"))
    assert "two entries that become one name" in refusal(path, tmp_path / "out")


def test_all_bad_entries_are_named_in_one_message(tmp_path):
    path = a_zip(tmp_path / "x", {"/a.jpg": b"", "fine.jpg": b"", "../b.jpg": b"", "C:/c.jpg": b""})
    message = refusal(path, tmp_path / "out")
    assert all(name in message for name in ("'/a.jpg'", "'../b.jpg'", "'C:/c.jpg'"))
    assert "fine.jpg" not in message
    many = refusal(a_zip(tmp_path / "y", {f"/{n}.jpg": b"" for n in range(99)}), tmp_path / "many")
    assert many.endswith("… and 79 more")


@pytest.mark.parametrize("make", MAKERS)
def test_the_number_of_files_and_of_entries_is_limited_and_junk_counts_for_the_second(make, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_FILES", 3)
    monkeypatch.setattr(limits, "MAX_ENTRIES", 9)
    three = {f"{n}.jpg": b"" for n in range(3)}
    assert len(unpacked(make(tmp_path / "3", {**three, ".junk": b""}), tmp_path / "3out")) == 3
    assert "more than 3 files" in refusal(make(tmp_path / "4", {**three, "4.jpg": b""}), tmp_path / "4out")
    junk = {f".{n}": b"" for n in range(10)}
    assert "more than 9 entries" in refusal(make(tmp_path / "10", junk), tmp_path / "10out")


@pytest.mark.parametrize("make", MAKERS)
def test_the_limit_on_bytes_is_on_all_files_together(make, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", 2**20)
    half = os.urandom(2**19)
    assert len(unpacked(make(tmp_path / "fits", {"a.jpg": half, "b.jpg": half}), tmp_path / "1")) == 2
    message = refusal(make(tmp_path / "over", {"a.jpg": half, "b.jpg": half, "c.jpg": b"1"}), tmp_path / "2")
    assert "GiB unpacked, at 'c.jpg'" in message


def test_headers_of_a_tar_that_are_no_entries_count_too(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ENTRIES", 10)
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    (tmp_path / "x").write_bytes(header.tobuf() * 31 + bytes(1024))
    assert "more than 10 entries" in refusal(tmp_path / "x", tmp_path / "out")


def test_what_a_tar_skips_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", 2**20)
    monkeypatch.setattr(limits, "MAX_ENTRIES", 10)
    assert "GiB unpacked" in refusal(a_targz(tmp_path / "x", {".junk": bytes(3 * 2**20)}), tmp_path / "out")


@pytest.mark.parametrize("make", [a_zip, a_targz])
def test_a_bomb_is_refused_and_a_small_or_honest_entry_is_not(make, tmp_path):
    bomb = make(tmp_path / "bomb", {"fine.jpg": os.urandom(9), "bomb.bmp": bytes(24 * 2**20)})
    assert "'bomb.bmp' unpacks to more than 100 times" in refusal(bomb, tmp_path / "1")
    assert (tmp_path / "1" / "bomb.bmp").stat().st_size <= 12 * 2**20
    flat = make(tmp_path / "flat", {"flat.bmp": bytes(9 * 2**20)})
    assert len(archive.unpack(flat, tmp_path / "2")) == 1
    dull = b"".join(os.urandom(2**8) + bytes(2**13) for _ in range(1400))
    honest = make(tmp_path / "honest", {"dull.bmp": dull})
    assert len(archive.unpack(honest, tmp_path / "3")) == 1


def test_a_size_in_a_header_is_not_believed(tmp_path, monkeypatch):
    path = a_zip(tmp_path / "x", {"liar.jpg": bytes(2**16)})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 2**16), struct.pack("<I", 9)))
    assert "'liar.jpg' is damaged" in refusal(path, tmp_path / "out")
    path.write_bytes(data.replace(struct.pack("<I", 2**16), struct.pack("<I", 2**31)))
    monkeypatch.setattr(limits, "MAX_BYTES", 2**20)
    files = archive.unpack(path, tmp_path / "more")
    assert files[0].stat().st_size == 2**16


def test_a_directory_that_claims_gigabytes_is_not_read(tmp_path):
    path = a_zip(tmp_path / "x", {"a.jpg": b"1"})
    data = bytearray(path.read_bytes())
    data[-10:-6] = struct.pack("<I", 2**31)
    path.write_bytes(bytes(2**31 // 2**20) + data)
    refusal(path, tmp_path / "out")


@pytest.mark.parametrize("make", MAKERS)
def test_an_archive_cut_anywhere_is_refused(make, tmp_path):
    data = make(tmp_path / "x", FILES).read_bytes()
    end = -(-len(data.rstrip(b"\0")) // 512) * 512 if make is a_tar else len(data)  # where a tar's end mark begins
    for cut in sorted({1, 4, 20, *range(30, end, max(1, end // 40)), end - 1}):
        (tmp_path / "cut").write_bytes(data[:cut])
        refusal(tmp_path / "cut", tmp_path / f"out{cut}")


def test_a_tar_without_its_end_mark_is_refused(tmp_path):
    """`tarfile` and others read it without a word, and without what was cut off."""
    data = a_tar(tmp_path / "x", {"a.jpg": b"1", "b.jpg": b"2"}).read_bytes()
    (tmp_path / "x").write_bytes(data[: 2 * 512])
    assert "cut short" in refusal(tmp_path / "x", tmp_path / "out")


def test_a_damaged_header_amid_a_tar_is_not_taken_for_its_end(tmp_path):
    data = bytearray(a_tar(tmp_path / "x", {"a.jpg": b"1", "b.jpg": b"2"}).read_bytes())
    data[2 * 512] ^= 1
    (tmp_path / "x").write_bytes(data)
    assert "damaged" in refusal(tmp_path / "x", tmp_path / "out")


def test_a_targz_is_checked_by_its_checksum(tmp_path):
    data = gzip.compress(a_tar(tmp_path / "x", {"a.jpg": bytes(range(256))}).read_bytes(), compresslevel=0)
    assert data.count(bytes(range(256))) == 1
    (tmp_path / "x").write_bytes(data.replace(bytes(range(256)), bytes(256)))
    assert "incorrect data check" in refusal(tmp_path / "x", tmp_path / "out")


def test_damage_in_a_zip_names_the_entry(tmp_path):
    path = a_zip(tmp_path / "x", {"a.jpg": b"1" * 99, "b.jpg": b"2" * 99}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"2" * 99, b"2" * 98 + b"3"))
    message = refusal(path, tmp_path / "out")
    assert "'b.jpg' is damaged" in message
    assert "a.jpg" not in message


def test_rubbish_after_a_targz_and_a_gzip_in_two_streams_are_read(tmp_path):
    whole = a_tar(tmp_path / "x", FILES).read_bytes()
    (tmp_path / "x").write_bytes(gzip.compress(whole) + b"\0\0 rubbish" * 999)
    assert unpacked(tmp_path / "x", tmp_path / "1") == FILES
    (tmp_path / "x").write_bytes(gzip.compress(whole[:700]) + gzip.compress(whole[700:]))
    assert unpacked(tmp_path / "x", tmp_path / "2") == FILES


@pytest.mark.parametrize("size", [-1, 2**62])
def test_a_tar_header_with_an_impossible_size_is_refused(size, tmp_path):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    (tmp_path / "x").write_bytes(bytes(header) + bytes(1024))
    refusal(tmp_path / "x", tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "the file is empty"),
        (b"Rar!\x1a\7\0", "RAR"),
        (b"\xff\xd8\xff\xe0JFIF", "a single JPEG picture: pack it into a zip"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a single HEIC picture: pack it into a zip"),
        (b"\0\0\0\x1cftypavif", "a single AVIF picture"),
        (b"GIF89a\1\0", "a single GIF picture"),
        (b"II*\0\x08\0\0\0", "a single TIFF picture"),
        (b"MM\0*\0\0\0\x08", "a single TIFF picture"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a single WebP picture"),
        (b"BM\x36\0\0\0\0\0\0\0", "a single BMP picture"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a film"),
        (b"\0\0\0\x14ftypqt  ", "a film"),
        (b"\x1a\x45\xdf\xa3\1", "a film"),
        (b"{\\rtf1\\ansi", "a RTF document"),
        (b"\n<!DOCTYPE html><title>Sign in", "a web page"),
        (b"hello", "b'hello'"),
        (gzip.compress(b"no tar " * 999), "no tar in it"),
    ],
    ids=str,
)
def test_what_is_no_archive_is_told_for_what_it_is(data, what, tmp_path):
    (tmp_path / "pictures.zip").write_bytes(data)
    assert what in refusal(tmp_path / "pictures.zip", tmp_path / "out")


@pytest.mark.parametrize("make", MAKERS)
def test_an_archive_of_hidden_files_alone_says_that_they_are_hidden(make, tmp_path):
    message = refusal(make(tmp_path / "x", {".trash/a.jpg": b"1", "in/._b.jpg": b"2"}), tmp_path / "out")
    assert "every file in the archive is hidden or a system's own" in message
    assert "'.trash/a.jpg', 'in/._b.jpg'" in message


def test_a_folder_is_no_archive(tmp_path):
    (tmp_path / "pictures").mkdir()
    assert "it is a folder" in refusal(tmp_path / "pictures", tmp_path / "out")


def test_a_tar_that_begins_with_a_file_called_pk_is_a_tar(tmp_path):
    assert unpacked(a_tar(tmp_path / "x", {"PK\3\4".replace("\3\4", "1.jpg"): b"1"}), tmp_path / "out") == {
        "PK1.jpg": b"1"
    }


def test_a_cancel_amid_an_entry_leaves_nothing_outside_the_folder(tmp_path, monkeypatch):
    read, calls = zipfile.ZipExtFile.read, []

    def cancelled_read(self, size):
        calls.append(size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, size)

    path = a_zip(tmp_path / "x", FILES)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", cancelled_read)
    with pytest.raises(KeyboardInterrupt):
        archive.unpack(path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def on_a_full_disk(path, mode):
        return open("/dev/full", "wb", buffering=0) if "x" in mode else open(path, mode)

    monkeypatch.setattr(archive, "open", on_a_full_disk, raising=False)
    with pytest.raises(OSError, match="the disk is full"):
        archive.unpack(a_zip(tmp_path / "x", FILES), tmp_path / "out")
