"""bench/on_gpu.sh: every part runs, whatever became of those before it, and what it did is there as JSON."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$(dirname "$0")/asked"
[[ $1 != step ]] || exit 3
"""


@pytest.mark.parametrize("toy", [["--toy"], []], ids=["toy", "on a GPU"])
def test_a_part_that_fails_stops_none_of_the_others_and_each_is_told(toy: list[str], tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "script").mkdir()
    shutil.copy(ROOT / "bench" / "on_gpu.sh", tmp_path / "bench")
    for name in ("bench", "python", "test"):
        (tmp_path / "script" / name).write_text(STUB)
        (tmp_path / "script" / name).chmod(0o755)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor gpu in 0 1 2 3; do echo GPU $gpu: one of them; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    out = tmp_path / "out"
    subprocess.run(
        [tmp_path / "bench" / "on_gpu.sh", *toy, out, tmp_path / "base"],
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    parts = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    ended = {part["part"]: part["ended"] for part in parts}
    assert {ended.pop(name) for name in list(ended) if name.startswith("step")} == {3}
    assert list(ended)[-2:] == ["tests", "ranks"]
    assert not any(ended.values())
    assert all(part["limit"] <= 180 and (out / f"{part['part']}.log").is_file() for part in parts)
    asked = [line.split() for line in (tmp_path / "script" / "asked").read_text().splitlines()]
    benches = {words[1] for words in asked if words[0] == "bench"}
    assert {"job", "step", "recordings", "kernels", "captioner", "generate"} <= benches
    jobs = [words[words.index("--gpus") + 1] for words in asked if words[1] == "job" and "--gpus" in words]
    assert jobs == (["2"] if toy else ["1", "4", "2", "1"]), "with captions, then with all GPUs, two and one"
    for name in benches:
        assert (ROOT / "bench" / f"{name}.py").is_file()
    for words in asked:
        assert all((ROOT / Path(word).relative_to(tmp_path)).is_file() for word in words if word.endswith(".py"))
