"""schnell beside the base, on the toy base: drawn as diffusers draws it, and on the base's own parts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from lora.flux import generate, schnell
from lora.flux.base import TOY
from tests import toy_schnell


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schnell")
    toy_schnell.write(folder)
    return folder


@pytest.fixture(scope="module")
def base() -> FluxPipeline:
    return generate.open_pipeline(TOY, "cpu", torch.float32, offload=False)


def test_it_draws_what_diffusers_draws_and_needs_the_shared_parts_once(base: FluxPipeline, weights: Path) -> None:
    pipeline = schnell.open_beside(base, str(weights), "cpu")
    assert pipeline.vae is base.vae
    assert pipeline.text_encoder_2 is base.text_encoder_2
    plain = FluxPipeline.from_pretrained(
        TOY,
        transformer=FluxTransformer2DModel.from_pretrained(weights, subfolder="transformer", dtype=torch.float32),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(weights, subfolder="scheduler"),
        dtype=torch.float32,
    )
    theirs = plain(
        "a red circle",
        width=64,
        height=64,
        num_inference_steps=schnell.STEPS,
        max_sequence_length=40,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    ours = generate.draw(pipeline, "a red circle", (64, 64), 1, steps=schnell.STEPS, tokens=40)
    assert (np.asarray(ours) == np.asarray(theirs)).all()
    dev = generate.draw(base, "a red circle", (64, 64), 1, steps=schnell.STEPS, tokens=40)
    assert (np.asarray(dev) != np.asarray(ours)).any()


def test_without_weights_the_error_says_so(base: FluxPipeline, weights: Path, tmp_path: Path) -> None:
    for nothing in (None, ""):
        with pytest.raises(ValueError, match=r"^model: the weights of schnell are not here; set the variable SCHNELL"):
            schnell.open_beside(base, nothing, "cpu")
    with pytest.raises(ValueError, match=r"^model: the weights of schnell, '.*' in SCHNELL, cannot be loaded"):
        schnell.open_beside(base, str(tmp_path), "cpu")


def test_weights_for_another_base_are_refused(base: FluxPipeline, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "scheduler").symlink_to(weights / "scheduler")
    config = json.loads((weights / "transformer" / "config.json").read_text(encoding="utf-8"))
    other = FluxTransformer2DModel.from_config({**config, "joint_attention_dim": 64})
    other.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"for another base than this one \(joint_attention_dim 64, here 128\)"):
        schnell.open_beside(base, str(tmp_path), "cpu")
