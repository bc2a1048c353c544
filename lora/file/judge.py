"""What can be said of a LoRA's file: what is wrong with it, what is unusual, and what reads it.

diffusers is asked itself: its loader puts the file on an empty FLUX of the right size, and what arrived there is held
against what the file says. ComfyUI is no package: its rules are those of `model_lora_keys_unet` and `load_lora` in its
comfy/lora.py (November 2026), which know a layer by a fixed list of names.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from lora.file import keys, names
from lora.file.names import Pair
from lora.file.weights import ADAPTER_HEADER, Weights, not_finite

FLUX_WIDTH = 3072
"""Inputs of FLUX.1's attention layers."""
FLUX_BLOCKS = (19, 38)
"""Double and single ones of FLUX.1."""
TOLERANCE = 0.02
"""Of a layer's strength: what converting in 16 bits rounds off is less."""
_ADAPTER = "judged"


def remarks(lora: Weights) -> list[str]:
    """Faults and notes."""
    return [*faults(lora), *notes(lora)]


def faults(lora: Weights) -> list[str]:
    """What makes a LoRA draw nothing or noise, a line each; empty where it is sound."""
    pairs, found = lora.pairs, []
    broken = not_finite(pairs)
    if broken:
        found.append(f"NaN or infinity in {_count(broken, pairs)}")
    if not effective(lora):
        found.append(f"it has no effect: A or B is zero in {_count([*pairs, *lora.text], pairs | lora.text)}")
    if lora.has_alphas and ADAPTER_HEADER in lora.metadata:
        found.append(f".alpha keys beside {ADAPTER_HEADER}: diffusers refuses that")
    return found


def notes(lora: Weights) -> list[str]:
    """What is unusual about a sound LoRA, and may matter where it is used; a line each."""
    pairs, found = lora.pairs, []
    for part, left in lora.left_out.items():
        found.append(f"left out, {len(left)} keys of {part}: {names.some(left)}")
    zero = [layer for layer, pair in pairs.items() if change(pair) == 0 and layer not in lora.biases]
    if zero and effective(lora):
        found.append(f"no effect of {_count(zero, pairs)}: A or B is zero")
    if lora.text:
        found.append(f"{len(lora.text)} layers of the CLIP text encoder; they are not trained further")
    if lora.magnitudes:
        found.append(f"a DoRA: {_count(list(lora.magnitudes), pairs)} with a magnitude")
    if lora.biases:
        found.append(f"biases of {_count(list(lora.biases), pairs)}")
    if partial := partial_attention(pairs):
        where = "1 place" if len(partial) == 1 else f"{len(partial)} places"
        found.append(f"q, k and v are not together in {where} ({partial[0]}{', …' if len(partial) > 1 else ''})")
    if len(lora.ranks) > 1:
        found.append(f"mixed ranks: {', '.join(map(str, lora.ranks))}")
    outside = [layer for layer in pairs if layer in names.OUTSIDE]
    if outside:
        found.append(f"layers outside the blocks: {_count(outside, pairs)}")
    return found


def effective(lora: Weights) -> bool:
    """Whether any layer changes anything."""
    return bool(lora.biases or lora.magnitudes) or any(
        change(pair) != 0 for pair in (*lora.pairs.values(), *lora.text.values())
    )


def loaders(lora: Weights, path: Path) -> dict[str, str]:
    """Each way of using a FLUX LoRA -> "yes", why not, or what is lost; `lora` was read from the file `path`."""
    answers = {"diffusers": _diffusers(lora, path), "ComfyUI": _comfy(lora)}
    width = _width(lora.pairs)
    if width not in (None, FLUX_WIDTH):
        return answers | {"FLUX.1": f"no: it is for a base {width} wide, and FLUX.1 is {FLUX_WIDTH} wide"}
    pairs = lora.pairs
    triple = fast = ""
    plain = {f"transformer.{layer}.lora_{half}.weight" for layer in pairs for half in "AB"}
    if not pairs or not plain <= set(lora.keys):
        triple = fast = "no: it needs diffusers' names (script/convert)"
    elif len(lora.ranks) > 1:
        triple = fast = "no: mixed ranks"
    elif lora.magnitudes or lora.biases:
        triple = fast = "no: it knows neither DoRA nor biases"
    elif partial_attention(pairs):
        fast = "no: q, k and v are not together everywhere"
    elif modulated := [layer for layer in pairs if ".norm" in layer]:
        fast = f"in part: it drops or mis-scales {len(modulated)} layers such as {modulated[0]}"
    text = "in part: without the text encoder's layers" if lora.text else "yes"
    return answers | {
        "Replicate's cog-flux in bf16": triple or text,
        "Replicate's cog-flux in fp8": fast or text,
    }


