"""The three ways in which FLUX LoRAs name their layers, and the exact ways between them.

- **diffusers**: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`. What the trainer writes.
- **BFL**: `double_blocks.0.img_attn.qkv.lora_A.weight`, the modules of Black Forest Labs' own code; Replicate's
  cog-flux uses these inside, ComfyUI knows them with `diffusion_model.` in front.
- **kohya**: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, BFL's modules as sd-scripts, Forge and most of
  the web sites know them, with an `.alpha` for each layer.

Black Forest Labs' code joins q, k and v (and a single block's MLP) into one layer. The LoRAs of n layers of rank r are
there one LoRA of rank n·r: the As stand above one another, the Bs are the blocks of a diagonal. Nothing is rounded, and
the way back cuts the blocks out again. A joined LoRA that was trained as one has no such blocks: each part gets the
whole A and its own rows of B, as in diffusers' converters.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A (r, inputs) and B (outputs, r) of one layer: it adds B A, with no further scale."""

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
MLP_RATIO = 4
"""Outputs of a single block's `proj_mlp` for each of its inputs, in every FLUX."""

_Kind = tuple[str, Mapping[str, str], Mapping[str, Sequence[str]]]
_KINDS: dict[str, _Kind] = {
    "transformer_blocks": ("double_blocks", DOUBLE, DOUBLE_JOINED),
    "single_transformer_blocks": ("single_blocks", SINGLE, SINGLE_JOINED),
}
_BFL_LAYERS = {kind: (*plain.values(), *joined) for kind, plain, joined in _KINDS.values()}
_KOHYA_LAYERS = {kind: {layer.replace(".", "_"): layer for layer in layers} for kind, layers in _BFL_LAYERS.items()}
_PARTS = {"lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha"}
_PREFIXES = {"transformer.": "diffusers", "diffusion_model.": "bfl", "base_model.model.": "bfl", "": "bfl"}


def parse(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Pair], list[str]]:
    """A LoRA file's tensors -> its naming, its layers as that naming calls them, with every alpha folded into B, and
    the keys that are of none of them: layers of the text encoders, say, which some trainers put into the same file.

    Raises ValueError where no key is of such a layer, half of a pair is missing, or a layer has more than a LoRA's
    parts (a DoRA's scale), without which it would do something else.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    namings: dict[str, str] = {}
    strange: list[str] = []
    other: list[str] = []
    for key, tensor in weights.items():
        match = re.fullmatch(rf"(.+)\.({'|'.join(_PARTS)})", key)
        found = _place(match[1]) if match else None
        if match is None or found is None:
            stems = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
            (other if match is None and any(map(_place, stems)) else strange).append(key)
            continue
        naming, layer = found
        part = _PARTS[match[2]]
        parts.setdefault(layer, {})[part] = tensor
        namings.setdefault(naming, key)
    faults = []
    if strange and not parts:
        faults.append(f"none of its {len(weights)} keys is of a FLUX LoRA: {some(strange)}")
    if other:
        faults.append(f"{len(other)} of {len(weights)} keys are of another kind of adapter: {some(other)}")
    if len(namings) > 1:
        faults.append(f"it mixes namings: {', '.join(f'{key} ({naming})' for naming, key in namings.items())}")
    halves = [layer for layer, part in parts.items() if not {"A", "B"} <= part.keys()]
    if halves:
        faults.append(f"{len(halves)} layers have only half of a LoRA: {some(halves)}")
    wrong = [layer for layer, part in parts.items() if layer not in halves and not _fits(part["A"], part["B"])]
    if wrong:
        faults.append(f"A and B of {len(wrong)} layers do not fit each other: {some(wrong)}")
    if not weights:
        faults.append("it holds no weights")
    if faults:
        raise ValueError("; ".join(faults))
    return next(iter(namings)), {layer: (part["A"], _scaled(part)) for layer, part in parts.items()}, strange


def from_naming(naming: str, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Layers as `naming` calls them -> as diffusers does (`transformer_blocks.0.attn.to_q`)."""
    return dict(pairs) if naming == "diffusers" else _cut(pairs)


