"""The rules of a request that no single input can check."""

from pathlib import Path
from typing import Any

import pytest

from lora import trigger
from lora.request import Secrets, TrainRequest, parse_resolution


def a_request(archive: Path, **changes: Any) -> TrainRequest:
    values: dict[str, Any] = {
        "input_images": archive,
        "trigger_word": "TOK",
        "lora_type": "subject",
        "mode": None,
        "priority": "quality",
        "captioning": "disabled",
        "subject_crop": True,
        "autocaption_prefix": "",
        "autocaption_suffix": "",
        "training_steps": 2,
        "finetune_type": "lora",
        "learning_rate": None,
        "lora_rank": 4,
        "resolution": None,
        "batch_size": 1,
        "caption_dropout_rate": 0.05,
        "preservation": "1",
        "seed": 1,
        "checkpoints": "best",
        "preview_every": 0,
        "preview_prompts": "",
        "layers_to_optimize_regex": None,
        "resume_from": None,
        "hf_repo_id": None,
        "hf_private": True,
        "wandb_project": None,
        "wandb_run": None,
        "wandb_entity": None,
    }
    return TrainRequest(**{**values, **changes})


def test_resolutions_are_sorted_and_counted_once() -> None:
    assert parse_resolution("1024, 512,768,512") == (512, 768, 1024)


@pytest.mark.parametrize("bad", ["", "512,", "x", "100", "48", "4096", "-512", "5e2", "½", "512;768"])
def test_a_bad_resolution_is_named_with_what_is_allowed(bad: str) -> None:
    with pytest.raises(ValueError, match=r"resolution: .*multiple of 16 from 64 to 2048"):
        parse_resolution(bad)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    request = a_request(
        tmp_path / "gone.zip", trigger_word="  ", lora_type="face", resolution="17", autocaption_prefix="a\nb"
    )
    with pytest.raises(ValueError, match="input_images") as caught:
        request.check()
    for name in ("input_images", "trigger_word", "lora_type", "resolution", "autocaption_prefix", "gone.zip"):
        assert name in str(caught.value)


