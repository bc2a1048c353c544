"""What of a LoRA's file fits a pipeline: read, measured, and what is left out told by its part."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor

from lora.file import judge, weights
from lora.file.names import Pair
from lora.file.weights import Weights
from lora.flux import adapter

_NAMED = 5
"""Layers that a message names."""


def read(pipeline: FluxPipeline, name: str, file: Path, log: Callable[[str], None]) -> Weights:
    """A LoRA's layers that the pipeline's transformer and its CLIP text encoder have, in the size that they have.

    `name` is what messages call it. The log is told what is left out, and where nothing of it has an effect. Raises
    ValueError where nothing is left, and for a file that is no LoRA for FLUX.1.
    """
    try:
        lora = weights.read(file)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for part, keys in lora.left_out.items():
        log(f"warning: {name}: {len(keys)} keys of {part} are left out: {_some(keys)}")
    _check_finite(name, lora)
    pairs = _matching(lora.pairs, pipeline.transformer)
    text = _matching(lora.text, pipeline.text_encoder)
    if not pairs and not text:
        raise ValueError(f"{name}: {_misfit(lora, pipeline)}")
    if left := [layer for layer in lora.pairs if layer not in pairs]:
        log(
            f"warning: {name}: {len(left)} of its {len(lora.pairs)} layers do not fit this base and are left out:"
            f" {_some(left)}"
        )
    if left := [layer for layer in lora.text if layer not in text]:
        log(
            f"warning: {name}: {len(left)} of its {len(lora.text)} layers of the CLIP text encoder do not fit this base"
            f" and are left out: {_some(left)}"
        )
    fitting = dataclasses.replace(
        lora,
        pairs=pairs,
        text=text,
        biases={layer: bias for layer, bias in lora.biases.items() if layer in pairs},
        magnitudes={layer: magnitude for layer, magnitude in lora.magnitudes.items() if layer in pairs},
    )
    if not judge.effective(fitting):
        log(f"warning: {name}: it has no effect: A or B of each of its layers is zero, as before a training")
    return fitting


def adapters(lora: Weights) -> list[dict[str, Tensor]]:
    """The LoRA as diffusers loads it, under its names: one adapter, or two where some layers alone are a DoRA's, for
    peft would make one of every layer of an adapter."""
    plain = {layer: pair for layer, pair in lora.pairs.items() if layer not in lora.magnitudes}
    if not lora.magnitudes or not plain:
        return [weights.tensors_of(lora)]
    dora = {layer: pair for layer, pair in lora.pairs.items() if layer in lora.magnitudes}
    return [
        weights.tensors_of(dataclasses.replace(lora, pairs=plain, magnitudes={})),
        weights.tensors_of(dataclasses.replace(lora, pairs=dora, biases={}, text={})),
    ]


def _matching(pairs: Mapping[str, Pair], model: torch.nn.Module | None) -> dict[str, Pair]:
    sizes = {} if model is None else adapter.shapes(model)
    return {layer: (a, b) for layer, (a, b) in pairs.items() if sizes.get(layer) == (len(b), a.shape[1])}


def _misfit(lora: Weights, pipeline: FluxPipeline) -> str:
    layers, sizes = lora.pairs | lora.text, adapter.shapes(pipeline.transformer)
    layer, (a, b) = next(iter(layers.items()))
    there = sizes.get(layer)
    has = f"has {there[1]} and {there[0]}" if there else "has no such layer"
    return (
        f"none of its {len(layers)} layers fits this base, so it would change nothing: {layer} is for {a.shape[1]}"
        f" inputs and {len(b)} outputs, the base {has}. Take a LoRA trained on this base"
    )


def _check_finite(name: str, lora: Weights) -> None:
    layers = lora.pairs | lora.text
    singles = {**lora.biases, **lora.magnitudes}
    broken = weights.not_finite(layers) + [layer for layer, part in singles.items() if not part.isfinite().all()]
    if broken:
        raise ValueError(
            f"{name}: {len(broken)} of its {len(layers)} layers hold weights that are not finite, such as {broken[0]}:"
            " its training broke down, and every picture would be black"
        )


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name[:100] for name in list(names)[:_NAMED]) + more