def to_naming(naming: str, pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """diffusers' layers -> a LoRA file's tensors under `naming`, one of NAMINGS.

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
    return {key: tensor.contiguous() for key, tensor in weights.items()}


def _place(stem: str) -> tuple[str, str] | None:
    """A key without its ending -> its naming and layer, or None where it is of no FLUX block."""
    if match := re.fullmatch(r"lora_unet_(double_blocks|single_blocks)_(\d+)_(.+)", stem):
        layer = _KOHYA_LAYERS[match[1]].get(match[3])
        return ("kohya", f"{match[1]}.{match[2]}.{layer}") if layer else None
    for prefix, naming in _PREFIXES.items():
        if not stem.startswith(prefix):
            continue
        name = stem.removeprefix(prefix)
        if naming == "diffusers":
            return naming, name
        match = re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", name)
        return (naming, name) if match and match[3] in _BFL_LAYERS[match[1]] else None
    raise AssertionError("the empty prefix fits every key")


def _join(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    joined: dict[str, Pair] = {}
    unknown = []
    groups: dict[str, tuple[Sequence[str], dict[str, Pair]]] = {}
    for name, pair in pairs.items():
        kind, number, layer = _split(name)
        nothing: _Kind = ("", {}, {})
        bfl, plain, together = _KINDS.get(kind, nothing)
        whole = next((whole for whole, layers in together.items() if layer in layers), None)
        if layer in plain:
            joined[f"{bfl}.{number}.{plain[layer]}"] = pair
        elif whole:
            groups.setdefault(f"{bfl}.{number}.{whole}", (together[whole], {}))[1][layer] = pair
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"these layers have no name there: {some(unknown)}")
    return joined | {name: _diagonal(name, layers, parts) for name, (layers, parts) in groups.items()}


def _diagonal(name: str, layers: Sequence[str], parts: Mapping[str, Pair]) -> Pair:
    """One LoRA that does what `parts` do; a layer that has none gets zeros, which `_cut` takes away again."""
    ranks = {len(a) for a, _ in parts.values()}
    if len(ranks) > 1:
        raise ValueError(f"{name}: its parts have the ranks {sorted(ranks)}; they can only be joined at the same rank")
    some = next(iter(parts.values()))[0]
    rank, width = some.shape
    above, blocks = [], []
    for layer in layers:
        rows = MLP_RATIO * width if layer == "proj_mlp" else width
        a, b = parts.get(layer, (some.new_zeros(rank, width), some.new_zeros(rows, rank)))
        above.append(a)
        blocks.append(b)
    return torch.cat(above), torch.block_diag(*blocks)


def _cut(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    kinds = {bfl: (kind, {v: k for k, v in plain.items()}, together) for kind, (bfl, plain, together) in _KINDS.items()}
    cut: dict[str, Pair] = {}
    for name, (a, b) in pairs.items():
        bfl, number, layer = _split(name)
        kind, plain, together = kinds[bfl]
        if layer in plain:
            cut[f"{kind}.{number}.{plain[layer]}"] = (a, b)
            continue
        layers, width = together[layer], a.shape[1]
        heights = [width] * 3 + [len(b) - 3 * width] * (len(layers) - 3)
        if len(b) < len(layers) * width or sum(heights) != len(b):
            raise ValueError(f"{name}: {len(b)} outputs are not {len(layers)} layers of a base {width} wide")
        for part, pair in zip(layers, _blocks(a, b, heights), strict=True):
            if pair[0].any() or pair[1].any():
                cut[f"{kind}.{number}.{part}"] = pair
    return cut


def _blocks(a: Tensor, b: Tensor, heights: Sequence[int]) -> list[Pair]:
    """The parts of a joined LoRA: its diagonal's blocks, or, where it has none, A for each with its rows of B."""
    rank, rest = divmod(len(a), len(heights))
    rows = b.split(list(heights))
    if rest == 0:
        grid = [part.split(rank, dim=1) for part in rows]
        if not any(block.any() for i, line in enumerate(grid) for j, block in enumerate(line) if i != j):
            return [(above, grid[i][i]) for i, above in enumerate(a.split(rank))]
    return [(a, part) for part in rows]


def _split(name: str) -> tuple[str, str, str]:
    """`transformer_blocks.0.attn.to_q` -> its kind of block, its number, its layer; "" each where it is in no block."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
    return (match[1], match[2], match[3]) if match else ("", "", "")


def _scaled(part: Mapping[str, Tensor]) -> Tensor:
    """B with the factor alpha / rank in it; without an alpha, or with alpha = rank, B itself."""
    scale = part["alpha"].item() / len(part["A"]) if "alpha" in part else 1.0
    return part["B"] if scale == 1 else (part["B"].float() * scale).to(part["B"].dtype)


def _fits(a: Tensor, b: Tensor) -> bool:
    return a.ndim == b.ndim == 2 and len(a) == b.shape[1]


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
