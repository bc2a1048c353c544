"""Trainings by two processes through the real Cog server, whose worker is rank 0."""

import os
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest

from tests import cog_server as server
from tests.test_server import FEW, QUICK, begin, members, zipped

pytestmark = pytest.mark.slow
MANY_STEPS = {**QUICK, "training_steps": 6000}
SOON = 10


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    with server.serve("train", tmp_path_factory.mktemp("train"), variables={"GPUS": "cpu:2"}) as running:
        yield running


@pytest.fixture
def inbox(tmp_path):
    with server.listen(tmp_path) as listening:
        yield listening


def ranks(trainer: server.Server) -> list[int]:
    """The further ranks of this server, by their process ids."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "lora.training.rank" in command and any(str(trainer.temporary) in word for word in command):
            found.append(int(entry.name))
    return found


def gone(trainer: server.Server) -> bool:
    """Whether no further rank is left, soon."""
    until = time.monotonic() + SOON
    while ranks(trainer) and time.monotonic() < until:
        time.sleep(0.1)
    return not ranks(trainer)


def test_the_tar_is_the_command_lines_and_the_log_is_in_order(trainer, tmp_path):
    answer = trainer.train(input_images=FEW, **QUICK)
    assert answer["status"] == "succeeded", answer
    lines = answer["logs"].splitlines()
    assert "GPUs: none, but 2 processes train on the CPU, as GPUS asks for" in lines
    stages = [line for line in lines if line.startswith("== ")]
    assert len(stages) == len(set(stages))
    assert (stages[0], stages[-1]) == ("== unpacking", "== packing")
    assert gone(trainer)
    assert [name for name in trainer.leftovers() if not name.endswith("/trained_model.tar")] == []
    (tmp_path / "few.zip").write_bytes(zipped(2))
    inputs = [word for name, value in QUICK.items() for word in ("-i", f"{name}={value}")]
    tar = tmp_path / "trained.tar"
    command = [sys.executable, "-m", "script.train", "-i", f"input_images=@{tmp_path / 'few.zip'}", *inputs, "-o", tar]
    environment = {**os.environ, "GPUS": "cpu:2", "FLUX_BASE": "", "CAPTIONER": ""}
    subprocess.run(command, cwd=server.ROOT, env=environment, check=True)
    with tarfile.open(fileobj=BytesIO(tar.read_bytes())) as opened:
        ours = {member.name: opened.extractfile(member).read() for member in opened.getmembers()}
    assert ours == members(answer)


def test_after_a_killed_rank_and_a_cancel_the_next_training_succeeds(trainer, inbox):
    begin(trainer, inbox, "killed-rank", input_images=FEW, **MANY_STEPS)
    trainer.wait_for_line("killed-rank", "== training")
    [rank] = ranks(trainer)
    os.kill(rank, signal.SIGKILL)
    killed = time.monotonic()
    end = inbox.wait_for_end()
    assert time.monotonic() - killed < SOON
    assert end["status"] == "failed"
    assert "process 2 of 2 was ended by SIGKILL; the training cannot go on without it" in end["error"]
    assert gone(trainer)
    inbox.received.clear()

    begin(trainer, inbox, "cancelled-ranks", input_images=FEW, **MANY_STEPS)
    trainer.wait_for_line("cancelled-ranks", "== training")
    trainer.ask("POST", "/trainings/cancelled-ranks/cancel")
    cancelled = time.monotonic()
    assert inbox.wait_for_end()["status"] == "canceled"
    assert time.monotonic() - cancelled < SOON
    assert gone(trainer)
    assert trainer.train(input_images=FEW, **QUICK)["status"] == "succeeded"
    assert [name for name in trainer.leftovers() if not name.endswith("/trained_model.tar")] == []


def test_no_rank_outlives_the_server(tmp_path):
    with server.serve("train", tmp_path, variables={"GPUS": "cpu:2"}) as trainer, server.listen(tmp_path) as inbox:
        begin(trainer, inbox, "outlived", input_images=FEW, **MANY_STEPS)
        trainer.wait_for_line("outlived", "== training")
        assert len(ranks(trainer)) == 1
    assert gone(trainer)