def _diffusers(lora: Weights, path: Path) -> str:
    with _silent():
        try:
            state, alphas, header = FluxPipeline.lora_state_dict(
                str(path), return_alphas=True, return_lora_metadata=True, use_safetensors=True
            )
            own = {key: tensor for key, tensor in state.items() if key.startswith("transformer.")}
            transformer = _empty_flux(lora.pairs)
            if any("lora" in key for key in own):
                transformer.load_lora_adapter(
                    own, network_alphas=alphas, metadata=header, adapter_name=_ADAPTER, low_cpu_mem_usage=True
                )
        except Exception as error:  # whatever it raises is its answer
            told = " ".join(str(error).split())[:120]
            size = "" if _width(lora.pairs) == FLUX_WIDTH else "; it is made for FLUX.1's own size"
            return f"no: its loader stops with {type(error).__name__}{f': {told}' if told else ''}{size}"
    return _lost(lora, _arrived(transformer), sum(key.startswith("text_encoder.") for key in state))


def _empty_flux(pairs: Mapping[str, Pair]) -> FluxTransformer2DModel:
    """FLUX.1 without weights, as wide as the LoRA is made for, with the layers outside the blocks in its sizes."""
    width = _width(pairs) or FLUX_WIDTH

    def inputs(layer: str, usual: int) -> int:
        return pairs[layer][0].shape[1] if layer in pairs else usual

    blocks = list(FLUX_BLOCKS)
    if width != FLUX_WIDTH:
        for i, kind in enumerate(("transformer_blocks", "single_transformer_blocks")):
            numbers = [int(names.split(layer)[1]) for layer in pairs if layer.startswith(f"{kind}.")]
            blocks[i] = min(max(numbers, default=0) + 1, 2 * FLUX_BLOCKS[i])
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=inputs("x_embedder", 64),
            num_layers=blocks[0],
            num_single_layers=blocks[1],
            attention_head_dim=width,
            num_attention_heads=1,
            joint_attention_dim=inputs("context_embedder", 4096),
            pooled_projection_dim=inputs("time_text_embed.text_embedder.linear_1", 768),
            guidance_embeds=True,
        )
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # One number in memory for all: peft moves what it puts on a layer to where the layer is.
            setattr(module, name, torch.nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False))
    return transformer


def _arrived(transformer: FluxTransformer2DModel) -> dict[str, tuple[Pair, bool, bool]]:
    """What the loader put on: each layer's A and B as they will be applied, whether with a magnitude, with a bias."""
    found = {}
    for name, module in transformer.named_modules():
        if _ADAPTER not in getattr(module, "lora_A", {}):
            continue
        a, b = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
        if not a.weight.is_meta and not b.weight.is_meta:
            dora = _ADAPTER in module.lora_magnitude_vector
            pair = (a.weight.detach(), b.weight.detach() * module.scaling[_ADAPTER])
            found[name] = (pair, dora, b.bias is not None)
    return found


def _lost(lora: Weights, arrived: Mapping[str, tuple[Pair, bool, bool]], text_keys: int) -> str:
    pairs = lora.pairs
    missing = [layer for layer in pairs if layer not in arrived and (change(pairs[layer]) or layer in lora.biases)]
    if missing and not arrived:
        return "no: it finds no layer under these names (script/convert)"
    if 0 < len(lora.magnitudes) < len(pairs):
        return "no: it takes every layer for a DoRA's, and stops drawing at the first without a magnitude"
    lost = []
    if missing:
        lost.append(f"without {_count(missing, pairs)}")
    if dora := [layer for layer in lora.magnitudes if layer in arrived and not arrived[layer][1]]:
        lost.append(f"without the magnitudes of {_count(dora, pairs)}")
    if bias := [layer for layer in lora.biases if layer in arrived and not arrived[layer][2]]:
        lost.append(f"without the biases of {_count(bias, pairs)}")
    if other := [layer for layer in pairs if layer in arrived and _differs(pairs[layer], arrived[layer][0])]:
        lost.append(f"{_count(other, pairs)} at another strength")
    if lora.text and text_keys < 2 * len(lora.text):
        lost.append("without layers of the text encoder")
    return f"in part: {', '.join(lost)}" if lost else "yes"


def _differs(own: Pair, theirs: Pair) -> bool:
    (a, b), (c, d) = own, theirs
    apart = change((torch.cat([a.float(), c.float()]), torch.cat([b.float(), -d.float()], dim=1)))
    return apart > TOLERANCE * change(own)


_COMFY = re.compile(
    r"(transformer\.)?(single_)?transformer_blocks\..+|transformer\.[a-z_]+.*|(lycoris|lora_transformer)_.+"
    r"|diffusion_model\.(double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\b.*"
    r"|lora_unet_.+|lora_te1?_.+|text_encoder\.text_model\..+|text_encoders\.clip_l\..+"
)
_COMFY_PARTS = re.compile(
    r"\.lora_[AB](\.default)?\.weight|\.lora_[AB]|\.lora_(up|down)\.weight|\.lora\.(up|down)\.weight"
    r"|\.lora_linear_layer\.(up|down)\.weight|_lora\.(up|down)\.weight|\.alpha|\.dora_scale|\.diff(_b)?"
)


def _comfy(lora: Weights) -> str:
    """By the keys alone: it never looks at diffusers' header, and passes over what it does not know."""
    known = [key for key in lora.keys if keys.read(key)]
    lost = [key for key in known if not _comfy_reads(key)]
    if len(lost) == len(known):
        return "no: it finds no layer under these names (script/convert)"
    if lost:
        return f"in part: it passes over {len(lost)} of {len(known)} keys, such as {names.some(lost[:1])}"
    if lora.by_header:
        return "in part: it does not read the header's alpha, so the strength is another (script/convert)"
    return "yes"


