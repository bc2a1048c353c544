from pathlib import Path

import pytest

from lora.pictures import archive, limits, photos, subjects


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


def test_a_caption_without_a_picture_is_a_warning_where_others_have_theirs(tmp_path):
    files = {"a.jpg": b"", "a.txt": b"y", "b.txt": b"", "in/a.txt": b"x"}
    found, warnings = photos.pair(tmp_path, laid_out(tmp_path, files))
    assert [photo.caption for photo in found] == ["y"]
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


def paired(folder: Path, files: dict[str, bytes]) -> tuple[dict[str, photos.Photo], str]:
    found, warnings = photos.pair(folder, laid_out(folder, files))
    return {photo.name: photo for photo in found}, "\n".join(warnings)


TREES = [
    ({"images/1.jpg": b"", "images/2.jpg": b"", "captions/1.txt": b"one"}, {"images/1.jpg": "one"}),
    ({"set/img/1.JPG": b"", "set/txt/1.txt": b"one"}, {"set/img/1.JPG": "one"}),
    ({"images/1.jpg": b"", "1.txt": b"one", "cover.png": b""}, {"images/1.jpg": "one"}),
    ({"images/1.jpg": b"", "1.png": b"", "text/1.jpg.txt": b"one"}, {"images/1.jpg": "one"}),
    (  # the nearest of several
        {f"{kind}/{day}/1.{kind}": day.encode() for kind in ("jpg", "txt") for day in ("mon", "tue")},
        {"jpg/mon/1.jpg": "mon", "jpg/tue/1.jpg": "tue"},
    ),
    (
        {f"{day}/{kind}/1.{kind}": day.encode() for kind in ("jpg", "txt") for day in ("mon", "tue")},
        {"mon/jpg/1.jpg": "mon", "tue/jpg/1.jpg": "tue"},
    ),
]


@pytest.mark.parametrize(("files", "expected"), TREES)
def test_captions_in_a_folder_of_their_own_are_matched_by_name_and_it_is_said(files, expected, tmp_path):
    found, told = paired(tmp_path, files)
    assert {name: photo.caption for name, photo in found.items() if photo.caption} == expected
    assert f"captions in another folder than their pictures, matched by name: {len(expected)}, such as " in told


def test_a_caption_that_could_belong_to_pictures_of_two_folders_is_refused(tmp_path):
    message = refusal(tmp_path, {"x/a.jpg": b"", "y/a.jpg": b"", "captions/a.txt": b"x"})
    assert "'captions/a.txt' could belong to 'x/a.jpg' or 'y/a.jpg'" in message


def test_a_caption_left_behind_among_others_is_not_given_to_a_picture_of_another_folder(tmp_path):
    files = {"x/1.jpg": b"", "y/2.jpg": b"", "y/2.txt": b"two", "y/1.txt": b"of y/1.jpg, which is gone"}
    found, told = paired(tmp_path, files)
    assert found["x/1.jpg"].caption is None
    assert "not used: 'y/1.txt'" in told


@pytest.mark.parametrize("lost", [{"captions/img1.txt": b"x", "captions/img2.txt": b"y"}, {"c.txt": b"x"}])
def test_captions_of_which_not_one_matches_stop_it(lost, tmp_path):
    message = refusal(tmp_path, {"images/IMG_1.jpg": b"", "images/IMG_2.jpg": b"", **lost})
    assert "captions are there, but not one has the name of a picture" in message
    assert "Name each as its picture, such as 'images/IMG_1.txt'" in message


def test_a_readme_is_no_lost_caption(tmp_path):
    found, told = paired(tmp_path, {"a.jpg": b"", "README.txt": b"my pictures", "docs/LICENSE.txt": b""})
    assert list(found) == ["a.jpg"]
    assert "not used: 'README.txt', 'docs/LICENSE.txt'" in told


