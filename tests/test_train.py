"""What `train.py` does beside the job: its log, where the job fails."""

import logging
from pathlib import Path
from typing import Any

import pytest

import train
from lora import job
from script import cli, signature

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("trigger_word: is too long"), False),
        (FileNotFoundError("pictures.zip is gone"), False),
        (KeyError("a fault of ours"), True),
    ],
)
def test_the_log_shows_the_way_to_a_fault_of_ours_alone(
    error: Exception,
    shown: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "pictures.zip").touch()
    inputs = signature.read(ROOT / "train.py", "train")
    values, faults = cli.check(inputs, [f"input_images=@{tmp_path / 'pictures.zip'}"], {})
    assert faults == []

    def fails(*arguments: Any, **named: Any) -> Path:
        raise error

    monkeypatch.setattr(job, "run", fails)
    with caplog.at_level(logging.ERROR, "train"), pytest.raises(type(error)):
        train.train(**values)  # type: ignore[arg-type]
    assert ("Traceback" in caplog.text) == shown
