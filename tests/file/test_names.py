"""Between the three namings: exact both ways, and against diffusers' own converters at FLUX.1's full size."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_bfl_flux_control_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    swap_scale_shift,
)
from safetensors.torch import load_file, save_file

from lora.file import keys, names
from lora.file.names import Layer, Pair
from lora.flux.adapter import DOUBLE_LAYERS, SINGLE_LAYERS

WIDTH = 3072
OUTPUTS = {"ff.net.0.proj": 4 * WIDTH, "ff_context.net.0.proj": 4 * WIDTH, "proj_mlp": 4 * WIDTH}
INPUTS = {"ff.net.2": 4 * WIDTH, "ff_context.net.2": 4 * WIDTH, "proj_out": 5 * WIDTH}


def a_lora(rank: int, width: int = WIDTH, blocks: tuple[int, int] = (1, 1)) -> dict[str, Pair]:
    """Random weights on all that the trainer adapts, for a FLUX of this width and these double and single blocks."""
    generator = torch.Generator().manual_seed(rank)
    layers = [f"transformer_blocks.{i}.{layer}" for i in range(blocks[0]) for layer in DOUBLE_LAYERS]
    layers += [f"single_transformer_blocks.{i}.{layer}" for i in range(blocks[1]) for layer in SINGLE_LAYERS]

    def one(layer: str) -> Pair:
        kind = layer.split(".", 2)[2]
        a = torch.randn(rank, INPUTS.get(kind, WIDTH) * width // WIDTH, generator=generator)
        b = torch.randn(OUTPUTS.get(kind, WIDTH) * width // WIDTH, rank, generator=generator)
        return a.bfloat16(), b.bfloat16()

    return {layer: one(layer) for layer in layers}


def _pairs(parsed: keys.Parsed) -> dict[str, Pair]:
    return {name: layer[:2] for name, layer in parsed.layers.items()}


def _assert_equal(one: dict[str, Pair], other: dict[str, Pair]) -> None:
    assert one.keys() == other.keys()
    for layer, (a, b) in one.items():
        assert torch.equal(a, other[layer][0]), layer
        assert torch.equal(b, other[layer][1]), layer


def _effect(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What a layer's LoRA does to one input."""
    x = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return b.double() @ (a.double() @ x)


@pytest.mark.parametrize("naming", names.NAMINGS)
@pytest.mark.parametrize(
    "kept",
    [r".", r"attn\.to_[qkv]$", r"proj_out", r"proj_mlp", r"(attn\.to_q|net\.2)$"],
    ids=["all", "attention", "one layer", "mlp alone", "partial"],
)
@pytest.mark.parametrize("rank", [1, 4])
def test_there_and_back_is_exact(naming: str, kept: str, rank: int) -> None:
    pairs = {layer: pair for layer, pair in a_lora(rank, width=48, blocks=(2, 3)).items() if re.search(kept, layer)}
    parsed = keys.parse(names.to_naming(naming, pairs))
    assert parsed.namings == {naming}
    _assert_equal(_pairs(parsed), pairs)


def test_a_lora_that_was_never_trained_comes_back_too() -> None:
    pairs = {layer: (a, torch.zeros_like(b)) for layer, (a, b) in a_lora(4, width=48).items()}
    _assert_equal(_pairs(keys.parse(names.to_naming("kohya", pairs))), pairs)


def test_diffusers_reads_the_kohya_file_as_the_same_lora() -> None:
    pairs = a_lora(2, blocks=(19, 38))
    converted = _convert_kohya_flux_lora_to_diffusers(names.to_naming("kohya", pairs))
    _assert_equal(_pairs(keys.parse(converted)), pairs)


