"""A LoRA as a file: reading one of any naming, and writing diffusers' own. What can be said of it is in `judge`.

Read are safetensors, and tars with one safetensors in it, as trainers on Replicate return them. Pickles are not: they
can run code.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora import disk
from lora.file import keys, kinds, names
from lora.file.names import Layer, Pair
from lora.pictures import archive

ADAPTER_HEADER = "lora_adapter_metadata"
"""The header's entry in which diffusers keeps peft's settings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A LoRA as it stood in a file."""

    naming: str
    """One of `names.NAMINGS`, another that `keys` knows, or several, joined by "and"."""
    pairs: dict[str, Pair]
    """By diffusers' name of the layer, without `transformer.`; each alpha, or the header's, is folded into B."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Of some layers: what is added to their outputs."""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    """Of a DoRA's layers: `names.Layer.magnitude`."""
    text: dict[str, Pair] = field(default_factory=dict)
    """Layers of the CLIP text encoder (`encoder.layers.0.self_attn.q_proj`), as `pairs`."""
    metadata: dict[str, str]
    """The header's own, the empty one where there is none."""
    has_alphas: bool
    """Whether it holds `.alpha` keys."""
    by_header: bool = False
    """Whether the strength of a layer is the header's alpha's, which some loaders do not read."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Keys of which nothing is made, by the part that they are."""
    keys: tuple[str, ...] = ()
    """As they stood in the file."""

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs in the transformer's layers, ascending."""
        return sorted({len(a) for a, _ in self.pairs.values()})


def read(path: Path) -> Weights:
    """Raises ValueError that names the file where it is no safetensors, damaged, or no LoRA for FLUX: then its kind."""
    called = names.some([path.name])
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, it is no mapping
            kind = kinds.of(shapes)  # a whole checkpoint would fill the memory
            tensors = {} if kind else {key: file.get_tensor(key) for key in shapes}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if zipfile.is_zipfile(path):
            raise ValueError(
                f"{called} is a zip, or a checkpoint of torch's own kind; give a safetensors, or a tar with one"
            ) from error
        if path.is_file() and _begins(path) == b"GGUF":
            raise ValueError(f"{called} is a GGUF, a whole checkpoint, no LoRA; ComfyUI-GGUF reads it") from error
        raise ValueError(
            f"{called} is not a whole safetensors file ({str(error)[:200]}); fetch it again if it should be one, or"
            " give a safetensors or a trainer's tar"
        ) from error
    try:
        if kind:
            raise ValueError(f"it is {kind.name}; {kind.reader}")
        parsed = keys.parse({key: _plain(key, tensor) for key, tensor in tensors.items()})
        layers, text = parsed.layers, parsed.text
        if not parsed.alphas:
            layers = _by_header(layers, metadata, "transformer")
            text = _by_header(text, metadata, "text_encoder")
        if both := [name for name, layer in layers.items() if layer.magnitude is not None and layer.bias is not None]:
            raise ValueError(f"peft cannot apply a DoRA with biases, as {names.some(both)} have; ComfyUI reads it")
    except ValueError as error:
        raise ValueError(f"{called} is not a LoRA for FLUX: {error}") from error
    return Weights(
        naming=" and ".join(sorted(parsed.namings)) or "clip",
        pairs={name: layer[:2] for name, layer in layers.items()},
        biases={name: layer.bias for name, layer in layers.items() if layer.bias is not None},
        magnitudes={name: layer.magnitude for name, layer in layers.items() if layer.magnitude is not None},
        text={name: layer[:2] for name, layer in text.items()},
        metadata=metadata,
        has_alphas=parsed.alphas,
        by_header=any(layers[name] is not parsed.layers[name] for name in layers),
        left_out=parsed.left_out,
        keys=tuple(tensors),
    )


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _plain(key: str, tensor: Tensor) -> Tensor:
    """In a type that products are made in: float8 in bf16, which holds every value of it."""
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return tensor
    if tensor.dtype == torch.float64:
        return tensor.float()
    if tensor.dtype.is_floating_point:
        return tensor.to(torch.bfloat16)
    if tensor.numel() == 1:  # an alpha, in some files
        return tensor.float()
    raise ValueError(f"{names.some([key])} holds {str(tensor.dtype).removeprefix('torch.')}, which is no weight's type")