def test_letters_that_only_look_alike_in_another_case_are_not_matched(tmp_path):
    """As a wrong guess of a code page may show them: the bytes behind them are other letters."""
    assert "not one has the name" in refusal(tmp_path, {"âJ.jpg": b"", "âj.txt": b"of another picture"})
    assert captions(tmp_path / "2", {"犬/IMG.JPG": b"", "犬/img.txt": b"x"}) == {"犬/IMG.JPG": "x"}


def test_a_caption_file_is_a_caption_too(tmp_path):
    assert captions(tmp_path, {"a.jpg": b"", "a.caption": b"mine"}) == {"a.jpg": "mine"}
    assert "two captions" in refusal(tmp_path / "2", {"a.jpg": b"", "a.caption": b"1", "a.txt": b"2"})
    assert captions(tmp_path / "3", {"a.jpg": b"", "a.caption": b"same", "a.txt": b"same\n"}) == {"a.jpg": "same"}


JSONL = '{"file_name": "a.jpg", "text": "a TOK"}\n\n{"file_name": "in/b.png", "text": "b\\u2028 TOK", "more": [1]}\n'
TABLES = {
    "metadata.jsonl": JSONL,
    "metadata.csv": "file_name,text\na.jpg,a TOK\nin/b.png,b\u2028 TOK\n",
    "captions.csv": '\ufeffimage;caption\r\nA.JPG;"a TOK"\r\nb.png;b\u2028 TOK\r\n',
    "captions.tsv": "caption\tfile\na TOK\ta\nb\u2028 TOK\tC:\\me\\in\\b.png\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_captions_come_from_a_table(name, tmp_path):
    files = {"a.jpg": b"", "in/b.png": b"", "c.png": b"", name: TABLES[name].encode()}
    assert captions(tmp_path, files) == {"a.jpg": "a TOK", "c.png": None, "in/b.png": "b\u2028 TOK"}


def test_a_table_names_pictures_from_its_own_folder(tmp_path):
    table = b'{"file_name": "1.jpg", "text": "in y"}'
    files = {"x/1.jpg": b"", "y/1.jpg": b"", "y/metadata.jsonl": table}
    assert captions(tmp_path, files) == {"x/1.jpg": None, "y/1.jpg": "in y"}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("metadata.jsonl", b"not json", "line 1, is no JSON"),
        ("metadata.jsonl", b'\n{"file_name": "a.jpg", "text": 3}', "line 2: write"),
        ("metadata.jsonl", b"[" * 99_999, "is no JSON"),
        ("metadata.jsonl", b'{"text": "x"}', "line 1: write"),
        ("captions.csv", b"a.jpg,a TOK", "needs the headings file_name and text"),
        ("captions.csv", b"file_name,text\na.jpg," + b"x" * 10_001, "longer than 10,000 bytes"),
        ("captions.csv", b"file_name,text\na.jpg," + b"x" * 200_000, "cannot be read as a table"),
        ("captions.csv", b"file_name,text\nz.jpg,a TOK", "not one has the name of a picture: \"'z.jpg' in"),
        ("captions.csv", b"\xff\xff", "is not UTF-8"),
        ("captions.csv", b"file_name,text\na.jpg,another", "'a.jpg' has two captions, 'a.txt' and 'captions.csv'"),
    ],
    ids=range(10),
)
def test_a_table_that_cannot_be_used_says_why(name, content, why, tmp_path):
    files = {"a.jpg": b"", **({"a.txt": b"mine"} if "another" in str(content) else {}), name: content}
    assert why in refusal(tmp_path, files)


@pytest.mark.parametrize(
    ("data", "kind"), [(b"{\\rtf1\\ansi a TOK}", "RTF document"), (b"%PDF-1.4", "PDF"), (b"PK\3\4", "zip archive")]
)
def test_a_caption_that_is_a_document_is_refused_by_its_kind(data, kind, tmp_path):
    assert f"'a.txt' is a {kind}, not plain text" in refusal(tmp_path, {"a.jpg": b"", "a.txt": data})