def _comfy_reads(key: str) -> bool:
    part = _COMFY_PARTS.search(key)
    if part is None or part.end() != len(key) or key.startswith("transformer.base_model"):
        return False
    place = keys.read(key)
    stem = key[: part.start()]
    if place is None or not _COMFY.fullmatch(stem):
        return False
    bfl = place.naming == "bfl"
    return stem.startswith("diffusion_model.") if bfl else not stem.startswith("diffusion_model.transformer")


def partial_attention(modules: Collection[str]) -> list[str]:
    """The layers that cog-flux joins of which some part is there, but not all of q, k and v."""
    partial = []
    for kind, (_, _, joined) in names.KINDS.items():
        blocks = {layer.split(".")[1] for layer in modules if layer.startswith(f"{kind}.")}
        numbers = sorted(int(number) for number in blocks if number.isdecimal())
        for number in numbers:
            for whole, layers in joined.items():
                there = [layer for layer in layers if f"{kind}.{number}.{layer}" in modules]
                if there and not set(layers[:3]) <= set(there):
                    partial.append(f"{kind}.{number}: {whole}")
    return partial


def change(pair: Pair) -> float:
    """Frobenius norm of B A, how much a layer's weights are changed, from r x r matrices alone."""
    a, b = (part.double() for part in pair)
    square = torch.sum((b.T @ b) * (a @ a.T)).item()
    return 0.0 if square < 0 else math.sqrt(square)  # NaN stays NaN


def describe(lora: Weights, path: Path) -> str:
    """A page on what a LoRA is: for people. `path` is the file that `lora` was read from."""
    pairs, header = lora.pairs, lora.metadata
    dtypes = sorted({str(a.dtype).removeprefix("torch.") for a, _ in pairs.values()})
    count = sum(a.numel() + b.numel() for a, b in pairs.values())
    lines = [
        f"names:     {lora.naming}",
        f"rank:      {', '.join(map(str, lora.ranks))}",
        f"weights:   {count:,} in {len(pairs)} layers, {', '.join(dtypes)}",
    ]
    for title, key in _SHOWN.items():
        if header.get(key):
            lines.append(f"{title + ':':<10} {header[key][:200]}")
    lines.append("")
    lines.append(f"{'block':<32} {'layers':>6} {'|A|':>9} {'|B|':>9} {'|B A|':>9}")
    for block, layers in _blocks(pairs).items():
        sizes = [(_norm(pairs[k][0]), _norm(pairs[k][1]), change(pairs[k])) for k in layers]
        total = [math.sqrt(sum(size[i] ** 2 for size in sizes)) for i in range(3)]
        lines.append(f"{block:<32} {len(layers):>6} " + " ".join(f"{value:>9.3g}" for value in total))
    lines.append("")
    lines += [f"fault:     {fault}" for fault in faults(lora)] or ["sound:     no fault found"]
    lines += [f"note:      {note}" for note in notes(lora)]
    lines += [f"loads in:  {name}: {answer}" for name, answer in loaders(lora, path).items()]
    return "\n".join(lines)


_SHOWN = {
    "kind": "modelspec.architecture",
    "base": "ss_sd_model_name",
    "title": "modelspec.title",
    "trigger": "modelspec.trigger_phrase",
    "pixels": "modelspec.resolution",
    "steps": "ss_max_train_steps",
    "rate": "ss_learning_rate",
    "seed": "ss_seed",
}


def _blocks(pairs: Mapping[str, Pair]) -> dict[str, list[str]]:
    """Layers by the block that they are in, blocks in their order."""
    blocks: dict[str, list[str]] = {}
    for layer in pairs:
        parts = layer.split(".")
        blocks.setdefault(".".join(parts[:2]) if "transformer_blocks" in parts[0] else parts[0], []).append(layer)

    def order(block: str) -> tuple[str, int]:
        kind, _, number = block.partition(".")
        return ("" if kind == "transformer_blocks" else kind), int(number) if number.isdigit() else 0

    return {block: blocks[block] for block in sorted(blocks, key=order)}


def _width(pairs: Mapping[str, Pair]) -> int | None:
    """The width of the base: what attention reads, or what leaves a block; None where no layer tells."""
    for layer, (a, b) in pairs.items():
        if layer.endswith((".to_q", ".to_k", ".to_v", "_proj", ".linear", ".proj", ".proj_mlp")) and layer.count("."):
            return a.shape[1]
        if layer.endswith((".proj_out", ".to_out.0", ".to_add_out", ".net.2", "x_embedder", "context_embedder")):
            return len(b)
    return None


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()


def _count(layers: Sequence[str], pairs: Mapping[str, Pair]) -> str:
    return f"{len(layers)} of {len(pairs)} layers ({layers[0]}{', …' if len(layers) > 1 else ''})"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what diffusers logs about a file: the page says it."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(before)
