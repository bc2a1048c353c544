"""A LoRA as a file: reading one of any naming, writing diffusers' own, and what can be said of it.

Read are safetensors, and tars with one safetensors in it, as trainers on Replicate return them. Pickles are not: they
can run code.
"""

import json
import math
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora import disk
from lora.file import names
from lora.file.names import Pair
from lora.pictures import archive

FLUX_WIDTH = 3072
"""Inputs of FLUX.1's attention layers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A LoRA as it stood in a file."""

    naming: str
    """One of `names.NAMINGS`."""
    pairs: dict[str, Pair]
    """By diffusers' name of the layer, without `transformer.`; each alpha, or the header's, is folded into B."""
    metadata: dict[str, str]
    """The header's own, the empty one where there is none."""
    has_alphas: bool
    """Whether it holds `.alpha` keys."""
    strange: list[str]
    """Keys of no layer of FLUX's transformer; nothing is made of them."""

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs, ascending."""
        return sorted({len(a) for a, _ in self.pairs.values()})


def read(path: Path) -> Weights:
    """Raises ValueError that names the file where it is no safetensors, damaged, or no LoRA for FLUX."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if zipfile.is_zipfile(path):
            raise ValueError(
                f"{path.name} is a zip, or a checkpoint of torch's own kind; give a safetensors, or a tar with one"
            ) from error
        raise ValueError(f"{path.name} is not a whole safetensors file: {error}") from error
    try:
        naming, pairs, strange = names.parse(tensors)
        pairs = names.from_naming(naming, pairs)
        alphas = any(key.endswith(".alpha") for key in tensors)
        if not alphas:
            pairs = _scaled(pairs, metadata)
        if not pairs:
            raise ValueError("every layer of it is zero, so it changes nothing")
    except ValueError as error:
        raise ValueError(f"{path.name} is not a LoRA for FLUX: {error}") from error
    return Weights(naming=naming, pairs=pairs, metadata=metadata, has_alphas=alphas, strange=strange)


def _scaled(pairs: Mapping[str, Pair], metadata: Mapping[str, str]) -> dict[str, Pair]:
    """The pairs with the alpha in B that diffusers' header tells, where it tells one: peft scales by alpha / rank."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        alpha, root = config.get("transformer.lora_alpha"), config.get("transformer.use_rslora")
        if alpha is None:
            return dict(pairs)
        scales = {layer: alpha / (math.sqrt(len(a)) if root else len(a)) for layer, (a, _) in pairs.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"its lora_adapter_metadata cannot be read: {error}") from error
    return {
        layer: (a, b) if scales[layer] == 1 else (a, (b.float() * scales[layer]).to(b.dtype))
        for layer, (a, b) in pairs.items()
    }


def take_out(tar: Path, folder: Path) -> Path:
    """The one safetensors of a trainer's tar or tar.gz, written below `folder`; any other file comes back as it is.

    Raises ValueError where a tar holds none, or several (every reader of such tars would take one at random), where it
    is damaged, and where it passes the limits of `archive`. After an error `folder` is half filled.
    """
    if not archive.is_tar(tar):
        return tar
    path, found = folder / "lora.safetensors", []
    try:
        for name, chunks in archive.tar_files(tar):
            if name.endswith(".safetensors"):
                found.append(name)
                if len(found) == 1:
                    with disk.writing(path), path.open("wb") as out:
                        out.writelines(chunks)
    except ValueError as error:
        raise ValueError(f"{tar.name} cannot be unpacked: {error}") from error
    if len(found) != 1:
        inside = ", ".join(found[:5]) or "none"
        raise ValueError(f"{tar.name} must hold one safetensors file, but holds {len(found)}: {inside}")
    return path


def write(path: Path, pairs: Mapping[str, Pair], metadata: Mapping[str, str], naming: str = "diffusers") -> None:
    """Writes a LoRA under `naming` with `metadata` in the header, and diffusers' own where the naming is its own.

    That says alpha = rank outright, where a loader would else guess. Of peft's settings only these five are written: an
    older peft refuses a header with settings that it does not know yet, and every other one is at its default; the two
    empty ones are for diffusers 0.34, which fails without them. A LoRA of mixed ranks gets no such header: there the
    loaders count the ranks themselves. Equal arguments, equal bytes.

    Raises ValueError where the naming has no place for a layer, and DiskError where the disk does not take it.
    """
    header = {"format": "pt", **{k: v for k, v in metadata.items() if k not in ("format", "lora_adapter_metadata")}}
    ranks = {len(a) for a, _ in pairs.values()}
    if naming == "diffusers" and len(ranks) == 1:
        [rank] = ranks
        config = {
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(pairs),
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        adapter = {f"transformer.{key}": value for key, value in config.items()}
        header["lora_adapter_metadata"] = json.dumps(adapter, sort_keys=True)
    _write_sorted(path, names.to_naming(naming, pairs), header)


def _write_sorted(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As safetensors' `save_file`, but with the metadata sorted: that writes it in another order each time (0.8.0)."""
    plain = save(dict(tensors))
    start = 8 + int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(plain[8:start])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with disk.writing(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(plain)[start:])