MASKS = ["p.mask.png", "p_mask.jpg", "p-masklabel.png", "p-mask.png", "p.jpg.mask.png", "P_MASK.PNG"]
MASKS += ["masks/p.png", "mask/p_mask.png"]


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_belongs_to_its_picture_and_is_none(mask, tmp_path):
    found, told = paired(tmp_path, {"p.jpg": b"", "q.jpg": b"", mask: b""})
    assert {name: photo.mask for name, photo in found.items()} == {"p.jpg": tmp_path / mask, "q.jpg": None}
    assert f"1 mask found, such as {mask!r} for 'p.jpg'" in told
    assert "what is black in one counts a tenth of what is white" in told


def test_a_mask_of_two_pictures_and_two_masks_of_one_are_refused(tmp_path):
    message = refusal(tmp_path, {"p.jpg": b"", "p.png": b"", "p_mask.png": b"", "q.jpg": b""})
    assert "the mask 'p_mask.png' could belong to 'p.jpg' or 'p.png'" in message
    message = refusal(tmp_path / "2", {"p.jpg": b"", "p_mask.png": b"", "p.mask.png": b""})
    assert "'p.jpg' has two masks" in message


def test_a_mask_whose_picture_is_missing_is_left_out(tmp_path):
    found, told = paired(tmp_path, {"p.jpg": b"", "p_mask.png": b"", "q_mask.png": b""})
    assert list(found) == ["p.jpg"]
    assert "masks without their picture, left out: 'q_mask.png'" in told
    found, told = paired(tmp_path / "2", {"p.jpg": b"", "q-masklabel.png": b""})
    assert list(found) == ["p.jpg"]


def test_the_picture_of_a_gas_mask_is_a_picture_and_masks_in_a_folder_of_their_own_are_too(tmp_path):
    found, told = paired(tmp_path, {"gas_mask.jpg": b"", "dog.jpg": b""})
    assert list(found) == ["dog.jpg", "gas_mask.jpg"]
    assert "trained as a picture: 'gas_mask.jpg'" in told
    assert len(paired(tmp_path / "2", {f"masks/venice {n}.jpg": b"" for n in range(3)})[0]) == 3


REGULARISATION = ["reg", "Reg_Images", "regularization", "regularisation_images", "regularization images"]
REGULARISATION += ["class_images", "1_reg", "x/reg/1_dog", "class-imgs", "reg_data", "reg_woman"]


@pytest.mark.parametrize("folder", REGULARISATION)
def test_regularisation_pictures_are_left_out_by_the_name_of_their_folder(folder, tmp_path):
    files = {"img/a.jpg": b"", "img/a.txt": b"TOK", f"{folder}/r.jpg": b"", f"{folder}/r.txt": b"a dog"}
    found, told = paired(tmp_path, files)
    assert {name: photo.caption for name, photo in found.items()} == {"img/a.jpg": "TOK"}
    assert f"2 files of regularisation pictures left out, they do not show the subject: {folder!r}" in told


@pytest.mark.parametrize("folder", ["regular", "regina", "class", "regatta images", "class of 1999"])
def test_folders_that_are_called_nearly_so_are_not_left_out(folder, tmp_path):
    assert list(captions(tmp_path, {f"{folder}/a.jpg": b""})) == [f"{folder}/a.jpg"]


def test_where_all_are_regularisation_pictures_it_says_so(tmp_path):
    assert "rename their folder if they show the subject" in refusal(tmp_path, {"reg/a.jpg": b""})


def test_kohyas_folders_say_repeats_word_and_class(tmp_path):
    files = {"img/10_ANNA woman/a.jpg": b"", "img/4_ANNA red coat/b.jpg": b"", "c.jpg": b"", "6_BOB/d.jpg": b""}
    found, told = paired(tmp_path, files)
    read = [(photo.repeats, photo.word, photo.class_noun) for photo in found.values()]
    assert read == [(6, "BOB", None), (1, None, None), (10, "ANNA", "woman"), (4, "ANNA", "red coat")]
    assert photos.weights(list(found.values())) == dict(zip(found, (6, 1, 10, 4), strict=True))
    assert "in the ratio '' 1, '6_BOB' 6, 'img/10_ANNA woman' 10, 'img/4_ANNA red coat' 4" in told
    same, told = subjects.share_out(list(found.values()), ["TOK"])
    assert {(photo.word, photo.class_noun) for photo in same} == {("TOK", None)}
    assert "are not used, because trigger_word is: 'ANNA red coat', 'ANNA woman', 'BOB'" in told[0]


