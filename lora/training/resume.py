"""The LoRA that a training goes on from (`resume_from`): fetched, held against the base, made the training's start."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from lora.file import names, source, weights
from lora.file.names import Pair
from lora.file.weights import Weights
from lora.flux import adapter
from lora.request import TrainRequest
from lora.result import record

Log = Callable[[str], None]


def fetch(request: TrainRequest, token: str | None, folder: Path) -> tuple[Weights, str]:
    """The LoRA of `resume_from`, and the hash of its file; raises ValueError that names the input."""
    assert request.resume_from is not None
    folder.mkdir()
    file = source.fetch(request.resume_from, folder, "resume_from", token)
    try:
        return weights.read(file), record.file_hash(file)
    except ValueError as error:
        raise ValueError(f"resume_from: {error}") from error


def fitting(earlier: Weights, skeleton: FluxTransformer2DModel, log: Log) -> Weights:
    """What of the earlier LoRA belongs on the base's transformer, in 16 bits; the log names what is left out.

    Raises ValueError where the LoRA was made for another base, or its training broke down.
    """
    sizes = adapter.shapes(skeleton)
    if faults := weights.misfits(earlier, sizes):
        raise ValueError("\n  ".join(["resume_from: this LoRA does not fit:", *faults]))
    left_out = {part: list(keys) for part, keys in earlier.left_out.items()}
    if earlier.text:
        left_out["the CLIP text encoder, which is not trained here"] = list(earlier.text)
    if unknown := [layer for layer in earlier.pairs if layer not in sizes]:
        left_out["layers that the base does not have"] = unknown
    for part, keys in left_out.items():
        log(f"warning: resume_from: left out, {len(keys)} of {part}: {names.some(keys)}")
    return dataclasses.replace(
        earlier,
        pairs=weights.halved({layer: pair for layer, pair in earlier.pairs.items() if layer in sizes}),
        biases={layer: bias for layer, bias in earlier.biases.items() if layer in sizes},
        magnitudes={layer: magnitude for layer, magnitude in earlier.magnitudes.items() if layer in sizes},
        text={},
    )


def start(
    earlier: Weights, rank: int, seed: int, modules: Sequence[str], skeleton: FluxTransformer2DModel, log: Log
) -> dict[str, Pair]:
    """A and B of every layer to train, at `rank`, which together do what the earlier LoRA does.

    To train are `modules` and the further layers of the blocks that the earlier LoRA has, such as the modulation's: it
    would not be the same without them. A layer that it lacks, and the rows up to `rank`, begin as in a new training:
    with A as peft draws it and B zero. Raises ValueError where the LoRA does not fit, has a higher rank or is a DoRA.
    """
    fits = fitting(earlier, skeleton, log)
    if fits.magnitudes:
        raise ValueError(
            "resume_from: this is a DoRA, which cannot be trained further; set training_steps to 0 to pack it, or leave"
            " resume_from empty"
        )
    if fits.biases:
        log(f"warning: resume_from: left out, the biases of {len(fits.biases)} layers, which are not trained here")
    if outside := [layer for layer in fits.pairs if layer in names.OUTSIDE]:
        log(f"warning: resume_from: left out, layers outside the blocks, which few tools load: {names.some(outside)}")
    pairs = {layer: pair for layer, pair in fits.pairs.items() if layer not in outside}
    ranks = sorted({len(a) for a, _ in pairs.values()})
    if not pairs or ranks[-1] > rank:
        raise ValueError(
            f"resume_from: this LoRA has layers of rank {ranks[-1]}, and lora_rank is {rank}: set lora_rank to"
            f" {ranks[-1]} or more"
            if pairs
            else "resume_from: this LoRA has no layer in FLUX's blocks; leave resume_from empty"
        )
    log(f"the earlier LoRA: {len(pairs)} layers of rank {', '.join(map(str, ranks))}")
    besides = [layer for layer in pairs if layer not in set(modules)]
    if besides:
        log(f"layers: {len(besides)} of the earlier LoRA are trained too, such as {besides[0]}")
    if lacking := [layer for layer in modules if layer not in pairs]:
        log(
            f"layers: {len(lacking)} of {len(modules)} are not in the earlier LoRA and start from zero, such as"
            f" {lacking[0]}"
        )
    if ranks[0] < rank:
        log(f"the earlier LoRA is widened to rank {rank}; what it draws stays the same")
    sizes, generator = adapter.shapes(skeleton), torch.Generator().manual_seed(seed)
    return {layer: _widened(layer, pairs, sizes[layer], rank, generator) for layer in (*modules, *besides)}


def _widened(
    layer: str, pairs: Mapping[str, Pair], size: tuple[int, int], rank: int, generator: torch.Generator
) -> Pair:
    """A (rank, inputs) and B (outputs, rank) that do what the layer's own do, which is nothing where it has none.

    New rows of A are uniform within 1 / sqrt(inputs), as peft draws them (`LoraLayer.reset_lora_parameters`).
    """
    outputs, inputs = size
    a, b = pairs.get(layer, (torch.zeros(0, inputs), torch.zeros(outputs, 0)))
    more = rank - len(a)
    rows = (torch.rand(more, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
    return torch.cat([a.float(), rows]), torch.cat([b.float(), torch.zeros(outputs, more)], dim=1)
