"""Pictures to latents and prompts to embeddings, once each, before the transformer is loaded.

One picture at one size is one Example, which carries its own caption: nothing is ever joined by the order of a loader.
All of it is kept in the machine's memory and each step fetches its own: a caption alone is 4 MiB under FLUX.1-dev, and
the GPU's memory is for the training, however many pictures there are.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lora.flux import flow
from lora.flux.base import Base
from lora.flux.hardware import Plan

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PROMPTS_AT_ONCE = 8
"""Through the text encoders: one by one, a hundred prompts wait for the launching of kernels."""

TEXT_LENGTHS = (256, 384, 512)
"""T5 tokens to choose from, where the base reads more than the first. 256 is what Black Forest Labs' FLUX.1-schnell and
ComfyUI pad to at the least; every attention and every product of a step counts the padding too."""

LEAST_WEIGHT = 0.1
"""Of a token where a mask is black, before scaling: OneTrainer's default for `unmasked_weight`. At 0 nothing would hold
the ground, and what is drawn there would be left to chance."""

Record = TypeVar("Record", bound="DataclassInstance")
Item = TypeVar("Item")
Size = TypeVar("Size", bound=Hashable)

Text = dict[str, Tensor]
"""`prompt_embeds` (T, D) from T5 and `pooled` (P,) from CLIP, of one prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One picture in one bucket, as the transformer sees it."""

    name: str
    size: tuple[int, int]
    """Latent cells, (height, width)."""
    mean: Tensor
    std: Tensor
    """(S, 4C) each, packed and normalised: the autoencoder gives a distribution, which `fit` draws from anew each time,
    so that its noise is not learned as if it were the picture's."""
    caption: str
    weights: Tensor | None = None
    """(S,) in float32: how much each token counts in the loss, 1 on average (`token_weights`); None: all the same."""


@torch.no_grad()
def encode_pictures(base: Base, plan: Plan, pictures: Iterable[tuple[str, str, Image.Image]]) -> list[Example]:
    """(name, caption, picture) -> Example; a picture's sides must be multiples of 16 pixels.

    A picture in RGBA has what to learn as its alpha channel. Where any has, all examples have weights.
    """
    examples = []
    with base.vae(plan) as vae:
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        for name, caption, picture in pictures:
            # (H, W, 3) bytes -> (1, 3, H, W) in -1..1; rounded to the plan's type last, or it would be twice as coarse
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
            pixels = pixels.to(plan.device).float() / 127.5 - 1
            latents = vae.encode(pixels.to(plan.dtype)).latent_dist  # (1, C, H/8, W/8)
            height, width = latents.mean.shape[-2:]
            example = Example(
                name=f"{name} at {picture.width}x{picture.height}",
                size=(height, width),
                mean=in_host_memory(flow.pack((latents.mean - shift) * scale)[0]),
                std=in_host_memory(flow.pack(latents.std * scale)[0]),
                caption=caption,
            )
            if picture.mode == "RGBA":
                learned = torch.from_numpy(np.array(picture.getchannel("A"))).to(plan.device)
                example = dataclasses.replace(example, weights=in_host_memory(token_weights(learned, example.size)))
            examples.append(example)
    if all(example.weights is None for example in examples):
        return examples
    return [
        dataclasses.replace(example, weights=in_host_memory(torch.ones(len(example.mean), device=plan.device)))
        if example.weights is None
        else example
        for example in examples
    ]


def token_weights(learned: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) bytes of a mask, 255 where to learn -> (S,) weights of the tokens of `size` latent cells, in float32.

    Each token has the mean of its pixels, LEAST_WEIGHT at least, and all are scaled to a mean of 1, so that a picture
    with a mask counts as much as one without. The formula is that of OneTrainer's `masked_losses` with
    `normalize_masked_area_loss` (modules/util/loss/masked_loss.py there).
    """
    grid = size[0] // 2, size[1] // 2
    each = F.adaptive_avg_pool2d(learned.float()[None] / 255, grid).flatten().clamp(min=LEAST_WEIGHT)
    return each / each.mean()


def text_length(counts: Iterable[int], limit: int) -> tuple[int, str]:
    """How many T5 tokens every text is padded to, and why: the shortest of TEXT_LENGTHS that holds prompts of so many
    tokens, and never more than the base's own `limit`."""
    most = max(counts, default=0)
    fitting = [length for length in TEXT_LENGTHS if most <= length < limit]
    if not fitting:
        return limit, f"all that the base reads; the longest prompt has {most}"
    return fitting[0], f"the longest prompt has {most}; the base reads {limit}, but padding takes time in every step"


@torch.no_grad()
def encode_texts(base: Base, plan: Plan, prompts: Iterable[str], tokens: int) -> dict[str, Text]:
    """Every distinct prompt, padded or cut to `tokens` of T5, by diffusers' own `FluxPipeline.encode_prompt`."""
    wanted = list(dict.fromkeys(prompts))
    texts = {}
    with base.text(plan) as pipeline:
        for start in range(0, len(wanted), PROMPTS_AT_ONCE):
            batch = wanted[start : start + PROMPTS_AT_ONCE]
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt=batch, prompt_2=None, device=plan.device, max_sequence_length=tokens
            )
            for i, prompt in enumerate(batch):
                texts[prompt] = {"prompt_embeds": in_host_memory(embeds[i]), "pooled": in_host_memory(pooled[i])}
    return texts


def in_host_memory(tensor: Tensor) -> Tensor:
    """The tensor in the machine's memory; pinned, so that a GPU fetches it without waiting for the step before."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor


def pinned(record: Record) -> Record:
    """The same record with its tensors in pinned memory, as `in_host_memory` leaves them for a GPU."""
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


def in_batches(
    items: Iterable[Item], size_of: Callable[[Item], Size], at_once: int
) -> Iterator[tuple[Size, Sequence[Item]]]:
    """The items in batches of one size, `at_once` at most in each, with that size; the sizes in the order in which they
    come first, the items of a size in theirs."""
    by_size: dict[Size, list[Item]] = {}
    for item in items:
        by_size.setdefault(size_of(item), []).append(item)
    for size, of_size in by_size.items():
        for start in range(0, len(of_size), at_once):
            yield size, of_size[start : start + at_once]


def batched(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape as a batch on the training's device."""
    return torch.stack([tensor.to(device, non_blocking=True) for tensor in tensors])


def stack(texts: Mapping[str, Text], prompts: Iterable[str], device: torch.device) -> Text:
    """The embeddings of a batch of prompts: `prompt_embeds` (B, T, D) and `pooled` (B, P)."""
    batch = [texts[prompt] for prompt in prompts]
    return {key: batched([text[key] for text in batch], device) for key in ("prompt_embeds", "pooled")}
