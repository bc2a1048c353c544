"""Weights & Biases, by its own client in its offline mode: what it is told, and that it never does harm."""

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora.training import tracker
from lora.training.tracker import Tracker

KEY = "0123456789abcdef" * 2 + "01234567"
SIGNATURE = "presigned-once"


def _start(folder: Path, lines: list[str], key: str | None = KEY) -> Any:
    return tracker.tracking(
        key, project="p", name="n", entity=None, settings={"lora_rank": 4}, folder=folder, log=lines.append
    )


def test_without_a_key_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it would fail
    with _start(tmp_path, lines, key=None) as tracked:
        tracked.numbers(1, {"loss": 1.0})
        tracked.pictures(["a"], 1, [Image.new("RGB", (8, 8))])
    assert lines == []
    assert list(tmp_path.iterdir()) == []


def test_numbers_and_pictures_are_recorded_and_neither_key_nor_command_line_are_in_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder, lines = tmp_path / "home", tmp_path / "run", list[str]()
    home.mkdir()
    folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["script/train", "-i", f"resume_from=https://host/lora.tar?signature={SIGNATURE}"])
    with _start(folder, lines) as tracked:
        tracked.numbers(1, {"loss": 0.5, "learning_rate": 1e-3})
        tracked.numbers(2, {"loss": 0.25})
        tracked.numbers(1, {"loss": 0.125})  # begun again, as where a GPU's memory ran out
        tracked.pictures(["a TOK", "a house"], 2, [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")])
    assert lines[0].startswith("Weights & Biases: run ")
    assert len(lines) == 1
    files = [path for path in (*home.rglob("*"), *folder.rglob("*")) if path.is_file()]
    assert sum(path.suffix == ".png" for path in files) == 2
    for secret in (KEY, SIGNATURE):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert _history(next(path for path in files if path.suffix == ".wandb")) == [
        {"step": "1", "loss": "0.5", "learning_rate": "0.001"},
        {"step": "2", "loss": "0.25"},
        {"step": "1", "loss": "0.125"},
        {"step": "2"},
    ]


def _history(file: Path) -> list[dict[str, str]]:
    """The rows of a run's binary log: 7 bytes, then records, each behind its checksum, length and kind (LevelDB's)."""
    from wandb.proto import wandb_internal_pb2

    data, at, rows = file.read_bytes(), 7, []
    while at < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1, "a whole record: so little does not go over a block's end"
        record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length])
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            rows.append({key: value for key, value in items.items() if key in ("step", "loss", "learning_rate")})
        at += 7 + length
    return rows


class _Broken:
    """A run whose connection is gone."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, values: dict[str, Any]) -> None:
        self.calls += 1
        raise BrokenPipeError("the service has gone")

    finish = log


def test_what_goes_wrong_on_the_way_is_told_once_and_then_left_alone() -> None:
    lines: list[str] = []
    run = _Broken()
    tracked = Tracker(run, lines.append)
    for step in range(3):
        tracked.numbers(step, {"loss": 1.0})
    tracked.close(failed=False)
    assert lines == ["warning: Weights & Biases is given up: BrokenPipeError: the service has gone"]
    assert run.calls == 1


def test_a_run_that_cannot_be_started_is_told_by_the_inputs_name_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at this address; the client gives up at once where it is told not to wait."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(tracker, "PATIENCE", 2)
    with pytest.raises(ValueError, match="wandb_api_key: Weights & Biases does not start a run") as caught:
        _start(tmp_path, []).__enter__()
    assert KEY not in str(caught.value)
