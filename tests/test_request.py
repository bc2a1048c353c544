"""The rules of a request that no single input can check."""

from pathlib import Path
from typing import Any

import pytest

from lora.request import TrainRequest, parse_resolution


def a_request(archive: Path, **changes: Any) -> TrainRequest:
    values: dict[str, Any] = {
        "input_images": archive,
        "trigger_word": "TOK",
        "lora_type": "subject",
        "autocaption": False,
        "autocaption_prefix": "",
        "autocaption_suffix": "",
        "training_steps": 2,
        "learning_rate": None,
        "lora_rank": 4,
        "resolution": None,
        "batch_size": 1,
        "caption_dropout_rate": 0.05,
        "prior_loss_weight": 1.0,
        "seed": 1,
        "preview_every": 0,
        "preview_prompts": "",
        "stop_early": False,
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


@pytest.mark.parametrize("word", ["TOK", "my dog", "猫", "é", "<s1>", "🐶", '"q"'])
def test_a_trigger_word_of_any_script_is_taken(word: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    a_request(tmp_path / "a.zip", trigger_word=word).check()
