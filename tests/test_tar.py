"""The tar of a whole training on the toy base, as diffusers, script/inspect and a later training see it."""

import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from lora import job
from lora.file import weights
from lora.flux import adapter, base
from lora.result import preview
from lora.result.preview import Preview
from script import inspect
from tests import lora_files
from tests.lora_files import Maker
from tests.test_request import a_request

PROMPT = "a red house on a white background"
REGEX = r"single_transformer_blocks\.\d\.(proj_mlp|proj_out)"


@dataclass
class Trained:
    tar: Path
    lines: list[str]
    previews: list[Preview]


def _train(folder: Path, log: Callable[[str], None], **changes: Any) -> Path:
    with zipfile.ZipFile(folder / "pictures.zip", "w") as out:
        for colour in ("red", "green"):
            data = BytesIO()
            picture = Image.new("RGB", (64, 64), colour)
            picture.paste("white", (8, 8, 24, 24))  # or it is blank, and refused
            picture.save(data, "PNG")
            out.writestr(f"{colour}.png", data.getvalue())
    wanted = {
        "training_steps": 4,
        "learning_rate": 1e-2,
        "preservation": "off",
        "resolution": "64",
        "preview_prompts": PROMPT,
        "layers_to_optimize_regex": REGEX,
    }
    return job.run(
        a_request(folder / "pictures.zip", **{**wanted, **changes}),
        output=folder,
        flux_base=None,
        captioner=None,
        log=log,
        metric=lambda name, value: None,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    lines: list[str] = []
    previews: list[Preview] = []
    pair_up = preview.pair_up

    def remembered(*arguments: Any) -> list[Preview]:
        previews.extend(pair_up(*arguments))
        return previews

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "pair_up", remembered)
        tar = _train(tmp_path_factory.mktemp("trained"), lines.append)
    return Trained(tar, lines, previews)


def test_diffusers_draws_from_the_tars_file_what_the_training_drew(trained: Trained, tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(base.TOY, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> Image.Image:
        return pipeline(
            PROMPT,
            width=64,
            height=64,
            num_inference_steps=20,
            guidance_scale=3.5,
            max_sequence_length=base.find(None, None).t5_tokens,
            generator=torch.Generator().manual_seed(1),
        ).images[0]

    preview = trained.previews[0]
    assert preview.prompt == PROMPT
    assert np.array_equal(np.array(draw()), np.array(preview.without))
    pipeline.load_lora_weights(str(weights.take_out(trained.tar, tmp_path)))
    assert np.array_equal(np.array(draw()), np.array(preview.after))
    assert not np.array_equal(np.array(preview.without), np.array(preview.after))


def test_the_layers_asked_for_are_completed_and_the_lora_is_sound(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [line for line in trained.lines if line.startswith("layers:")] == [
        "layers: 6 of 39 by layers_to_optimize_regex",
        "layers: 9 added, so that the LoRA loads everywhere: single_transformer_blocks.0.attn.to_q,"
        " single_transformer_blocks.0.attn.to_k, single_transformer_blocks.0.attn.to_v, …",
    ]
    assert inspect.main([str(trained.tar)]) == 0
    page = capsys.readouterr().out
    assert "in 15 layers" in page
    assert "no fault found" in page


def test_a_later_training_begins_with_the_loss_at_which_the_earlier_one_ended(trained: Trained, tmp_path: Path) -> None:
    lines: list[str] = []
    tar = _train(tmp_path, lines.append, resume_from=str(trained.tar), training_steps=1)
    ended = [re.findall(r"on fixed noise ([\d.]+\d)", line) for line in trained.lines if "on fixed noise" in line][-1]
    began = [re.findall(r"before training ([\d.]+\d)", line) for line in lines if "before training" in line][-1]
    assert float(began[0]) == pytest.approx(float(ended[0]), abs=2e-4), "but for the file's 16 bits"
    with tarfile.open(tar) as opened:
        record = opened.extractfile("request.json")
        assert record is not None
        assert len(json.load(record)["decided"]["resume_from_sha256"]) == 64


def test_a_lora_of_a_higher_rank_is_refused_before_anything_is_made(trained: Trained, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(ValueError, match="this LoRA has layers of rank 4, and lora_rank is 2: set lora_rank to 4"):
        _train(tmp_path, lines.append, resume_from=str(trained.tar), lora_rank=2)
    assert "== captioning" not in lines


def test_a_training_goes_on_from_another_tools_lora_with_the_layers_of_the_modulation(tmp_path: Path) -> None:
    flux = base.find(None, None).skeleton()
    maker = Maker(adapter.shapes(flux), {})
    file = lora_files.write("ai-toolkit", maker, tmp_path / "earlier.safetensors")
    lines: list[str] = []
    tar = _train(tmp_path, lines.append, resume_from=str(file), training_steps=1)
    assert any(re.match(r"layers: 31 of the earlier LoRA are trained too, such as", line) for line in lines)
    packed = weights.read(weights.take_out(tar, tmp_path))
    assert packed.pairs.keys() == maker.gains.keys()
    for layer, (a, b) in packed.pairs.items():
        gain = maker.gains[layer]
        assert 0 < (b.float() @ a.float() - gain).norm() < 0.5 * gain.norm(), f"{layer} has learned"


def test_what_is_no_lora_is_refused_by_the_inputs_name(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"resume_from: x\.safetensors is not a whole safetensors file"):
        _train(tmp_path, lambda line: None, resume_from=str(tmp_path / "x.safetensors"))


def test_no_steps_pack_the_earlier_lora_as_it_is(trained: Trained, tmp_path: Path) -> None:
    tar = _train(tmp_path, lambda line: None, resume_from=str(trained.tar), training_steps=0)
    with tarfile.open(tar) as packed, tarfile.open(trained.tar) as earlier:
        assert packed.getnames() == [job.WEIGHTS_MEMBER, "request.json"]
        files = [opened.extractfile(job.WEIGHTS_MEMBER) for opened in (packed, earlier)]
        assert files[0] is not None
        assert files[1] is not None
        assert files[0].read() == files[1].read()
