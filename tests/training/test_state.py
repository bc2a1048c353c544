"""A training that is interrupted goes on where it was, to the same bytes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora import job
from lora.flux import base
from lora.flux.base import Base
from lora.training import recipe, state
from lora.training.examine import Examination, Glance
from lora.training.state import Keeper
from tests.test_disk import largest_file
from tests.test_request import a_request
from toyflux import examples, world

ROOT = Path(__file__).parents[2]
STEPS = 10
ASKED: dict[str, Any] = {
    "training_steps": STEPS,
    "resolution": "64",
    "preservation": "1",
    "preview_prompts": "a [trigger]",
    "preview_every": 4,
    "checkpoints": "all",
    "caption_dropout_rate": 0.2,
}
FEW = {"prior_prompts": 8, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "pictures.zip"
    examples.write_zip(path, examples.subject_set(world.SUBJECTS[0], 8, 1))
    return path


def _run(
    archive: Path,
    output: Path,
    states: Path | None = None,
    log: Any = lambda line: None,
    gpus: str | None = None,
    **changes: Any,
) -> Path:
    return job.run(
        a_request(archive, **{**ASKED, **changes}),
        output=output,
        flux_base=None,
        captioner=None,
        log=log,
        metric=lambda name, value: None,
        changes=FEW,
        gpus=gpus,
        states=str(states) if states else None,
    )


def _interrupting(after: int, lines: list[str]) -> Callable[[str], None]:
    """A log that has the process interrupted when the look after this step is told."""

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith(f"step {after}/"):
            signal.raise_signal(signal.SIGINT)

    return log


def test_a_training_interrupted_at_any_step_ends_with_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    whole = _run(archive, tmp_path / "whole").read_bytes()
    states = tmp_path / "states"
    for at in (1, 5, STEPS):
        lines: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            _run(archive, tmp_path / "out", states, _interrupting(at, lines))
        assert f"state after step {at} saved: the same request would continue from there" in lines
        [kept] = states.iterdir()
        assert kept.stat().st_mode & 0o777 == 0o600
        losses = Keeper(kept).found["training"]["state"]["losses"]
        # Numbers, not tensors: those that go on are on another device than what is read from a file.
        assert [type(loss) for loss in losses] == [float] * at
        lines.clear()
        tar = _run(archive, tmp_path / "out", states, lines.append)
        assert f"an interrupted training of this request continues after step {at}" in lines
        assert not any(line.startswith(f"step {at}/") for line in lines)
        assert tar.read_bytes() == whole
        assert list(states.iterdir()) == []


def test_a_training_may_be_interrupted_twice_and_be_one_of_whole_weights(archive: Path, tmp_path: Path) -> None:
    for at in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            _run(archive, tmp_path / "out", tmp_path / "states", _interrupting(at, []), finetune_type="full")
    lines: list[str] = []
    tar = _run(archive, tmp_path / "out", tmp_path / "states", lines.append, finetune_type="full")
    assert "an interrupted training of this request continues after step 6" in lines
    assert tar.read_bytes() == _run(archive, tmp_path / "whole", finetune_type="full").read_bytes()


def test_a_training_that_has_learned_enough_says_so_though_it_was_interrupted(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real looks, but they are told to be good ones, and a recipe of ten steps."""
    glance = Examination.glance

    def good(self: Examination, unseen: bool, moved: bool = True) -> Glance:
        return dataclasses.replace(glance(self, unseen, moved), own=0.9, unseen=0.85)

    monkeypatch.setattr(Examination, "glance", good)
    monkeypatch.setattr(recipe, "steps_for", lambda *_: (STEPS, "as the test wants"))
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        _run(archive, tmp_path / "out", tmp_path / "states", _interrupting(5, lines), training_steps=None)
    tar = _run(archive, tmp_path / "out", tmp_path / "states", lines.append, training_steps=None)
    assert [line for line in lines if "learned enough" in line] == [
        "learned enough at step 6 of 10: with the trigger word the loss is 87% below the base's, and was 87% two"
        " evaluations before; training_steps=6 would probably be enough"
    ]
    with tarfile.open(tar) as opened:
        written = opened.extractfile("request.json")
        assert written is not None
        assert json.load(written)["verdict"]["measured"]["enough"] == 6