@pytest.mark.parametrize("word", ["TOK", "my dog", "猫", "é", "<s1>", "🐶", "👨‍👩‍👧", "می‌خواهم", "a\u00a0b"])
def test_a_trigger_word_of_any_script_is_taken(word: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    a_request(tmp_path / "a.zip", trigger_word=word).check()


@pytest.mark.parametrize("word", [".", "...", "?!", "\u200d", "。"])
def test_a_trigger_word_of_punctuation_alone_is_refused(word: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"trigger_word: .* is punctuation alone; give a word"):
        a_request(tmp_path / "a.zip", trigger_word=word).check()


def test_more_previews_than_a_report_can_show_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    a_request(tmp_path / "a.zip", training_steps=6000, preview_every=100).check()
    with pytest.raises(ValueError, match=r"preview_every: 50 of 6000 steps .* give 100 or more, or 0"):
        a_request(tmp_path / "a.zip", training_steps=6000, preview_every=50).check()


@pytest.mark.parametrize("repo", ["me/my-lora", "m/x", "my.org/a_b.c-1", "A1/" + "x" * 96])
def test_a_repository_of_the_hub_is_owner_and_name(repo: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    a_request(tmp_path / "a.zip", hf_repo_id=repo).check(Secrets(hf_token="hf_x"))


@pytest.mark.parametrize(
    "repo", ["my-lora", "me/", "/x", "me/a b", "me/a/b", "me/a--b", "me/.x", "me/x.", "é/x", "me/" + "x" * 97]
)
def test_any_other_text_is_refused_as_a_repository(repo: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"hf_repo_id: .* is not owner/name"):
        a_request(tmp_path / "a.zip", hf_repo_id=repo).check(Secrets(hf_token="hf_x"))


def test_a_repository_needs_a_token_and_a_token_may_serve_for_the_base_alone(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^hf_token: it is needed"):
        a_request(tmp_path / "a.zip", hf_repo_id="me/x").check()
    a_request(tmp_path / "a.zip").check(Secrets(hf_token="hf_x"))


@pytest.mark.parametrize("secret", ["hf_a b", "hf_a\n", "hf_é", "hf_a\x00"])
def test_what_can_be_no_token_is_refused_without_being_shown(secret: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^hf_token: .*\nwandb_api_key: ") as caught:
        a_request(tmp_path / "a.zip").check(Secrets(hf_token=secret, wandb_api_key=secret))
    assert "hf_a" not in str(caught.value)
    assert "é" not in str(caught.value)


def test_the_names_for_wandb_without_its_key_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    request = a_request(tmp_path / "a.zip", wandb_project="p", wandb_entity="e")
    request.check()
    [warning] = request.warnings()
    assert warning.startswith("wandb_project, wandb_entity: without wandb_api_key nothing is shown")
    assert request.warnings(Secrets(wandb_api_key="k")) == []
    assert a_request(tmp_path / "a.zip").warnings() == []


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("a photo of my dog", r"'a photo of my dog' is a sentence of 5 words"),
        ("My dog Rex.", r"'My dog Rex\.' is a sentence of 3 words"),
        ("[trigger]", r"\[trigger\] only stands for the trigger word"),
        ("my [TRIGGER]", r"\[trigger\] only stands for the trigger word"),
        ("T\u200bOK", r"has invisible characters \(U\+200B\) around it or in it; give 'TOK'"),
        ('"TOK"', r"has quotes or commas around it or in it; give 'TOK'"),
        ("TOK ", r"has spaces around it or in it; give 'TOK'"),
        ("TO\nK", r"holds a line break or control character"),
        ("ANNA,, BOB", r"'ANNA,, BOB' has nothing between two commas"),
        ("ANNA, a photo of my dog", r"of the 2 words between commas 'a photo of my dog' is a sentence of 5 words"),
        ("ANNA, anna", r"'ANNA' is part of 'anna', so captions cannot tell the two apart"),
        ("dog, my dog", r"'dog' is part of 'my dog'"),
        ('ANNA, "BOB"', r"'\"BOB\"' has quotes or commas around it or in it; give 'BOB'"),
    ],
)
def test_what_is_no_trigger_word_is_refused_with_what_to_give(word: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^trigger_word: .*{told}"):
        a_request(tmp_path / "a.zip", trigger_word=word).check()


def test_several_trigger_words_stand_between_commas(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    a_request(tmp_path / "a.zip", trigger_word="ANNA, BOB,my dog").check()
    assert trigger.words("ANNA, BOB，my dog") == ("ANNA", "BOB", "my dog")
    assert trigger.words("TOK") == ("TOK",)


def test_what_came_in_place_of_an_archive_is_told_without_its_secrets(tmp_path: Path) -> None:
    for given, told in (
        (tmp_path, "is a folder; give a zip"),
        (tmp_path / "gone.zip", "no file"),
        (Path("https://u:SECRET@example.com/x.zip?sig=SECRET"), "is an address that could not be fetched"),
    ):
        with pytest.raises(ValueError, match=r"^input_images: ") as caught:
            a_request(given).check()
        assert told in str(caught.value)
        assert "SECRET" not in str(caught.value)


def test_contradictions_are_told_with_the_other_faults(tmp_path: Path) -> None:
    faults = ("steps: it means the same as training_steps",)
    with pytest.raises(ValueError, match=r"(?s)^steps: .*input_images: .*priority: 'fast' is not one of"):
        a_request(tmp_path / "gone.zip", priority="fast", faults=faults).check()


def test_no_steps_make_sense_with_an_earlier_lora_alone(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="training_steps: 0 only packs the LoRA of resume_from"):
        a_request(tmp_path / "a.zip", training_steps=0).check()
    a_request(tmp_path / "a.zip", training_steps=0, resume_from="me/x").check()


@pytest.mark.parametrize(
    "source",
    [
        "me/x",
        "me/x/sub/lora.safetensors",
        "https://example.com/trained_model.tar?sig=1",
        "HTTPS://x.org/a",
        "Data:;base64,AA==",
    ],
)
def test_an_earlier_lora_is_a_hub_id_or_a_url(source: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    a_request(tmp_path / "a.zip", resume_from=source).check()


@pytest.mark.parametrize(
    "source",
    ["gone.safetensors", "http://u:SECRET@example.com/x.tar?SECRET", "file:///etc/passwd", "me//x", "x" * 300],
)
def test_an_earlier_lora_that_is_nothing_of_this_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"resume_from: .* is no file here") as caught:
        a_request(tmp_path / "a.zip", resume_from=source).check()
    assert "SECRET" not in str(caught.value)


def test_a_broken_regular_expression_is_told_with_an_example(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"layers_to_optimize_regex: '\(' is no regular expression .*proj_out"):
        a_request(tmp_path / "a.zip", layers_to_optimize_regex="(").check()
    with pytest.raises(ValueError, match=r"layers_to_optimize_regex: .* is no regular expression"):
        a_request(tmp_path / "a.zip", layers_to_optimize_regex="a{99999999999999999999}").check()


def test_secrets_do_not_show_themselves() -> None:
    shown = repr(Secrets(hf_token="hf_secret", wandb_api_key="w_secret"))
    assert "secret" not in shown.lower().replace("secrets", "")


def test_a_full_fine_tuning_cannot_go_on_from_a_lora_and_every_fault_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    a_request(tmp_path / "a.zip", finetune_type="full", layers_to_optimize_regex="proj_out").check()
    with pytest.raises(
        ValueError, match=r"(?s)resolution.*finetune_type: full starts from the base and cannot continue"
    ):
        a_request(tmp_path / "a.zip", finetune_type="full", resume_from="me/lora", resolution="7").check()
    with pytest.raises(ValueError, match="finetune_type: 'half' is not one of lora, full"):
        a_request(tmp_path / "a.zip", finetune_type="half").check()