def test_repeats_count_only_beside_one_another(tmp_path):
    found, told = paired(tmp_path, {"10_a b/1.jpg": b"", "4_a b/2.jpg": b""})
    assert list(photos.weights(list(found.values())).values()) == [5, 2]
    found, told = paired(tmp_path / "2", {"10_a b/1.jpg": b"", "10_c d/2.jpg": b""})
    assert set(photos.weights(list(found.values())).values()) == {1}
    assert "repeats by folders' names are 10 for every picture, which changes nothing" in told


@pytest.mark.parametrize("folder", ["2024_summer", "01_front", "0_x", "10", "10_", "10 ANNA", "x10_ANNA"])
def test_other_numbers_in_front_of_a_folders_name_are_no_repeats(folder, tmp_path):
    found, told = paired(tmp_path, {f"{folder}/a.jpg": b""})
    assert [(photo.repeats, photo.word) for photo in found.values()] == [(1, None)]
    assert told == ""


BYTES = {
    "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "WebP": b"RIFF\0\0\0\0WEBPVP8 ",
    "GIF": b"GIF89a",
    "HEIC": b"\0\0\0\x18ftypheic",
}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", ["photo1", "a.jpg_large", "a.pjpeg", "a.jpg!d", "IMG 2026.11.01", "a.image"])
def test_a_picture_without_a_usual_suffix_is_known_by_its_bytes(name, kind, tmp_path):
    files = {name: BYTES[kind], f"{name}.txt": b"mine"}
    assert captions(tmp_path, files) == {name: "mine"}


def test_a_raw_file_of_a_camera_is_no_tiff_and_a_film_no_heic(tmp_path):
    message = refusal(tmp_path, {"a.jpg": b"", "b.nef": b"II*\0\x08\0\0\0", "c.heics": b"\0\0\0\x20ftypmp42"})
    assert "'b.nef'" in message
    assert "a film, leave it out or save some of its frames as pictures: 'c.heics'" in message


TAKEOUT = b'{"title": "IMG_1.jpg", "photoTakenTime": {"timestamp": "1"}, "geoData": {}}'


def test_the_side_files_of_a_phones_backup_are_left_out(tmp_path):
    names = ["IMG_1.jpg.json", "IMG_1.jpg.supplemental-metadata.json", "IMG_1.jpg.suppl.json", "IMG_1.json"]
    names += ["IMG_1.jpg(1).json"]
    others = {"metadata.json": TAKEOUT, "Photo Details-1.csv": b"imgName,fileChecksum\nIMG_1.jpg,x"}
    found, told = paired(tmp_path, {"IMG_1.jpg": b"", **dict.fromkeys(names, b"{}"), **others})
    assert list(found) == ["IMG_1.jpg"]
    assert "7 files that a phone's backup keeps beside its pictures left out" in told


def test_other_json_is_not_dropped(tmp_path):
    assert "'captions.json'" in refusal(tmp_path, {"a.jpg": b"", "captions.json": b'{"a.jpg": "a TOK"}'})
    assert "'x.json'" in refusal(tmp_path / "2", {"a.jpg": b"", "x.json": b"[" * 99_999})


def test_an_archive_in_an_archive_and_rich_text_are_named_as_such(tmp_path):
    files = {"a.jpg": b"", "in.zip": b"PK\3\4 more", "b.rtf": b"{\\rtf1", "c.mov": b"\0\0\0\x14ftypqt  "}
    message = refusal(tmp_path, files)
    assert "a zip archive in the archive, unpack it and pack the pictures themselves: 'in.zip'" in message
    assert "rich text (RTF), save captions as plain text, .txt: 'b.rtf'" in message
    assert "a film, leave it out or save some of its frames as pictures: 'c.mov'" in message


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
