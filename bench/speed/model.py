"""A transformer with random weights, data of a case's shape, and the count of a step's work."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from bench.speed.case import Case
from lora.flux import encode
from lora.flux.encode import Example, Text
from lora.training.prior import Prior

PRIORS = 8
"""More than a batch, fewer than a training's 768: a step takes a few of them, whatever their number."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """A case with its data, encoded and on the device."""

    case: Case
    examples: Sequence[Example]
    priors: Sequence[Prior]
    texts: Mapping[str, Text]


def random_transformer(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """A transformer of this config with the classes' own random weights."""
    with made_there(device, dtype):
        return FluxTransformer2DModel(**config).eval().requires_grad_(False)


@contextlib.contextmanager
def made_there(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Whatever is made meanwhile is made on the device and in the type: no room is needed but for the weights."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def twin(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Another transformer on the same weights: not a byte of theirs is copied."""
    with torch.device("meta"):
        other = FluxTransformer2DModel.from_config(transformer.config)
    other.load_state_dict(transformer.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def make_lesson(case: Case, transformer: FluxTransformer2DModel, text_tokens: int) -> Lesson:
    """Random pictures, base's drawings and texts of the case's shapes; the drawings have its smallest side, as in a
    training."""
    weight, config = next(transformer.parameters()), transformer.config
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    def shape(side: int) -> tuple[int, int]:
        return (side // 16) ** 2, config.in_channels

    caption, small = "a photo of TOK", min(case.sides)
    examples = [
        Example(
            name=f"{number} at {side}x{side}",
            size=(side // 8, side // 8),
            mean=encode.in_host_memory(randn(*shape(side))),
            std=encode.in_host_memory(randn(*shape(side)).abs() / 10),
            caption=caption,
        )
        for side in case.sides
        for number in range(case.batch_size)
    ]
    priors = [
        Prior(
            prompt=caption,
            size=(small // 8, small // 8),
            noisy=encode.in_host_memory(randn(*shape(small))),
            timestep=(n + 1) / PRIORS,
            since=(n + 1) / PRIORS,
            until=n / PRIORS,
            velocity=encode.in_host_memory(randn(*shape(small))),
        )
        for n in range(PRIORS)
    ]
    texts = {
        prompt: {
            "prompt_embeds": encode.in_host_memory(randn(text_tokens, config.joint_attention_dim)),
            "pooled": encode.in_host_memory(randn(config.pooled_projection_dim)),
        }
        for prompt in ("", caption)
    }
    return Lesson(case=case, examples=examples, priors=priors, texts=texts)


def step_tflop(config: Mapping[str, Any], side: int, batch_size: int, text_tokens: int) -> float:
    """10¹² operations of forward and backward on frozen weights, for one step at a side in pixels.

    The products of a block take 24 d² S + 4 d S² operations forward (a multiply and an add each; d the width, S image
    and text tokens), the first term its linear layers and the second its attention; on FLUX.1-dev's 57 blocks that is
    1368 d² S + 228 d S². Backward, linear layers cost as much once more, because frozen weights have no gradient, and
    attention twice as much. Embedders, modulation and the adapter come to one or two percent, and are left out.
    """
    d = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config["num_single_layers"]
    tokens = (side // 16) ** 2 + text_tokens
    return batch_size * blocks * (2 * 24 * d**2 * tokens + 3 * 4 * d * tokens**2) / 1e12