def _by_header(layers: Mapping[str, Layer], metadata: Mapping[str, str], component: str) -> dict[str, Layer]:
    """The layers with the alpha in B that diffusers' header tells, where it tells one.

    peft scales by alpha / rank, or by alpha / sqrt(rank) (arXiv:2312.03732); a layer's own alpha is that of the first
    pattern that is found at the end of its name (`peft.utils.get_pattern_key`).
    """
    try:
        config = json.loads(metadata.get(ADAPTER_HEADER, "{}"))
        alpha, root = config.get(f"{component}.lora_alpha"), config.get(f"{component}.use_rslora")
        patterns = config.get(f"{component}.alpha_pattern") or {}
        if alpha is None and not patterns:
            return dict(layers)
        expressions = {_expression(pattern): float(value) for pattern, value in patterns.items()}
        ranks = {name: len(layer.a) for name, layer in layers.items()}
        wholes = {name: math.sqrt(rank) if root else rank for name, rank in ranks.items()}
        alphas = {
            name: next((own for found, own in expressions.items() if found.match(name)), alpha) for name in layers
        }
        scales = {name: 1.0 if alphas[name] is None else alphas[name] / wholes[name] for name in layers}
    except (ValueError, AttributeError, TypeError, RecursionError, re.error) as error:
        raise ValueError(f"its {ADAPTER_HEADER} cannot be read: {error}") from error
    return {name: keys.scaled(layer, scales[name]) for name, layer in layers.items()}


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern of peft's; a stranger's may not be one that takes for ever."""
    if len(pattern) > 200 or re.search(r"[*+?{]", re.sub(r"\\d\+|\.\*", "", pattern)) or pattern.count(".*") > 3:
        raise ValueError("a pattern of it is no plain name of layers")
    return re.compile(rf"(.*\.)?({pattern})$")


def tensors_of(lora: Weights, naming: str = "diffusers") -> dict[str, Tensor]:
    """Everything of a LoRA as a file's tensors under `naming`, one of `names.NAMINGS`.

    Raises ValueError where the naming has no place for a part: biases and a DoRA's magnitudes are written for diffusers
    alone, the text encoder's layers in diffusers' and in kohya's.
    """
    tensors = names.to_naming(naming, lora.pairs)
    if naming != "diffusers" and (lora.biases or lora.magnitudes):
        part = "biases" if lora.biases else "the magnitudes of a DoRA"
        raise ValueError(f"{part} are written under diffusers' names alone")
    for layer, (a, b) in lora.text.items():
        if naming == "kohya":
            stem = f"lora_te1_text_model_{layer.replace('.', '_')}"
            alpha = torch.tensor(float(len(a)))
            tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": alpha}
        elif naming == "diffusers":
            stem = f"text_encoder.text_model.{layer}.lora_linear_layer"  # what diffusers and ComfyUI both read
            tensors |= {f"{stem}.down.weight": a, f"{stem}.up.weight": b}
        else:
            raise ValueError("the text encoder's layers have no place there; diffusers' and kohya's names have")
    tensors |= {f"transformer.{layer}.lora_magnitude_vector": part for layer, part in lora.magnitudes.items()}
    if lora.biases:  # peft wants one at every layer
        for layer, (_, b) in lora.pairs.items():
            tensors[f"transformer.{layer}.lora_B.bias"] = lora.biases.get(layer, b.new_zeros(len(b)))
    return names.apart(tensors)


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
    ranks = {len(a) for a, _ in pairs.values()}
    header = _header(metadata)
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
        header[ADAPTER_HEADER] = json.dumps(adapter, sort_keys=True)
    _write_sorted(path, names.to_naming(naming, pairs), header)


def write_whole(path: Path, lora: Weights, naming: str = "diffusers") -> None:
    """Writes everything of a LoRA: as `write`, or without diffusers' header where there is more than A and B: loaders
    then see by themselves what there is. Raises ValueError as `tensors_of`."""
    if lora.text or lora.biases or lora.magnitudes:
        _write_sorted(path, tensors_of(lora, naming), _header(lora.metadata))
    else:
        write(path, lora.pairs, lora.metadata, naming)


def _header(metadata: Mapping[str, str]) -> dict[str, str]:
    return {"format": "pt", **{key: v for key, v in metadata.items() if key not in ("format", ADAPTER_HEADER)}}


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
    """Why a LoRA does not belong on a base, a line each; empty where it does, or where the base lacks a layer of it.

    `shapes` holds the (outputs, inputs) of every linear layer of the base by its name.
    """
    pairs, faults = weights.pairs, []
    if not pairs:
        faults.append("it has no layer of FLUX's transformer, but of the text encoder alone")
    elif not pairs.keys() & shapes.keys():
        faults.append(f"none of its {len(pairs)} layers is in the base, such as {next(iter(pairs))}")
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


def not_finite(pairs: Mapping[str, Pair]) -> list[str]:
    """The layers with a NaN or an infinity: every picture drawn with one is black."""
    return [layer for layer, (a, b) in pairs.items() if not (a.isfinite().all() and b.isfinite().all())]


def halved(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The weights in 16 bits: bf16, where they are not in 16 bits already."""

    def half(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.to(torch.bfloat16)

    return {layer: (half(a), half(b)) for layer, (a, b) in pairs.items()}


def _shape(pair: Pair) -> tuple[int, int]:
    return len(pair[1]), pair[0].shape[1]
