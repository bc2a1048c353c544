"""FLUX's layers as diffusers, Black Forest Labs and kohya name them, and the exact ways between these.

- **diffusers**: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`. What the trainer writes.
- **BFL**: `double_blocks.0.img_attn.qkv.lora_A.weight`, the modules of Black Forest Labs' own code; Replicate's
  cog-flux uses these inside, ComfyUI knows them with `diffusion_model.` in front.
- **kohya**: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, BFL's modules as sd-scripts, Forge and most of
  the web sites know them, with an `.alpha` for each layer.

How other tools write these names is in `keys`. Black Forest Labs' code joins q, k and v (and a single block's MLP)
into one layer. The LoRAs of n layers of rank r are there one LoRA of rank n·r: the As stand above one another, the Bs
are the blocks of a diagonal. Nothing is rounded, and the way back cuts the blocks out again. A joined LoRA that was
trained as one has no such blocks: each part gets the whole A and its own rows of B, as in diffusers' converters, and
parts with one A are joined to one LoRA of rank r again.

diffusers' own converters (`diffusers.loaders.lora_conversion_utils`) do the same for FLUX.1's width alone, drop what
lies outside the blocks or stop at a layer that is missing; the tests hold these tables against them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A (r, inputs) and B (outputs, r) of one layer: it adds B A, with no further scale."""


class Layer(NamedTuple):
    """What a file holds for one layer: of most LoRAs A and B alone."""

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    """(outputs,), added to the layer's output."""
    magnitude: Tensor | None = None
    """(outputs,), a DoRA's: the norm of each row of the layer's weight with the LoRA in it (arXiv:2402.09353)."""


NAMINGS = ("diffusers", "bfl", "kohya")

DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
SINGLE = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
DOUBLE_JOINED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE_JOINED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
SINGLE_QKV = "linear1_qkv"
"""The first three parts of `linear1`, which XLabs' LoRAs adapt; the name is ComfyUI's."""
OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
"""The layers before and behind the blocks."""
HALVES_SWAPPED = "norm_out.linear"
"""Its outputs are scale and shift, and Black Forest Labs' are shift and scale."""
MLP_RATIO = 4
"""Outputs of a single block's `proj_mlp` for each of its inputs, in every FLUX.1."""

_Kind = tuple[str, Mapping[str, str], Mapping[str, Sequence[str]]]
KINDS: dict[str, _Kind] = {
    "transformer_blocks": ("double_blocks", DOUBLE, DOUBLE_JOINED),
    "single_transformer_blocks": ("single_blocks", SINGLE, SINGLE_JOINED),
}
_BACK = {
    bfl: (
        kind,
        {theirs: ours for ours, theirs in plain.items()},
        {**joined, **({SINGLE_QKV: joined["linear1"][:3]} if "linear1" in joined else {})},
    )
    for kind, (bfl, plain, joined) in KINDS.items()
}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in OUTSIDE.items()}


def from_bfl(name: str, layer: Layer) -> dict[str, Layer]:
    """A layer of Black Forest Labs' code (`double_blocks.0.img_attn.qkv`) -> the layers of diffusers that it is.

    Raises ValueError where a joined layer's size is none of FLUX.1's.
    """
    if name in _OUTSIDE_BACK:
        own = _OUTSIDE_BACK[name]
        return {own: _swapped(layer) if own == HALVES_SWAPPED else layer}
    bfl, number, part = split(name)
    kind, plain, together = _BACK[bfl]
    if part in plain:
        return {f"{kind}.{number}.{plain[part]}": layer}
    layers, width, outputs = together[part], layer.a.shape[1], len(layer.b)
    heights = [width] * 3 + [MLP_RATIO * width] * (len(layers) - 3)
    if sum(heights) != outputs:
        raise ValueError(f"{name}: {outputs} outputs are not the {len(layers)} layers of a FLUX.1 that is {width} wide")
    biases, magnitudes = (
        whole.split(heights) if whole is not None else [None] * len(layers) for whole in (layer.bias, layer.magnitude)
    )
    return {
        f"{kind}.{number}.{own}": Layer(*pair, bias, magnitude)
        for own, pair, bias, magnitude in zip(layers, _blocks(layer, heights), biases, magnitudes, strict=True)
        if pair[0].any() or pair[1].any() or bias is not None
    }