def test_diffusers_reads_the_bfl_file_as_the_same_lora() -> None:
    """Its converter is for Black Forest Labs' control LoRAs, which have much besides; that is made up here."""
    pairs = a_lora(1, blocks=(19, 38))
    weights = names.to_naming("bfl", pairs)
    besides = ["time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer"]
    besides += ["txt_in", "img_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    besides += [f"double_blocks.{i}.{stream}_mod.lin" for i in range(19) for stream in ("img", "txt")]
    besides += [f"single_blocks.{i}.modulation.lin" for i in range(38)]
    extra = {f"{layer}.lora_{half}.weight": torch.zeros(2, 2) for layer in besides for half in "AB"}
    for i in range(19):
        for stream in ("img", "txt"):
            for norm in ("query_norm", "key_norm"):
                extra[f"double_blocks.{i}.{stream}_attn.norm.{norm}.scale"] = torch.zeros(1)
    for i in range(38):
        for norm in ("query_norm", "key_norm"):
            extra[f"single_blocks.{i}.norm.{norm}.scale"] = torch.zeros(1)
    converted = _convert_bfl_flux_control_lora_to_diffusers({**weights, **extra})
    for layer, pair in pairs.items():
        theirs = [converted[f"transformer.{layer}.lora_{half}.weight"] for half in "AB"]
        torch.testing.assert_close(_effect(*theirs), _effect(*pair), rtol=1e-12, atol=1e-12)


def test_a_joined_lora_trained_as_one_is_read_as_diffusers_reads_it() -> None:
    """kohya's own: one A for q, k, v and the MLP, with an alpha of half the rank."""
    generator = torch.Generator().manual_seed(1)
    stem = "lora_unet_single_blocks_3_linear1"
    weights = {
        f"{stem}.lora_down.weight": torch.randn(4, WIDTH, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(7 * WIDTH, 4, generator=generator),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    ours = _pairs(keys.parse(weights))
    theirs = _pairs(keys.parse(_convert_kohya_flux_lora_to_diffusers(dict(weights))))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4
    for layer in ours:
        torch.testing.assert_close(_effect(*ours[layer]), _effect(*theirs[layer]))


def test_an_alpha_is_folded_into_b() -> None:
    weights = names.to_naming("diffusers", a_lora(4, width=48))
    layer = "transformer_blocks.0.attn.to_q"
    plain = _pairs(keys.parse(weights))
    scaled = _pairs(keys.parse({**weights, f"transformer.{layer}.alpha": torch.tensor(8.0)}))
    assert torch.equal(scaled[layer][1], 2 * plain[layer][1])
    assert torch.equal(scaled[layer][0], plain[layer][0])


def test_layers_of_different_rank_cannot_be_joined_and_others_have_no_name_there() -> None:
    pairs = a_lora(2, width=48)
    pairs["transformer_blocks.0.attn.to_q"] = a_lora(3, width=48)["transformer_blocks.0.attn.to_q"]
    with pytest.raises(ValueError, match=r"double_blocks\.0\.img_attn\.qkv: its parts have the ranks \[2, 3\]"):
        names.to_naming("bfl", pairs)
    pairs["transformer_blocks.0.attn.to_q"] = (torch.ones(2, 8), torch.ones(48, 2))
    with pytest.raises(ValueError, match=r"img_attn\.qkv: its parts read inputs of several sizes"):
        names.to_naming("bfl", pairs)
    with pytest.raises(ValueError, match=r"no name there: transformer_blocks\.0\.attn\.other"):
        names.to_naming("kohya", {"transformer_blocks.0.attn.other": pairs["transformer_blocks.0.attn.to_k"]})


@pytest.mark.parametrize("naming", ["bfl", "kohya"])
def test_the_layers_before_and_behind_the_blocks_have_names_too(naming: str) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = {
        layer: (torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator))
        for layer in names.OUTSIDE
    }
    named = names.to_naming(naming, pairs)
    _assert_equal(_pairs(keys.parse(named)), pairs)
    [swapped] = [t for key, t in named.items() if "adaLN" in key and key.endswith(("lora_B.weight", "lora_up.weight"))]
    assert torch.equal(swapped, swap_scale_shift(pairs["norm_out.linear"][1]))


@pytest.mark.parametrize("naming", ["bfl", "kohya"])
def test_a_lora_trained_joined_is_joined_to_the_same_again_and_saved(naming: str, tmp_path: Path) -> None:
    """Its parts share one A, in one place of the memory, which safetensors does not write."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 48, generator=generator), torch.randn(7 * 48, 4, generator=generator)
    parts = names.from_bfl("single_blocks.0.linear1", Layer(a, b))
    pairs = {name: layer[:2] for name, layer in parts.items()}
    assert len(pairs) == 4
    save_file(names.to_naming("diffusers", pairs), tmp_path / "lora.safetensors")
    again = keys.parse(load_file(tmp_path / "lora.safetensors"))
    joined = names.to_naming(naming, _pairs(again))
    assert sorted(tuple(t.shape) for t in joined.values() if t.ndim) == [(4, 48), (7 * 48, 4)]
    assert any(torch.equal(t, b) for t in joined.values())
