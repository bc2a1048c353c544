"""The drawing's benchmark, run on the toy base for a moment."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bench import generate


def test_it_measures_both_ways_in_one_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "STEPS", 2)
    for name in ("FLUX_BASE", "SAFETY", "SCHNELL"):
        monkeypatch.setenv(name, "restored afterwards")
    generate.main(["--toy", "--calls", "1", "--turns", "2", "--json", str(tmp_path / "runs.json")])
    [run] = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"))
    assert [way["name"] for way in run["ways"]] == ["diffusers", "this generator"]
    assert all(len(way["first"]) == len(way["again"]) == 2 for way in run["ways"])
    told = capsys.readouterr().out
    assert told.count("lora_weights: 39 layers") == 3, "one to warm up, and one for each turn"
    assert "times as long as diffusers" in told


def test_ways_that_draw_different_pictures_are_not_compared() -> None:
    draws = {
        "diffusers": lambda lora, seed: Image.new("RGB", (8, 8), "red"),
        "ours": lambda lora, seed: Image.new("RGB", (8, 8), "blue"),
    }
    with pytest.raises(ValueError, match="ours draws another picture than diffusers"):
        generate.measure(draws, [Path("a")], 1)
