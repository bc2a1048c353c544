"""Going on from an earlier LoRA: what a training starts with is what the LoRA does, whoever made it."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lora.file import names, weights
from lora.file.names import Pair
from lora.file.weights import Weights
from lora.flux import adapter
from lora.training import resume
from tests import lora_files
from tests.lora_files import Maker

REFUSED = {"dora", "dora in part", "dora scales"}


def _earlier(layout: str, flux: FluxTransformer2DModel, folder: Path) -> tuple[Weights, Maker]:
    maker = Maker(adapter.shapes(flux), lora_files.TEXT_SIZES)
    return weights.read(lora_files.write(layout, maker, folder / "lora.safetensors")), maker


def _start(earlier: Weights, rank: int, flux: FluxTransformer2DModel, lines: list[str]) -> dict[str, Pair]:
    return resume.start(earlier, rank, 1, adapter.target_modules(flux), flux, lines.append)


@pytest.mark.parametrize("layout", sorted(lora_files.LAYOUTS.keys() - REFUSED))
def test_a_training_starts_with_what_the_earlier_lora_does_at_a_higher_rank_too(
    layout: str, tiny_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    earlier, maker = _earlier(layout, tiny_flux, tmp_path)
    lines: list[str] = []
    start = _start(earlier, 8, tiny_flux, lines)
    gains = {layer: gain for layer, gain in maker.gains.items() if layer not in names.OUTSIDE}
    assert start.keys() == {*adapter.target_modules(tiny_flux), *gains}
    for layer, (a, b) in start.items():
        assert (len(a), b.shape[1]) == (8, 8)
        wanted = gains.get(layer, torch.zeros(len(b), a.shape[1]))
        torch.testing.assert_close(b @ a, wanted, rtol=0.02, atol=2e-3)
        assert a.any(dim=1).all(), "each row can learn"
    parameters = adapter.attach(tiny_flux, 8, 1, list(start), start)
    assert len(parameters) == 2 * len(start)
    log = "\n".join(lines)
    assert ("left out, 6 of the CLIP text encoder" in log) == bool(maker.text_gains)
    assert ("layers outside the blocks" in log) == (layout == "comfy")
    assert ("the biases of" in log) == (layout in ("bias", "bias changes"))
    assert (" are trained too, such as " in log) == (layout in ("ai-toolkit", "kohya", "fal"))
    assert ("start from zero" in log) == (layout in ("xlabs", "onetrainer attention", "kohya of attention"))


def test_a_lora_of_the_same_layers_and_rank_starts_as_it_is(tiny_flux: FluxTransformer2DModel, tmp_path: Path) -> None:
    earlier, _ = _earlier("diffusers", tiny_flux, tmp_path)
    lines: list[str] = []
    for layer, (a, b) in _start(earlier, 4, tiny_flux, lines).items():
        assert torch.equal(a, earlier.pairs[layer][0].float())
        assert torch.equal(b, earlier.pairs[layer][1].float())
    assert lines == ["the earlier LoRA: 17 layers of rank 4"]


@pytest.mark.parametrize(
    ("layout", "rank", "says"),
    [
        ("diffusers", 3, "this LoRA has layers of rank 4, and lora_rank is 3: set lora_rank to 4 or more"),
        ("mixed ranks", 2, "this LoRA has layers of rank 4, and lora_rank is 2"),
        ("dora", 8, "this is a DoRA, which cannot be trained further; set training_steps to 0"),
    ],
)
def test_what_a_training_cannot_go_on_from_is_told_with_what_to_do(
    layout: str, rank: int, says: str, tiny_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^resume_from: {says}"):
        _start(_earlier(layout, tiny_flux, tmp_path)[0], rank, tiny_flux, [])


def test_a_lora_of_another_base_does_not_fit_and_layers_that_are_not_there_are_left_out(
    tiny_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    earlier, maker = _earlier("diffusers", tiny_flux, tmp_path)
    more = {"transformer_blocks.7.attn.to_q": maker.pair(32, 32)}
    weights.write(tmp_path / "more.safetensors", {**earlier.pairs, **more}, {})
    lines: list[str] = []
    assert len(_start(weights.read(tmp_path / "more.safetensors"), 4, tiny_flux, lines)) == 17
    assert "left out, 1 of layers that the base does not have: transformer_blocks.7.attn.to_q" in lines[0]
    weights.write(tmp_path / "wide.safetensors", {"transformer_blocks.0.attn.to_q": maker.pair(64, 64)}, {})
    with pytest.raises(ValueError, match=r"this LoRA does not fit:\n  1 of its 1 layers are of another size"):
        _start(weights.read(tmp_path / "wide.safetensors"), 4, tiny_flux, [])


@pytest.mark.parametrize("layout", ["kohya", "fal", "comfy", "kohya with text", "bias", "dora"])
def test_packing_keeps_everything_of_the_transformers(
    layout: str, tiny_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    earlier, maker = _earlier(layout, tiny_flux, tmp_path)
    weights.write_whole(tmp_path / "packed.safetensors", resume.fitting(earlier, tiny_flux, lambda line: None))
    packed = weights.read(tmp_path / "packed.safetensors")
    assert packed.naming == "diffusers"
    assert packed.pairs.keys() == maker.gains.keys()
    assert (packed.biases.keys(), packed.magnitudes.keys()) == (earlier.biases.keys(), earlier.magnitudes.keys())
    assert not packed.text
