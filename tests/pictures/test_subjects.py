"""Several subjects: whose picture is whose, by the folders."""

from pathlib import Path

import pytest

from lora.pictures import subjects
from lora.pictures.photos import Photo


def shared(words: list[str], *names: str) -> dict[str, tuple[str | None, str | None]]:
    photos = [Photo(name=name, path=Path(name), caption=None) for name in names]
    found, _ = subjects.share_out(photos, words)
    return {photo.name: (photo.word, photo.class_noun) for photo in found}


def test_a_picture_is_of_the_word_whose_folder_it_lies_in() -> None:
    assert shared(["ANNA", "BOB"], "set/ANNA/1.jpg", "set/anna/close/2.jpg", "set/Bob/1.jpg") == {
        "set/ANNA/1.jpg": ("ANNA", None),
        "set/anna/close/2.jpg": ("ANNA", None),
        "set/Bob/1.jpg": ("BOB", None),
    }


def test_kohyas_folders_name_word_and_class_and_the_longer_word_wins() -> None:
    assert shared(["ANNA", "ANNA2", "my dog"], "10_ANNA woman/1.jpg", "3_ANNA2/1.jpg", "5_my dog spaniel/1.jpg") == {
        "10_ANNA woman/1.jpg": ("ANNA", "woman"),
        "3_ANNA2/1.jpg": ("ANNA2", None),
        "5_my dog spaniel/1.jpg": ("my dog", "spaniel"),
    }


def test_a_noun_counts_where_all_folders_of_a_word_have_it() -> None:
    names = ("2_ANNA woman/1.jpg", "ANNA/1.jpg", "BOB man/1.jpg", "4_BOB man/1.jpg")
    assert {noun for _, noun in shared(["ANNA", "BOB"], *names).values()} == {None, "man"}


def test_folders_of_a_mac_match_words_with_accents() -> None:
    assert shared(["Ren\u00e9", "BOB"], "Rene\u0301/1.jpg", "BOB/1.jpg")["Rene\u0301/1.jpg"] == ("Ren\u00e9", None)


def test_folders_that_do_not_match_the_words_are_named_with_them() -> None:
    with pytest.raises(ValueError, match=r"input_images: trigger_word has 2 words, 'ANNA', 'BOB'") as told:
        shared(["ANNA", "BOB"], "ANNA/1.jpg", "Bobby/1.jpg", "2.jpg")
    assert "there is no folder for 'BOB' and pictures lie in folders of other names: '(no folder)', 'Bobby'" in str(
        told.value
    )
    assert "or give one trigger_word" in str(told.value)
