"""Keys of LoRA files: what is of no layer is named by its part, what would draw something else is refused by its kind.

The lines are as long as the keys are.
"""
# ruff: noqa: E501

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora.file import judge, keys, names, weights
from tests.file.test_names import a_lora

X = torch.ones(2, 2)


def _refusal(tensors: dict[str, torch.Tensor], tmp_path: Path) -> str:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"^x\.safetensors is not a LoRA for FLUX: ") as caught:
        weights.read(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    return str(caught.value).partition(" for FLUX: ")[2]


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("unet.transformer_blocks.3.ff.net.2.lora_A.default.weight", ("diffusers", "transformer_blocks.3.ff.net.2", "A")),
        ("transformer.transformer_blocks.3.attn.to_out.lora.up.weight", ("diffusers", "transformer_blocks.3.attn.to_out.0", "B")),
        ("transformer.transformer_blocks.3.attn.processor.to_q_lora.up.weight", ("diffusers", "transformer_blocks.3.attn.to_q", "B")),
        ("lora_unet_final_layer_adaLN_modulation_1.alpha", ("kohya", "final_layer.adaLN_modulation.1", "alpha")),
        ("lora_transformer_time_text_embed_timestep_embedder_linear_1.lora_up.weight", ("onetrainer", "time_text_embed.timestep_embedder.linear_1", "B")),
        ("diffusion_model.single_blocks.37.processor.qkv_lora.down.weight", ("xlabs", "single_blocks.37.linear1_qkv", "A")),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc2.dora_scale", ("clip", "encoder.layers.11.mlp.fc2", "magnitude")),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.down.weight", ("clip", "encoder.layers.1.self_attn.out_proj", "A")),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.k_proj.lora_up.weight", ("clip", "encoder.layers.1.self_attn.k_proj", "B")),
        ("transformer.transformer_blocks.0.attn.to_q.lora_B.bias", ("diffusers", "transformer_blocks.0.attn.to_q", "bias")),
        ("transformer.transformer_blocks.0.attn.norm_q.weight", None),
        ("transformer.transformer_blocks.x.attn.to_q.lora_A.weight", None),
        ("lora_A.weight", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_key_is_a_layer_and_a_part(key: str, read: tuple[str, str, str] | None) -> None:
    assert keys.read(key) == read


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight", "T5's text encoder"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight", "T5's text encoder"),
        ("lora_te1_text_projection.lora_up.weight", "CLIP's text encoder, but no attention or MLP of it"),
        ("bundle_emb.TOK.clip_l", "learned words (embeddings)"),
        ("transformer.x_embedder.weight", "whole weights, as a checkpoint holds them"),
        ("lora_unet_double_blocks_0_img_mlp_0.diff", "changes of whole weights and biases"),
        ("something.else", keys.NO_LAYER),
    ],
)
def test_what_is_left_out_is_named_by_its_part(key: str, part: str) -> None:
    own = names.to_naming("diffusers", a_lora(2, width=48))
    parsed = keys.parse({**own, key: X})
    assert parsed.left_out == {part: [key]}
    assert len(parsed.layers) == 17


def test_layers_of_two_namings_are_joined_and_one_that_is_there_twice_is_taken_from_diffusers() -> None:
    pairs = a_lora(2, width=48)
    other = {layer: (a, b * 2) for layer, (a, b) in pairs.items()}
    ours = {layer: pair for layer, pair in pairs.items() if "single" in layer or layer.endswith("to_out.0")}
    theirs = {layer: pair for layer, pair in other.items() if "single" not in layer}
    parsed = keys.parse(names.to_naming("kohya", theirs) | names.to_naming("diffusers", ours))
    assert parsed.namings == {"diffusers", "kohya"}
    assert parsed.layers.keys() == pairs.keys()
    assert torch.equal(
        parsed.layers["transformer_blocks.0.attn.to_out.0"].b, pairs["transformer_blocks.0.attn.to_out.0"][1]
    )
    assert torch.equal(parsed.layers["transformer_blocks.0.ff.net.2"].b, other["transformer_blocks.0.ff.net.2"][1])
    [(part, left)] = parsed.left_out.items()
    assert part == "layers that are there under a second name"
    assert len(left) == 3


def test_what_is_half_or_more_than_a_lora_is_refused_with_all_that_is_wrong() -> None:
    tensors = names.to_naming("diffusers", a_lora(2, width=48, blocks=(1, 0)))
    del tensors["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    tensors["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"] = torch.zeros(3, 48)
    tensors["transformer.transformer_blocks.0.attn.to_v.lora_E"] = torch.zeros(48)
    tensors["transformer.transformer_blocks.0.ff.net.2.diff"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"1 of 25 keys are of another kind of adapter: .*to_v\.lora_E") as caught:
        keys.parse(tensors)
    for part in ("half of a LoRA", "do not fit each other", "a LoRA and a change of the whole weight"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"transformer.transformer_blocks.0.attn.to_q.alpha": torch.ones(2)}, "its alpha is no number"),
        (
            {"transformer.transformer_blocks.0.attn.to_q.lora_B.bias": torch.ones(2)},
            "its bias does not fit its outputs",
        ),
        ({"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(1, 48)}, "scales a layer's inputs"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 48).int()}, "int32, which is no"),
    ],
)
def test_a_part_that_makes_no_sense_is_told(tensors: dict[str, torch.Tensor], says: str, tmp_path: Path) -> None:
    assert says in _refusal({**names.to_naming("diffusers", a_lora(2, width=48)), **tensors}, tmp_path)