def test_several_processes_go_on_too(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(archive, tmp_path / "out", tmp_path / "states", _interrupting(3, []), gpus="cpu:2")
    lines: list[str] = []
    tar = _run(archive, tmp_path / "out", tmp_path / "states", lines.append, gpus="cpu:2")
    # Of five steps of two pictures each.
    assert "an interrupted training of this request continues after step 3" in lines, lines
    assert tar.read_bytes() == _run(archive, tmp_path / "whole", gpus="cpu:2").read_bytes()


def test_a_seed_chosen_at_random_is_kept(archive: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        _run(archive, tmp_path / "out", tmp_path / "states", _interrupting(3, lines), seed=None)
    [said] = [line for line in lines if line.startswith("seed: ")]
    lines.clear()
    _run(archive, tmp_path / "out", tmp_path / "states", lines.append, seed=None)
    assert said in lines


def test_the_state_of_another_request_is_not_taken(archive: Path, tmp_path: Path) -> None:
    states, lines = tmp_path / "states", list[str]()
    with pytest.raises(KeyboardInterrupt):
        _run(archive, tmp_path / "out", states, _interrupting(5, []))
    [kept] = states.iterdir()
    other = tmp_path / "other.zip"
    examples.write_zip(other, examples.subject_set(world.SUBJECTS[1], 8, 1))
    for pictures, changes in ((archive, {"trigger_word": "VEK"}), (archive, {"learning_rate": 1e-4}), (other, {})):
        _run(pictures, tmp_path / "out", states, lines.append, **changes)
        assert not any("interrupted" in line for line in lines)
    assert list(states.iterdir()) == [kept]
    # Not even under the name of another.
    moved = state.keeper(
        str(states), a_request(archive, **ASKED), "other pictures", base.find(None, None), lines.append
    )
    assert moved.file is not None
    kept.rename(moved.file)
    assert Keeper(moved.file, lines.append).found == {}
    assert lines[-1].endswith("it is of another request or version")


@pytest.mark.parametrize("content", [b"", b"no state", b"\x80\x04cos\nsystem\n(S'exit 1'\ntR."])
def test_a_state_that_cannot_be_read_is_told_and_the_training_begins_anew(content: bytes, tmp_path: Path) -> None:
    file, lines = tmp_path / "one.state", list[str]()
    file.write_bytes(content)
    assert Keeper(file, lines.append).found == {}
    assert "cannot be read, so this one starts anew" in lines[0]


def test_a_file_in_place_of_the_folder_is_told_with_the_variables_name(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^CHECKPOINTS: .*pictures.zip cannot be written: a file is in the way"):
        _run(archive, tmp_path / "out", archive, lambda line: None)


def test_a_training_of_other_settings_begins_anew(tmp_path: Path) -> None:
    file, lines = tmp_path / "one.state", list[str]()
    Keeper(file).save(5, "of today", {"fit": {"step": 5}})
    again = Keeper(file, lines.append)
    assert again.training("of tomorrow") is None
    assert "other settings" in lines[0]
    assert again.training("of today") == {"fit": {"step": 5}}


def test_a_state_is_saved_at_a_look_every_two_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    keeper = Keeper(tmp_path / "one.state")
    assert keeper.due(looked=True, alone=True)
    assert not keeper.due(looked=False, alone=True)
    keeper.save(1, "", {})
    now += state.SECONDS_BETWEEN - 1
    assert not keeper.due(looked=True, alone=True)
    now += 1
    assert keeper.due(looked=True, alone=True)
    assert not Keeper().due(looked=True, alone=True)


def test_a_full_disk_ends_no_training(tmp_path: Path) -> None:
    """Wherever in the file it was full."""
    lines: list[str] = []
    Keeper(tmp_path / "gone" / "one.state", lines.append).save(5, "", {})
    keeper = Keeper(tmp_path / "one.state", lines.append)
    keeper.save(4, "", {})
    for room in (0, 5_000, 100_000, 401_000):
        with largest_file(room):
            keeper.save(5, "", {"weights": torch.zeros(100_000)})
    assert len(lines) == 6
    assert all(line.startswith("the state after step 5 could not be saved: ") for line in [lines[0], *lines[2:]])
    assert all("one.state cannot be written: a file may not be that large" in line for line in lines[2:])
    assert [file.name for file in tmp_path.iterdir()] == ["one.state"]
    assert Keeper(tmp_path / "one.state").found["training"]["step"] == 4


def test_a_second_signal_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, now = Keeper(tmp_path / "one.state"), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with keeper.listening():
        signal.raise_signal(signal.SIGINT)
        assert keeper.due(looked=False, alone=True)
        signal.raise_signal(signal.SIGINT)  # an echo
        now += state.ECHO_SECONDS + 0.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Keeper().listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_state_belongs_to_the_bases_weights_whatever_folders_lie_among_them(archive: Path, tmp_path: Path) -> None:
    def name(flux: Base) -> str:
        file = state.keeper(str(tmp_path / "states"), a_request(archive), "", flux, lambda line: None).file
        assert file is not None
        return file.name

    toy = base.find(None, None)
    copy = dataclasses.replace(toy, folder=Path(shutil.copytree(toy.folder, tmp_path / "base")))
    (copy.folder / "transformer" / ".cache").mkdir()
    assert name(copy) == name(toy)
    weights = next((copy.folder / "transformer").glob("*.safetensors"))
    with weights.open("r+b") as stream:
        stream.seek(state.READ_OF_A_BASE // 2)
        stream.write(b"another")
    assert name(copy) != name(toy)


def test_states_that_nobody_came_back_for_are_deleted(archive: Path, tmp_path: Path) -> None:
    old, part, new, foreign = (tmp_path / name for name in ("old.state", "old.state.part", "new.state", "old.part"))
    for file in (old, part, new, foreign):
        file.touch()
    for file in (old, part, foreign):
        os.utime(file, (0, 0))
    state.keeper(str(tmp_path), a_request(archive), "", base.find(None, None), lambda line: None)
    assert sorted(tmp_path.iterdir()) == [new, foreign]


def test_the_command_goes_on_after_sigterm(archive: Path, tmp_path: Path) -> None:
    states, output = tmp_path / "states", tmp_path / "lora.tar"
    command = [sys.executable, "-m", "script.train", "-i", f"input_images=@{archive}", "-i", "trigger_word=TOK"]
    command += ["-i", "training_steps=200", "-i", "resolution=64", "-i", "seed=1", "-i", "preview_prompts=a [trigger]"]
    environ = {**os.environ, "CHECKPOINTS": str(states), "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen([*command, "-o", str(output)], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    said = []
    for line in first.stdout:
        said.append(line)
        if line.startswith("step 20/"):
            first.terminate()
    assert first.wait() == 128 + signal.SIGTERM, said
    saved = [found[1] for line in said if (found := re.match(r"state after step (\d+) saved", line))]
    assert saved, said
    again = subprocess.run([*command, "-o", str(output)], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"continues after step {saved[-1]}" in again.stdout
    assert tarfile.is_tarfile(output)
    assert list(states.iterdir()) == []
