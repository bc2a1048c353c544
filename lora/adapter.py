"""The LoRA on FLUX's transformer: which layers, attaching it by peft, and one safetensors file out of it."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

DOUBLE_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
SINGLE_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
"""Attention and MLP of every block, and nothing else: adapters on the embedders, the modulation or `norm_out` do not
load in every place where FLUX LoRAs are used, and q, k and v must be adapted together (Replicate's cog-flux joins
them)."""


def target_modules(transformer: FluxTransformer2DModel) -> list[str]:
    """The full names of the layers to adapt; 37 or so for a toy, 494 for FLUX.1-dev."""
    doubles = [
        f"transformer_blocks.{i}.{layer}" for i in range(len(transformer.transformer_blocks)) for layer in DOUBLE_LAYERS
    ]
    singles = [
        f"single_transformer_blocks.{i}.{layer}"
        for i in range(len(transformer.single_transformer_blocks))
        for layer in SINGLE_LAYERS
    ]
    return doubles + singles


def attach(transformer: FluxTransformer2DModel, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """Freezes the base and adds a LoRA of alpha = rank that starts as the identity.

    Returns its weights, in float32 whatever the base's type: steps of 1e-4 vanish in bf16's 8 bits. The base's own
    weights require no gradient afterwards. `seed` fixes A; B is zero (Hu et al. 2021, arXiv:2106.09685).
    """
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules(transformer))
        transformer.add_adapter(config)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def state_dict(transformer: FluxTransformer2DModel) -> dict[str, torch.Tensor]:
    """The LoRA under diffusers' names, `transformer.<layer>.lora_A.weight` and `.lora_B.weight`, in bf16 on the CPU."""
    weights = get_peft_model_state_dict(transformer)
    return {f"transformer.{name}": w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in weights.items()}


def save(transformer: FluxTransformer2DModel, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the LoRA to `path` with `metadata` and peft's own in the header.

    Raises ValueError where a weight is not finite: such a LoRA draws black pictures, and is not worth returning.
    """
    weights = state_dict(transformer)
    broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"the training broke down: {len(broken)} of the LoRA's {len(weights)} weights are not finite"
            f" (first: {broken[0]}); train with a lower learning_rate"
        )
    # Without peft's config a loader guesses alpha; its JSON is sorted so that equal runs are equal bytes.
    config = _collate_lora_metadata({"transformer": transformer})["transformer_lora_adapter_metadata"]
    header = {f"transformer.{key}": sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    everything = {"format": "pt", **metadata, "lora_adapter_metadata": json.dumps(header, sort_keys=True)}
    save_file(weights, path, metadata=everything)
