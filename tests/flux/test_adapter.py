"""The LoRA on the transformer: its layers, its file, and what diffusers makes of that file."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open

from bench import step
from lora.file import judge, weights
from lora.flux import adapter, generate
from lora.flux.encode import Text
from lora.training.checkpoints import Checkpoints
from lora.training.examine import Glance

SCHEDULER = {"use_dynamic_shifting": False, "shift": 3.0}


@pytest.fixture(scope="module")
def flux_dev() -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer without its weights, from the config in its repository."""
    with torch.device("meta"):
        return FluxTransformer2DModel(**step.FLUX_DEV)


def _train_a_little(transformer: FluxTransformer2DModel, modules: list[str] | None = None) -> list[torch.nn.Parameter]:
    """A LoRA with an effect that can be seen: random weights in place of trained ones."""
    parameters = adapter.attach(transformer, 4, seed=3, modules=modules)
    generator = torch.Generator().manual_seed(4)
    for parameter in parameters:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return parameters


def _draw(transformer: FluxTransformer2DModel, text: Text, lora: Path | None = None) -> torch.Tensor:
    """diffusers' own pipeline, with diffusers' own loading of the LoRA; latents, for a tiny base has no autoencoder."""
    pipeline = generate.pipeline_of(transformer, None, SCHEDULER)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    return pipeline(
        prompt_embeds=text["prompt_embeds"][None],
        pooled_prompt_embeds=text["pooled"][None],
        width=64,
        height=32,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images


def test_flux_1_devs_attention_and_mlp_are_adapted_and_nothing_else(flux_dev: FluxTransformer2DModel) -> None:
    """The list, made from the model's own modules: every linear layer of a block but its modulation."""
    shapes = adapter.shapes(flux_dev)
    wanted = {name for name in shapes if "transformer_blocks." in name and ".norm" not in name}
    modules = adapter.target_modules(flux_dev)
    assert set(modules) == wanted
    assert len(modules) == 19 * 12 + 38 * 5 == 418
    assert sum(16 * sum(shapes[module]) for module in modules) == 65_372_160


def test_the_file_holds_a_pair_for_each_layer_with_alpha_equal_to_rank(
    tiny_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    _train_a_little(tiny_flux)
    weights.write(tmp_path / "lora.safetensors", adapter.trained(tiny_flux), {"modelspec.title": "TOK"})
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        keys = list(file.keys())
        tensors = {key: file.get_tensor(key) for key in keys}
        header = file.metadata()
    expected = [f"transformer.{m}.lora_{half}.weight" for m in adapter.target_modules(tiny_flux) for half in "AB"]
    assert Counter(keys) == Counter(expected)
    assert ".lora_A." in keys[0]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert header["format"] == "pt"
    assert header["modelspec.title"] == "TOK"
    assert weights.read(tmp_path / "lora.safetensors").ranks == [4]


def _put_back(parameters: list[torch.nn.Parameter]) -> None:
    """As a training ends: with the weights of a checkpoint, which are those of the file."""
    checkpoints = Checkpoints(parameters, 1)
    checkpoints.keep(1, Glance(loss=0.0, own=0.0, unseen=None, drift=0.0))
    checkpoints.put_back(checkpoints.kept[-1])


@pytest.mark.parametrize("pattern", [None, r"single_transformer_blocks\.0\.attn"])
def test_diffusers_draws_from_the_file_what_the_training_process_draws(
    pattern: str | None, tiny_flux: FluxTransformer2DModel, texts: dict[str, Text], tmp_path: Path
) -> None:
    untouched, plain = copy.deepcopy(tiny_flux), _draw(tiny_flux, texts["a TOK"])
    modules = adapter.choose(adapter.target_modules(tiny_flux), pattern)[0] if pattern else None
    _put_back(_train_a_little(tiny_flux, modules))
    ours = _draw(tiny_flux, texts["a TOK"])
    weights.write(tmp_path / "lora.safetensors", adapter.trained(tiny_flux), {})
    assert torch.equal(_draw(untouched, texts["a TOK"], tmp_path / "lora.safetensors"), ours)
    assert (ours - plain).abs().max() > 0.01


def test_a_training_starts_where_the_earlier_one_ended(
    tiny_flux: FluxTransformer2DModel, texts: dict[str, Text], tmp_path: Path
) -> None:
    again = copy.deepcopy(tiny_flux)
    _put_back(_train_a_little(tiny_flux))
    weights.write(tmp_path / "lora.safetensors", adapter.trained(tiny_flux), {})
    start = weights.read(tmp_path / "lora.safetensors").pairs
    parameters = adapter.attach(again, 4, seed=99, start=start)
    assert torch.equal(_draw(again, texts["a TOK"]), _draw(tiny_flux, texts["a TOK"]))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters)


def test_a_lora_that_is_not_finite_is_not_saved(tiny_flux: FluxTransformer2DModel, tmp_path: Path) -> None:
    adapter.attach(tiny_flux, 4, seed=0)[3].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1 of the LoRA's 17 layers .*lower learning_rate"):
        weights.write(tmp_path / "lora.safetensors", adapter.trained(tiny_flux), {})
    assert not (tmp_path / "lora.safetensors").exists()


def test_the_peers_example_of_a_regular_expression_chooses_four_layers(flux_dev: FluxTransformer2DModel) -> None:
    pattern = "transformer.single_transformer_blocks.(7|12|16|20).proj_out"
    chosen, added = adapter.choose(adapter.target_modules(flux_dev), pattern)
    assert chosen == [f"single_transformer_blocks.{i}.proj_out" for i in (7, 12, 16, 20)]
    assert added == []


@pytest.mark.parametrize(
    ("pattern", "added"),
    [
        (r"\.transformer_blocks\.3\.attn\.to_k", ["transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.to_v"]),
        (r"\.transformer_blocks\.3\.attn\.add_[qk]", ["transformer_blocks.3.attn.add_v_proj"]),
        (r"single.*\.5\.proj_mlp", [f"single_transformer_blocks.5.attn.to_{x}" for x in "qkv"]),
        (r"\.5\.attn\.to_v$", [f"{k}transformer_blocks.5.attn.to_{x}" for k in ("", "single_") for x in "qk"]),
        (r"ff_context", []),
    ],
)
def test_what_is_asked_for_is_completed_so_that_it_loads_everywhere(
    pattern: str, added: list[str], flux_dev: FluxTransformer2DModel
) -> None:
    modules = adapter.target_modules(flux_dev)
    chosen, completed = adapter.choose(modules, pattern)
    assert completed == added
    assert not set(chosen) & set(completed)
    assert judge.partial_attention([*chosen, *completed]) == []


def test_an_expression_that_fits_no_layer_is_answered_with_the_list_of_layers(flux_dev: FluxTransformer2DModel) -> None:
    with pytest.raises(ValueError, match=r"layers_to_optimize_regex: 'norm1' is found in none of the 418") as caught:
        adapter.choose(adapter.target_modules(flux_dev), "norm1")
    assert "transformer.transformer_blocks.<0 to 18>.attn.add_q_proj" in str(caught.value)
    assert "transformer.single_transformer_blocks.<0 to 37>.proj_mlp" in str(caught.value)
