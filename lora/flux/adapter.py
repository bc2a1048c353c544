"""The LoRA on FLUX's transformer: which layers, attaching it by peft, and one safetensors file out of it."""

import re
from collections.abc import Mapping, Sequence

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from lora.file import weights
from lora.file.names import Pair
from lora.flux.layer import AdaptedLinear

DOUBLE_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
SINGLE_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
"""Attention and MLP of every block, and nothing else: adapters on the embedders, the modulation or `norm_out` do not
load in every place where FLUX LoRAs are used, and q, k and v must be adapted together (Replicate's cog-flux joins
them)."""
TOGETHER = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
"""Layers of a block that are all adapted or none; a single block's `proj_mlp` is adapted only with the first three."""

FILE_DTYPE = torch.bfloat16
"""Of the weights in the file; cog-flux, ComfyUI and diffusers read it, and it holds every float32's range."""


def target_modules(transformer: FluxTransformer2DModel) -> list[str]:
    """The full names of the layers that can be adapted: 418 for FLUX.1-dev."""
    doubles = [
        f"transformer_blocks.{i}.{layer}" for i in range(len(transformer.transformer_blocks)) for layer in DOUBLE_LAYERS
    ]
    singles = [
        f"single_transformer_blocks.{i}.{layer}"
        for i in range(len(transformer.single_transformer_blocks))
        for layer in SINGLE_LAYERS
    ]
    return doubles + singles


def choose(modules: Sequence[str], pattern: str) -> tuple[list[str], list[str]]:
    """The modules that a regular expression asks for, and those added so that the LoRA loads everywhere; in order.

    The expression is searched for in `transformer.<module>`, as by `layers_to_optimize_regex` of Replicate's
    flux-fine-tuner. Raises ValueError that lists the modules where it is found in none.
    """
    asked = [module for module in modules if re.search(pattern, f"transformer.{module}")]
    if not asked:
        last: dict[tuple[str, str], str] = {}
        for kind, number, layer in (module.split(".", 2) for module in modules):
            last[kind, layer] = number
        raise ValueError(
            f"layers_to_optimize_regex: {pattern!r} is found in none of the {len(modules)} layers, which are"
            + "".join(f"\n  transformer.{kind}.<0 to {number}>.{layer}" for (kind, layer), number in last.items())
            + "\nfor example transformer.single_transformer_blocks.(7|12|16|20).proj_out"
        )
    wanted = set(asked)
    for module in asked:
        kind, number, layer = module.split(".", 2)
        for group in TOGETHER:
            if layer in group or (layer == "proj_mlp" and group == TOGETHER[0]):
                wanted |= {f"{kind}.{number}.{other}" for other in group}
    return asked, [module for module in modules if module in wanted - set(asked)]


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer by its name, whether or not a LoRA sits on it."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name.removesuffix(".base_layer"): (m.out_features, m.in_features) for name, m in linear.items()}


def attach(
    transformer: FluxTransformer2DModel,
    rank: int,
    seed: int,
    modules: Sequence[str] | None = None,
    start: Mapping[str, Pair] | None = None,
) -> list[torch.nn.Parameter]:
    """Freezes the base and adds a LoRA of alpha = rank on `modules` (all that can be adapted, where None).

    It starts as the identity, or as `start`, which has A and B of this rank for each of them. Returns its weights, in
    the type of the base's products (`lora.flux.layer`). The base's own weights require no gradient afterwards.
    `seed` fixes A; B is zero (Hu et al. 2021, arXiv:2106.09685).
    """
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        targets = target_modules(transformer) if modules is None else list(modules)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        # peft's own way to bring a layer of one's own: "Custom models" in its developer guides.
        config._register_custom_module({torch.nn.Linear: AdaptedLinear})
        transformer.add_adapter(config)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    if start is not None:
        halves = {layer: {"lora_A": a, "lora_B": b} for layer, (a, b) in start.items()}
        named = {f"{layer}.{half}.weight": t.float() for layer, pair in halves.items() for half, t in pair.items()}
        outcome = set_peft_model_state_dict(transformer, named)
        assert not outcome.unexpected_keys, outcome.unexpected_keys
        assert len(named) == len(parameters), "start must have every layer"
    return parameters


def state_dict(transformer: FluxTransformer2DModel) -> dict[str, torch.Tensor]:
    """The LoRA under diffusers' names, `transformer.<layer>.lora_A.weight` and `.lora_B.weight`, in bf16 on the CPU."""
    tensors = get_peft_model_state_dict(transformer)
    return {f"transformer.{name}": w.detach().to("cpu", FILE_DTYPE).contiguous() for name, w in tensors.items()}


def pairs_of(transformer: FluxTransformer2DModel) -> dict[str, Pair]:
    """The LoRA by layer, (A, B) each, in bf16 on the CPU."""
    tensors = state_dict(transformer)
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        layer.removeprefix("transformer."): (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"])
        for layer in layers
    }


def trained(transformer: FluxTransformer2DModel) -> dict[str, Pair]:
    """The LoRA by layer, as `pairs_of`, of which every weight is finite.

    Raises ValueError where one is not: such a LoRA draws black pictures, and is not worth returning.
    """
    pairs = pairs_of(transformer)
    broken = weights.not_finite(pairs)
    if broken:
        raise ValueError(
            f"the training broke down: {len(broken)} of the LoRA's {len(pairs)} layers hold weights that are not finite"
            f" (first: {broken[0]}); train with a lower learning_rate"
        )
    return pairs
