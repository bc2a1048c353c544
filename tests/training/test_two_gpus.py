"""Two GPUs that train together, by NCCL; `test_ranks` has the same on a CPU."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from lora import job
from tests.test_request import a_request

EXAMPLES = Path(__file__).parents[2] / "examples" / "subject.zip"

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")


def test_two_gpus_train_a_lora_and_draw_its_previews(tmp_path: Path) -> None:
    lines: list[str] = []
    tar = job.run(
        a_request(EXAMPLES, training_steps=40, preview_every=20, resolution="64", seed=1),
        output=tmp_path,
        flux_base=None,
        captioner=None,
        log=lines.append,
        metric=lambda name, value: None,
        gpus="2",
    )
    assert any("| 20/20" in line for line in lines), "40 pictures, two in a step"
    assert not any("previews could not be drawn" in line for line in lines)
    with tarfile.open(tar) as opened:
        written = opened.extractfile("request.json")
        assert written is not None
        assert json.load(written)["decided"]["gpus"] == 2
        assert {job.WEIGHTS_MEMBER, "report/preview.webp"} <= set(opened.getnames())
