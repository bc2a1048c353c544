"""What is said of a LoRA's file. What diffusers does with each tool's files is in `tests/flux/test_fitting.py`."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from lora.file import judge, names, weights
from lora.file.names import Pair
from lora.flux import adapter
from script import inspect
from tests import lora_files
from tests.file.test_names import a_lora
from tests.lora_files import Maker

ALL = {
    "diffusers": "yes",
    "ComfyUI": "yes",
    "Replicate's cog-flux in bf16": "yes",
    "Replicate's cog-flux in fp8": "yes",
}
COMFY_READS = {
    *("diffusers", "ai-toolkit", "old halves", "alphas", "no prefix", "kohya", "kohya with text", "kohya of attention"),
    *("comfy", "onetrainer attention", "onetrainer", "lycoris", "float8", "zero bias changes", "bias changes"),
    *("dora scales", "mixed ranks", "two namings", "zero b", "diffusers with text"),
}
"""Layouts of which every key is in the map that its `model_lora_keys_unet` and `model_lora_keys_clip` make."""
COMFY_IN_PART = {"bias", "dora", "dora in part", "alpha pattern", "rank pattern", "rank stabilised"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


@pytest.fixture(scope="module")
def flux_sizes() -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        return adapter.shapes(FluxTransformer2DModel(guidance_embeds=True))


def _written(file: Path, pairs: dict[str, Pair], naming: str = "diffusers") -> weights.Weights:
    weights.write(file, pairs, {}, naming)
    return weights.read(file)


def _whole(sizes: dict[str, tuple[int, int]]) -> dict[str, Pair]:
    """A LoRA of rank 1 on every layer of these."""
    generator = torch.Generator().manual_seed(3)
    return {
        layer: (
            torch.randn(1, inputs, generator=generator).half() / 64,
            torch.randn(outputs, 1, generator=generator).half(),
        )
        for layer, (outputs, inputs) in sizes.items()
    }


def test_a_sound_lora_of_flux_has_no_faults_and_loads_everywhere(file: Path) -> None:
    lora = _written(file, a_lora(2))
    assert judge.remarks(lora) == []
    assert judge.loaders(lora, file) == ALL


def test_nan_is_a_fault_and_a_layer_without_effect_a_note(file: Path) -> None:
    pairs = a_lora(2, width=48)
    for layer, factor in (("transformer_blocks.0.ff.net.2", float("nan")), ("single_transformer_blocks.0.proj_out", 0)):
        pairs[layer] = (pairs[layer][0], pairs[layer][1] * factor)
    lora = _written(file, pairs)
    assert judge.faults(lora) == ["NaN or infinity in 1 of 17 layers (transformer_blocks.0.ff.net.2)"]
    assert judge.notes(lora) == [
        "no effect of 1 of 17 layers (single_transformer_blocks.0.proj_out): A or B is zero",
    ]


def test_partial_attention_and_mixed_ranks_are_notes_and_fail_in_cog_flux(file: Path) -> None:
    pairs = a_lora(2)
    del pairs["transformer_blocks.0.attn.to_q"]
    lora = _written(file, pairs)
    assert judge.faults(lora) == []
    assert judge.notes(lora) == ["q, k and v are not together in 1 place (transformer_blocks.0: img_attn.qkv)"]
    answers = judge.loaders(lora, file)
    assert answers["diffusers"] == answers["Replicate's cog-flux in bf16"] == "yes"
    assert answers["Replicate's cog-flux in fp8"].startswith("no: q, k and v")

    mixed = {**a_lora(2), "transformer_blocks.0.ff.net.2": a_lora(4)["transformer_blocks.0.ff.net.2"]}
    lora = _written(file, mixed)
    assert (judge.faults(lora), judge.notes(lora)) == ([], ["mixed ranks: 2, 4"])
    answers = judge.loaders(lora, file)
    assert answers["diffusers"] == "yes"
    assert answers["Replicate's cog-flux in bf16"] == "no: mixed ranks"
    assert "lora_adapter_metadata" not in lora.metadata


def test_alphas_beside_diffusers_metadata_are_a_fault_as_diffusers_refuses_them(file: Path) -> None:
    header = _written(file, a_lora(2)).metadata
    tensors = names.to_naming("diffusers", a_lora(2))
    tensors["transformer.transformer_blocks.0.attn.to_q.alpha"] = torch.tensor(2.0)
    save_file(tensors, file, metadata=header)
    lora = weights.read(file)
    assert judge.faults(lora) == [".alpha keys beside lora_adapter_metadata: diffusers refuses that"]
    assert judge.loaders(lora, file)["diffusers"].startswith("no: its loader stops with ValueError")


def test_layers_outside_the_blocks_are_a_note_and_diffusers_own_converter_drops_them(file: Path) -> None:
    pairs = {**a_lora(2), "x_embedder": (torch.ones(2, 64), torch.ones(3072, 2))}
    lora = _written(file, pairs)
    assert judge.remarks(lora) == ["layers outside the blocks: 1 of 18 layers (x_embedder)"]
    assert judge.loaders(lora, file)["diffusers"] == "yes"
    answers = judge.loaders(_written(file, pairs, "kohya"), file)
    assert answers["diffusers"] == "in part: without 1 of 18 layers (x_embedder)"
    assert answers["ComfyUI"] == "yes"


@pytest.mark.parametrize("tool", ["kohya", "fal"])
def test_at_flux1s_size_diffusers_reads_what_its_converters_are_made_for(
    tool: str, flux_sizes: dict[str, tuple[int, int]], file: Path
) -> None:
    """The same file is refused at another size, or where a layer is missing."""
    sizes = {layer: size for layer, size in flux_sizes.items() if layer not in names.OUTSIDE or layer == "proj_out"}
    if tool == "kohya":
        del sizes["proj_out"]
    tensors = names.to_naming("kohya" if tool == "kohya" else "bfl", _whole(sizes))
    if tool == "fal":
        tensors = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(tensors, file)
    lora = weights.read(file)
    assert len(lora.pairs) == len(sizes)
    answers = judge.loaders(lora, file)
    assert answers["diffusers"] == "yes"
    assert answers["ComfyUI"] == (
        "yes" if tool == "kohya" else "no: it finds no layer under these names (script/convert)"
    )
    assert answers["Replicate's cog-flux in bf16"].startswith("no: it needs diffusers' names")
    if tool == "fal":
        save_file({key: t for key, t in tensors.items() if "double_blocks.7." not in key}, file)
        answer = judge.loaders(weights.read(file), file)["diffusers"]
        assert answer.startswith("no: its loader stops with KeyError: 'base_model.model.double_blocks.7.")


@pytest.mark.parametrize("layout", lora_files.LAYOUTS)
def test_comfyui_reads_a_file_by_the_names_of_its_layers(layout: str, file: Path) -> None:
    lora_files.write(layout, Maker(lora_files.SIZES, lora_files.TEXT_SIZES), file)
    answer = judge._comfy(weights.read(file))
    wanted = "yes" if layout in COMFY_READS else "in part: " if layout in COMFY_IN_PART else "no: "
    assert answer.startswith(wanted), answer


def test_for_another_base_it_is_told_how_wide_that_is(file: Path) -> None:
    answers = judge.loaders(_written(file, a_lora(2, width=48)), file)
    assert answers["diffusers"] == "yes"
    assert answers["FLUX.1"] == "no: it is for a base 48 wide, and FLUX.1 is 3072 wide"


def test_a_layers_change_is_the_norm_of_its_product() -> None:
    for a, b in a_lora(3, width=48).values():
        wanted = torch.linalg.matrix_norm(b.double() @ a.double()).item()
        assert judge.change((a, b)) == pytest.approx(wanted, rel=1e-9)


def test_the_page_of_a_lora_with_more_than_a_and_b_says_so_and_it_is_sound(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, _ = lora_files.LAYOUTS["kohya with text"](Maker(lora_files.SIZES, lora_files.TEXT_SIZES))
    tensors["lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight"] = torch.ones(2, 2)
    save_file(tensors, file)
    assert inspect.main([str(file)]) == 0
    page = capsys.readouterr().out
    assert "sound:     no fault found" in page
    assert "note:      6 layers of the CLIP text encoder; they are not trained further" in page
    assert "note:      left out, 1 keys of T5's text encoder: lora_te3_encoder_block_0" in page


def test_a_lora_without_effect_is_a_fault(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.write(file, {layer: (a, b * 0) for layer, (a, b) in a_lora(2, width=48).items()}, {})
    assert inspect.main([str(file)]) == 1
    assert "fault:     it has no effect: A or B is zero in 17 of 17 layers" in capsys.readouterr().out
