from pathlib import Path

import pytest

from lora.pictures import archive, limits, photos


def laid_out(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def captions(folder: Path, files: dict[str, bytes]) -> dict[str, str | None]:
    found, warnings = photos.pair(folder, laid_out(folder, files))
    assert warnings == []
    return {photo.name: photo.caption for photo in found}


def refusal(folder: Path, files: dict[str, bytes]) -> str:
    with pytest.raises(ValueError, match="input_images") as error:
        photos.pair(folder, laid_out(folder, files))
    return str(error.value)


def test_a_txt_beside_a_picture_is_its_caption(tmp_path):
    files = {"b.png": b"", "a.jpg": b"", "a.txt": b"a TOK"}
    assert captions(tmp_path, files) == {"a.jpg": "a TOK", "b.png": None}


def test_photos_come_sorted_with_the_files_they_name(tmp_path):
    found, _ = photos.pair(tmp_path, laid_out(tmp_path, {"b.png": b"", "in/c.png": b"", "a.jpg": b""}))
    assert [(photo.name, photo.path) for photo in found] == [
        (name, tmp_path / name) for name in ("a.jpg", "b.png", "in/c.png")
    ]


@pytest.mark.parametrize("text", ["a.txt", "a.TXT", "A.txt", "a.jpg.txt", "a.JPG.Txt"])
@pytest.mark.parametrize("picture", ["a.jpg", "a.JPG"])
def test_case_and_a_double_suffix_do_not_matter(picture, text, tmp_path):
    assert captions(tmp_path, {picture: b"", text: b"mine"}) == {picture: "mine"}


@pytest.mark.parametrize("suffix", sorted(photos.PICTURE_SUFFIXES))
def test_every_kind_of_picture_is_one_in_any_case(suffix, tmp_path):
    assert list(captions(tmp_path, {f"a{suffix.upper()}": b""})) == [f"a{suffix.upper()}"]


def test_a_caption_belongs_to_the_picture_in_its_own_folder(tmp_path):
    files = {"x/a.jpg": b"", "y/a.jpg": b"", "y/a.txt": b"in y", "v1.5 final.jpg": b"", "v1.5 final.txt": b"dots"}
    assert captions(tmp_path, files) == {"v1.5 final.jpg": "dots", "x/a.jpg": None, "y/a.jpg": "in y"}


def test_a_byte_order_mark_line_ends_and_outer_blanks_go_and_nothing_else(tmp_path):
    data = "\ufeff  Ein TOK,\r\nzwei\u2028 Zeilen  \r\n".encode()
    assert captions(tmp_path, {"a.jpg": b"", "a.txt": data}) == {"a.jpg": "Ein TOK,\nzwei\u2028 Zeilen"}


def test_control_characters_in_a_caption_do_not_reach_the_terminal(tmp_path):
    data = "a dog\x1b]0;mine\x07\x9b31m,\n\ta cat".encode()
    assert captions(tmp_path, {"a.jpg": b"", "a.txt": data}) == {"a.jpg": "a dog ]0;mine  31m,\n\ta cat"}


@pytest.mark.parametrize("data", [b"", b" \r\n\t", b"\xef\xbb\xbf"])
def test_an_empty_caption_is_a_missing_one_with_a_warning(data, tmp_path):
    found, warnings = photos.pair(tmp_path, laid_out(tmp_path, {"a.jpg": b"", "a.txt": data}))
    assert found[0].caption is None
    assert warnings == ["empty captions, treated as missing: 'a.txt'"]


def test_a_caption_without_a_picture_is_a_warning(tmp_path):
    found, warnings = photos.pair(tmp_path, laid_out(tmp_path, {"a.jpg": b"", "b.txt": b"", "in/a.txt": b"x"}))
    assert [photo.caption for photo in found] == [None]
    assert warnings == ["captions without a picture beside them, not used: 'b.txt', 'in/a.txt'"]


def test_one_caption_for_two_pictures_is_refused_and_both_are_named(tmp_path):
    message = refusal(tmp_path, {"a.jpg": b"", "a.png": b"", "a.txt": b"x"})
    assert "'a.txt' could belong to 'a.jpg' or 'a.png': name it 'a.jpg.txt' or 'a.png.txt'" in message


def test_two_pictures_of_one_stem_have_their_captions_by_full_name(tmp_path):
    files = {"a.jpg": b"", "a.png": b"", "a.jpg.txt": b"jpg", "a.png.txt": b"png"}
    assert captions(tmp_path, files) == {"a.jpg": "jpg", "a.png": "png"}


def test_two_captions_for_one_picture_are_refused(tmp_path):
    message = refusal(tmp_path, {"a.jpg": b"", "a.jpg.txt": b"1", "a.txt": b"2"})
    assert "'a.jpg' has two captions, 'a.jpg.txt' and 'a.txt'" in message


@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_caption_is_read_as_windows_notepad_saves_it(form, tmp_path):
    assert captions(tmp_path, {"a.jpg": b"", "a.txt": "Bär im Schnee\r\n".encode(form)}) == {"a.jpg": "Bär im Schnee"}


@pytest.mark.parametrize(
    "data", ["Bär".encode("latin-1"), "no mark".encode("utf-16-le"), "x".encode("utf-32"), "x".encode("utf-16")[:-1]]
)
def test_a_caption_that_is_not_utf_8_is_refused_by_name(data, tmp_path):
    assert "'in/a.txt' " in refusal(tmp_path, {"in/a.jpg": b"", "in/a.txt": data})


def test_a_caption_may_have_ten_thousand_bytes_and_no_more(tmp_path):
    most = limits.MAX_CAPTION_BYTES
    assert len(captions(tmp_path / "1", {"a.jpg": b"", "a.txt": b"x" * most})["a.jpg"] or "") == most
    assert "'a.txt' is longer than 10,000 bytes" in refusal(tmp_path / "2", {"a.jpg": b"", "a.txt": b"x" * (most + 1)})


def test_unknown_kinds_of_file_are_all_named_at_once(tmp_path):
    message = refusal(tmp_path, {"a.jpg": b"", "b.mov": b"", "in/c.pdf": b"", "d": b""})
    assert "'b.mov', 'd', 'in/c.pdf'" in message
    assert "a.jpg" not in message


def test_without_pictures_it_says_what_was_found(tmp_path):
    message = refusal(tmp_path, {"a.mov": b"", "b.MOV": b"", "c.txt": b"", "README": b""})
    assert "no pictures" in message
    assert "it holds 2 .mov, 1 .txt, 1 without a suffix" in message
    assert "no files at all" in refusal(tmp_path, {})


def test_all_faults_come_in_one_message(tmp_path):
    files = {"a.jpg": b"", "a.png": b"", "a.txt": b"", "b.mov": b"", "c.jpg": b"", "c.txt": b"\xff", "d.jpg": b""}
    message = refusal(tmp_path, {**files, "d.txt": b"x" * 10_001})
    assert all(name in message for name in ("'a.txt'", "'b.mov'", "'c.txt'", "'d.txt'"))


def test_the_real_photographs_keep_the_captions_of_their_archive(photographs, tmp_path):
    found, warnings = photos.pair(tmp_path, archive.unpack(photographs / "backpack-nested.zip", tmp_path))
    assert warnings == []
    assert {photo.name: photo.caption for photo in found if photo.caption} == {
        "backpack dog/IMG_00.JPG": "A photo of TOK backpack on a wooden chair by a window",
        "backpack dog/IMG_01.JPG": "a red dog-shaped backpack hanging in a hallway",
    }
    assert len(found) == 5