def to_naming(naming: str, pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """diffusers' layers -> a LoRA file's tensors under `naming`, one of NAMINGS, no two of them in the same memory.

    Raises ValueError where the naming has no place for a layer, or where layers that are to be joined differ in rank.
    """
    assert naming in NAMINGS, naming
    joined = pairs if naming == "diffusers" else _join(pairs)
    weights: dict[str, Tensor] = {}
    for layer, (a, b) in joined.items():
        if naming == "kohya":
            stem = f"lora_unet_{layer.replace('.', '_')}"
            alpha = torch.tensor(float(len(a)))
            weights |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": alpha}
        else:
            stem = f"transformer.{layer}" if naming == "diffusers" else layer
            weights |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    return apart(weights)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in whole memory of their own, as safetensors wants them: joined layers have one A for all."""
    seen: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        start = tensor.data_ptr()
        own[key] = tensor.clone() if start in seen else tensor.contiguous()
        seen.add(start)
    return own


def _join(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    joined: dict[str, Pair] = {}
    unknown = []
    groups: dict[str, tuple[Sequence[str], dict[str, Pair]]] = {}
    for name, pair in pairs.items():
        if name in OUTSIDE:
            joined[OUTSIDE[name]] = _swapped(Layer(*pair))[:2] if name == HALVES_SWAPPED else pair
            continue
        kind, number, layer = split(name)
        nothing: _Kind = ("", {}, {})
        bfl, plain, together = KINDS.get(kind, nothing)
        whole = next((whole for whole, layers in together.items() if layer in layers), None)
        if layer in plain:
            joined[f"{bfl}.{number}.{plain[layer]}"] = pair
        elif whole:
            groups.setdefault(f"{bfl}.{number}.{whole}", (together[whole], {}))[1][layer] = pair
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"these layers have no name there: {some(unknown)}")
    return joined | {name: _one(name, layers, parts) for name, (layers, parts) in groups.items()}


def _one(name: str, layers: Sequence[str], parts: Mapping[str, Pair]) -> Pair:
    """One LoRA that does what `parts` do; a layer that has none gets zeros, which `from_bfl` takes away again."""
    ranks = {len(a) for a, _ in parts.values()}
    if len(ranks) > 1:
        raise ValueError(f"{name}: its parts have the ranks {sorted(ranks)}; they can only be joined at the same rank")
    if len({a.shape[1] for a, _ in parts.values()}) > 1:
        raise ValueError(f"{name}: its parts read inputs of several sizes, so they are of no one layer")
    first = next(iter(parts.values()))[0]
    if len(parts) == len(layers) and all(torch.equal(a, first) for a, _ in parts.values()):
        return first, torch.cat([parts[layer][1] for layer in layers])
    rank, width = first.shape
    above, blocks = [], []
    for layer in layers:
        rows = MLP_RATIO * width if layer == "proj_mlp" else width
        a, b = parts.get(layer, (first.new_zeros(rank, width), first.new_zeros(rows, rank)))
        above.append(a)
        blocks.append(b)
    return torch.cat(above), torch.block_diag(*blocks)


def _blocks(layer: Layer, heights: Sequence[int]) -> list[Pair]:
    """The parts of a joined LoRA: its diagonal's blocks, or, where it has none, A for each with its rows of B."""
    rank, rest = divmod(len(layer.a), len(heights))
    rows = layer.b.split(list(heights))
    if rest == 0:
        grid = [part.split(rank, dim=1) for part in rows]
        if not any(block.any() for i, line in enumerate(grid) for j, block in enumerate(line) if i != j):
            return [(above, grid[i][i]) for i, above in enumerate(layer.a.split(rank))]
    return [(layer.a, part) for part in rows]


def _swapped(layer: Layer) -> Layer:
    b, bias, magnitude = (
        torch.cat(whole.chunk(2)[::-1]) if whole is not None else None
        for whole in (layer.b, layer.bias, layer.magnitude)
    )
    assert b is not None
    return Layer(layer.a, b, bias, magnitude)


def split(name: str) -> tuple[str, str, str]:
    """`transformer_blocks.0.attn.to_q` -> its kind of block, its number, its layer; "" each where it is in no block."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
    return (match[1], match[2], match[3]) if match else ("", "", "")


def some(names: Iterable[str]) -> str:
    """The first three names, each cut to 60 characters, and how many more."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
