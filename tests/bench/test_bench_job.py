"""The benchmark of a job: how it reads a log, what it feeds the trainer, and a small run of it."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import job
from bench.job import Run, Size
from lora.flux import base
from lora.pictures import survey
from tests import tiny_flux

TINY = Size(
    transformer=tiny_flux.CONFIG | {"in_channels": 64},
    vae={"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64},
    clip={
        "vocab_size": 49408,
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 12,
    },
    t5={"vocab_size": 32128, "d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 3},
    t5_tokens=16,
)


def test_the_stages_of_a_log_add_up_to_the_whole() -> None:
    log = [
        (2.0, "base: toyflux"),
        (2.5, "== unpacking"),
        (3.0, "10 pictures"),
        (3.5, "== training"),
        (4.0, " 10%|#         | 1/10, loss 1.0"),
        (5.0, "100%|##########| 10/10, loss 1.0"),
        (6.0, "== unpacking"),
        (7.0, "seconds: unpacking 0.5"),
        (7.5, "Report: report.html"),
    ]
    run = job.split(log, 8.0)
    assert run.stages == {"starting": 2.5, "unpacking": 2.0, "training": 2.5, "ending": 1.0}
    assert (run.first_step, run.tar) == (4.0, 8.0)
    with pytest.raises(ValueError, match="no step"):
        job.split(log[:4], 8.0)


def test_the_pictures_are_sharp_and_differ(tmp_path: Path) -> None:
    job.write_pictures(tmp_path / "pictures.zip", 4, (144, 96))
    with zipfile.ZipFile(tmp_path / "pictures.zip") as archive:
        archive.extractall(tmp_path)
    paths = sorted(tmp_path.glob("*.jpg"))
    assert [Image.open(path).size for path in paths] == [(96, 144), (144, 96)] * 2
    assert survey.report(survey.look_at({path.name: path for path in paths}), [64]) == []


def test_a_small_job_runs_from_the_command_to_the_tar_on_a_base_of_random_weights(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    job.write_base(folder, TINY, torch.device("cpu"), torch.float32)
    found = base.find(str(folder), None)
    assert (found.native, found.t5_tokens, found.width) == (64, 16, 32)
    job.write_pictures(tmp_path / "pictures.zip", 4, (144, 96))
    inputs = ["training_steps=2", "preview_prompts=a TOK"]
    run = job.train(tmp_path / "pictures.zip", tmp_path, inputs, {"FLUX_BASE": str(folder)})
    assert {"starting", "unpacking", "encoding pictures", "training", "packing"} <= set(run.stages)
    assert sum(run.stages.values()) == pytest.approx(run.tar)
    assert run.stages["starting"] < run.first_step < run.tar
    assert (tmp_path / "trained_model.tar").is_file()


def test_the_full_size_is_flux_1_devs() -> None:
    """Parameters of the four models, counted without making their weights; FLUX.1-dev's files hold as many."""
    with torch.device("meta"):
        counted = {name: sum(p.numel() for p in make().parameters()) for name, make in job.makers(job.FULL).items()}
    assert counted == {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    }


def test_several_runs_are_told_by_their_median_and_kept(tmp_path: Path) -> None:
    runs = [Run(stages={"starting": 2.0 + n, "training": 5.0}, first_step=4.0 + n, tar=7.0 + n) for n in range(3)]
    said = job.table(runs)
    assert "| starting | 3.0 (2.0 to 4.0) |" in said
    assert "first step** | 5.0 (4.0 to 6.0) |" in said
    assert job.verdict(runs, toy=True, steps=10) == "to the first step 5.0 s; goal 10 s: reached"
    slow, fast = Run(stages={}, first_step=9.0, tar=241.0), Run(stages={}, first_step=9.0, tar=120.0)
    assert job.verdict([slow], toy=False, steps=1000).endswith("goal 240 s: MISSED")
    assert job.verdict([fast], toy=False, steps=1000).endswith("goal 240 s: reached")
    short = job.verdict([fast], toy=False, steps=400)
    assert "reached" not in short, "a job of fewer steps says nothing of the goal"
    assert "with 400 steps" in short
    for n in range(2):
        job.add(tmp_path / "job.json", {"run": n})
    assert json.loads((tmp_path / "job.json").read_text()) == [{"run": 0}, {"run": 1}]