def misfits(weights: Weights, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Why a LoRA does not belong on a base, a line each; empty where it does.

    `shapes` holds the (outputs, inputs) of every linear layer of the base by its name.
    """
    pairs, faults = weights.pairs, _strangers(weights)
    unknown = [layer for layer in pairs if layer not in shapes]
    if unknown:
        faults.append(f"{len(unknown)} of its {len(pairs)} layers are not in the base, such as {unknown[0]}")
    wrong = [layer for layer, pair in pairs.items() if layer in shapes and _shape(pair) != shapes[layer]]
    if wrong:
        seen, wanted = _shape(pairs[wrong[0]]), shapes[wrong[0]]
        faults.append(
            f"{len(wrong)} of its {len(pairs)} layers are of another size than the base's: {wrong[0]} is for"
            f" {seen[1]} inputs and {seen[0]} outputs, the base has {wanted[1]} and {wanted[0]}"
        )
    broken = not_finite(pairs)
    if broken:
        faults.append(f"{len(broken)} of its {len(pairs)} layers hold weights that are not finite, such as {broken[0]}")
    return faults


def _strangers(weights: Weights) -> list[str]:
    found = weights.strange
    return [f"{len(found)} keys are of no layer of FLUX's transformer: {names.some(found)}"] if found else []


def not_finite(pairs: Mapping[str, Pair]) -> list[str]:
    """The layers with a NaN or an infinity: every picture drawn with one is black."""
    return [layer for layer, (a, b) in pairs.items() if not (a.isfinite().all() and b.isfinite().all())]


def halved(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The weights in 16 bits: bf16, where they are not in 16 bits already."""

    def half(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.to(torch.bfloat16)

    return {layer: (half(a), half(b)) for layer, (a, b) in pairs.items()}


def faults(weights: Weights) -> list[str]:
    """What makes a LoRA draw nothing, noise, or something else in each loader; a line each, empty where it is sound."""
    pairs = weights.pairs
    found = _strangers(weights)
    broken = not_finite(pairs)
    if broken:
        found.append(f"NaN or infinity in {_count(broken, pairs)}")
    zero = [layer for layer, pair in pairs.items() if layer not in broken and change(pair) == 0]
    if zero:
        found.append(f"no effect of {_count(zero, pairs)}: A or B is zero")
    if weights.has_alphas and "lora_adapter_metadata" in weights.metadata:
        found.append(".alpha keys beside lora_adapter_metadata: diffusers refuses that")
    if partial := partial_attention(pairs):
        where = "1 place" if len(partial) == 1 else f"{len(partial)} places"
        found.append(f"q, k and v are not together in {where} ({partial[0]}{', …' if len(partial) > 1 else ''})")
    if len(weights.ranks) > 1:
        found.append(f"mixed ranks: {', '.join(map(str, weights.ranks))}")
    outside = [layer for layer in pairs if not re.match(r"(single_)?transformer_blocks\.\d+\.", layer)]
    if outside:
        found.append(f"layers outside the blocks: {_count(outside, pairs)}")
    return found


def loaders(weights: Weights) -> dict[str, str]:
    """Each way of using a FLUX LoRA -> "yes", or why not."""
    pairs, naming = weights.pairs, weights.naming
    double = triple = fast = ""
    if weights.has_alphas and "lora_adapter_metadata" in weights.metadata:
        double = "no: .alpha keys beside lora_adapter_metadata"
    elif naming == "bfl":
        double = "no: it needs diffusers' or kohya's names (script/convert)"
    if naming != "diffusers":
        triple = fast = "no: it needs diffusers' names (script/convert)"
    elif len(weights.ranks) > 1:
        triple = fast = "no: mixed ranks"
    elif partial_attention(pairs):
        fast = "no: q, k and v are not together everywhere"
    elif modulated := [layer for layer in pairs if ".norm" in layer]:
        fast = f"in part: it drops or mis-scales {len(modulated)} layers such as {modulated[0]}"
    widths = {a.shape[1] for layer, (a, _) in pairs.items() if layer.endswith("attn.to_q")}
    if widths and widths != {FLUX_WIDTH}:
        other = f"no: it is for a base {min(widths)} wide, and FLUX.1 is {FLUX_WIDTH} wide"
        return {"the base that it was trained on": double or "yes", "FLUX.1": other}
    return {
        "diffusers": double or "yes",
        "ComfyUI": "yes",
        "Replicate's cog-flux in bf16": triple or "yes",
        "Replicate's cog-flux in fp8": fast or "yes",
    }


def partial_attention(modules: Collection[str]) -> list[str]:
    """The layers that cog-flux joins of which some part is there, but not all of q, k and v."""
    partial = []
    for kind, joined in (
        ("transformer_blocks", names.DOUBLE_JOINED),
        ("single_transformer_blocks", names.SINGLE_JOINED),
    ):
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
    return math.sqrt(max(0.0, torch.sum((b.T @ b) * (a @ a.T)).item()))


def describe(weights: Weights) -> str:
    """A page on what a LoRA is: for people."""
    pairs, header = weights.pairs, weights.metadata
    dtypes = sorted({str(a.dtype).removeprefix("torch.") for a, _ in pairs.values()})
    count = sum(a.numel() + b.numel() for a, b in pairs.values())
    lines = [
        f"names:     {weights.naming}",
        f"rank:      {', '.join(map(str, weights.ranks))}",
        f"weights:   {count:,} in {len(pairs)} layers, {', '.join(dtypes)}",
    ]
    for title, key in _SHOWN.items():
        if header.get(key):
            lines.append(f"{title + ':':<10} {header[key]}")
    lines.append("")
    lines.append(f"{'block':<32} {'layers':>6} {'|A|':>9} {'|B|':>9} {'|B A|':>9}")
    for block, layers in _blocks(pairs).items():
        sizes = [(_norm(pairs[k][0]), _norm(pairs[k][1]), change(pairs[k])) for k in layers]
        total = [math.sqrt(sum(size[i] ** 2 for size in sizes)) for i in range(3)]
        lines.append(f"{block:<32} {len(layers):>6} " + " ".join(f"{value:>9.3g}" for value in total))
    lines.append("")
    found = faults(weights)
    lines += [f"fault:     {fault}" for fault in found] or ["sound:     no fault found"]
    lines += [f"loads in:  {name}: {answer}" for name, answer in loaders(weights).items()]
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


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()


def _shape(pair: Pair) -> tuple[int, int]:
    return len(pair[1]), pair[0].shape[1]


def _count(layers: Sequence[str], pairs: Mapping[str, Pair]) -> str:
    return f"{len(layers)} of {len(pairs)} layers ({layers[0]}{', …' if len(layers) > 1 else ''})"