FLUX = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (["lycoris_transformer_blocks_0_attn_to_k.lokr_w1"], "it is a LoKr of LyCORIS"),
        (["lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a"], "it is a LoHa of LyCORIS"),
        (["lora_unet_double_blocks_0_img_attn_qkv.oft_blocks"], "it is an OFT"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "it is an IP-Adapter"),
        (["controlnet_x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"], "it is a ControlNet"),
        ([FLUX, "transformer.transformer_blocks.0.attn.norm_q.weight"], "it is a control LoRA"),
        (["img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"], "it is a control LoRA"),
        (["lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q.lora_down.weight"], "Diffusion XL"),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "it is a LoRA for Stable Diffusion XL"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "it is a LoRA for Stable Diffusion 1, 2"),
        (["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"], "it is a LoRA for Stable Diffusion 3"),
        ([FLUX, "transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight"], "it is a LoRA for Qwen-Image"),
        ([FLUX, "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"], "it is a LoRA for FLUX.2"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "it is a LoRA for Wan"),
        (["lora_unet_blocks_0_cross_attn_k.lora_down.weight"], "it is a LoRA for Wan"),
        (["diffusion_model.layers.0.attention.to_q.lora_A.weight"], "it is a LoRA for Z-Image"),
        (["diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight"], "it is a LoRA for HunyuanVideo"),
        (["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], "it is a LoRA for a language model"),
        (["double_blocks.0.img_attn.qkv.weight", "img_in.bias"], "it is a whole checkpoint of a transformer such as FLUX"),
        (["transformer_blocks.0.attn.to_q.weight"], "it is a whole checkpoint of a transformer such as FLUX"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "it is a whole checkpoint of Stable Diffusion"),
        (["decoder.up_blocks.0.resnets.0.conv1.weight"], "it is a whole VAE"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "it is a whole text encoder"),
        (["clip_l", "t5"], "it is a textual inversion"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_in_one_sentence_with_what_reads_it(
    found: list[str], kind: str, tmp_path: Path
) -> None:
    told = _refusal({key: X.clone() for key in found}, tmp_path)
    assert kind in told
    assert "; " in told
    assert " read" in told


def test_a_lora_of_flux2_in_black_forest_labs_names_is_told_by_its_size(tmp_path: Path) -> None:
    stem = "diffusion_model.double_blocks.0.img_mlp.0"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(48, 2)}
    assert "it is a LoRA for FLUX.2; " in _refusal(tensors, tmp_path)


def test_a_control_lora_is_told_by_its_first_layer_alone(tmp_path: Path) -> None:
    tensors = {"transformer.x_embedder.lora_A.weight": torch.ones(2, 128), "transformer.x_embedder.lora_B.weight": X}
    assert "it is a LoRA for FLUX.1 Control or Fill" in _refusal(tensors, tmp_path)


def test_a_gguf_is_told_and_a_long_name_is_cut(tmp_path: Path) -> None:
    (tmp_path / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF\x03" + bytes(100))
    with pytest.raises(ValueError, match=r"flux1-dev-Q4_0\.gguf is a GGUF, a whole checkpoint, no LoRA; "):
        weights.read(tmp_path / "flux1-dev-Q4_0.gguf")
    (tmp_path / ("n" * 240)).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"^n{57}\.\.\. is not a whole safetensors file"):
        weights.read(tmp_path / ("n" * 240))


def test_a_lora_of_the_text_encoder_alone_is_one(tmp_path: Path) -> None:
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    file = tmp_path / "x.safetensors"
    save_file({f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}, file)
    lora = weights.read(file)
    assert (lora.pairs, list(lora.text), lora.naming) == ({}, ["encoder.layers.0.mlp.fc1"], "clip")
    page = judge.describe(lora, file)
    assert "loads in:  diffusers: yes" in page
    assert "loads in:  ComfyUI: yes" in page


def test_keys_as_long_as_a_page_are_cut_in_what_is_said(tmp_path: Path) -> None:
    assert len(_refusal({"k" * 5000: X}, tmp_path)) < 300


@pytest.mark.parametrize("pattern", ["(a+)+$", "a" * 300, ".*.*.*.*.*b", "[", 7])
def test_a_pattern_of_the_header_that_could_take_for_ever_is_refused(pattern: object, tmp_path: Path) -> None:
    said = json.dumps(
        {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {str(pattern): "much" if pattern == 7 else 2}}
    )
    save_file(
        names.to_naming("diffusers", a_lora(2, width=48)), tmp_path / "x.safetensors", {"lora_adapter_metadata": said}
    )
    with pytest.raises(ValueError, match="its lora_adapter_metadata cannot be read"):
        weights.read(tmp_path / "x.safetensors")
