"""The mathematics of FLUX's rectified flow, as free functions over tensors.

A picture's latents x and noise e are joined by x_t = (1 - t) x + t e, with t = 0 the picture and t = 1 pure noise; the
model learns the velocity v = e - x (Esser et al. 2024, arXiv:2403.03206, and Black Forest Labs' FLUX.1). Shapes: B
pictures, C latent channels, H x W latent cells, S = H/2 * W/2 image tokens, T text tokens.
"""

import functools
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

TRAINING_GUIDANCE = 1.0
"""FLUX.1-dev is guidance-distilled: its guidance input at 1 means the undistilled model, which is what the flow loss
describes (ostris' ai-toolkit, kohya's sd-scripts and SimpleTuner train at it too)."""


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, S, 4C): each 2 x 2 patch of latent cells is one token, as `FluxPipeline._pack_latents`."""
    b, c, h, w = latents.shape
    latents = latents.view(b, c, h // 2, 2, w // 2, 2)
    return latents.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, S, 4C) -> (B, C, height, width), the inverse of `pack`; height and width count latent cells."""
    b, _, c = tokens.shape
    tokens = tokens.view(b, height // 2, width // 2, c // 4, 2, 2)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


@functools.cache
def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(S, 3) position ids (0, row, column) of the tokens of height x width latent cells; made once for a size."""
    rows = torch.arange(height // 2, device=device, dtype=torch.float32)
    columns = torch.arange(width // 2, device=device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return F.pad(grid, (1, 0)).reshape(-1, 3)


@functools.cache
def text_ids(tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """(T, 3) zeros, made once: FLUX gives its text tokens no position."""
    return torch.zeros(tokens, 3, device=device)


def sample_timesteps(count: int, generator: torch.Generator, mean: float = 0.0, uniform_share: float = 0.0) -> Tensor:
    """(count,) times in (0, 1), t = sigmoid(N(mean, 1)): the logit-normal of arXiv:2403.03206, section 3.1; but a share
    of them (0 to 1) evenly from all.

    A higher mean sees more noise, which settles layout and style; a lower one settles detail.
    """
    device = generator.device
    times = torch.sigmoid(mean + torch.randn(count, generator=generator, device=device))
    if not uniform_share:
        return times
    anywhere, chance = torch.rand(2, count, generator=generator, device=device)
    return torch.where(chance < uniform_share, anywhere, times)


def share_of_timesteps(low: float, high: float, mean: float = 0.0, uniform_share: float = 0.0) -> float:
    """The share of `sample_timesteps` that lies from `low` to `high`, 0 to 1."""

    def below(t: float) -> float:
        return statistics.NormalDist(mean).cdf(math.log(t / (1 - t))) if 0 < t < 1 else float(t >= 1)

    return (1 - uniform_share) * (below(high) - below(low)) + uniform_share * (high - low)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = (1 - t) x + t e, for latents and noise (B, S, 4C) and timesteps (B,)."""
    t = timesteps.view(-1, 1, 1).to(latents.dtype)
    return (1 - t) * latents + t * noise


def velocity(
    transformer: FluxTransformer2DModel,
    noisy: Tensor,
    timesteps: Tensor,
    guidance: float,
    text: Mapping[str, Tensor],
    size: tuple[int, int],
) -> Tensor:
    """(B, S, 4C): the transformer's prediction at `noisy` (B, S, 4C) and `timesteps` (B,) in 0..1.

    `text` holds `prompt_embeds` (B, T, D) and `pooled` (B, P); `size` counts latent cells, (height, width).
    FLUX.1-schnell has no guidance input, and gets none.
    """
    embeds = text["prompt_embeds"]
    scale = torch.full((len(noisy),), guidance, device=noisy.device, dtype=torch.float32)
    return transformer(
        hidden_states=noisy,
        timestep=timesteps.to(noisy.dtype),
        guidance=scale if transformer.config.guidance_embeds else None,
        pooled_projections=text["pooled"],
        encoder_hidden_states=embeds,
        txt_ids=text_ids(embeds.shape[1], noisy.device),
        img_ids=image_ids(*size, noisy.device),
        return_dict=False,
    )[0]


def flow_loss(prediction: Tensor, latents: Tensor, noise: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error against v = e - x, in float32; a scalar. `weights` (B, S) are of the tokens, 1 on average."""
    if weights is None:
        return F.mse_loss(prediction.float(), (noise - latents).float())
    return (weights * (prediction.float() - (noise - latents).float()).square().mean(-1)).mean()


def sigmas(steps: int, tokens: int, scheduler: Mapping[str, Any]) -> Tensor:
    """(steps + 1,) times from 1 to 0 on which FLUX draws: more steps at high noise, the more tokens the more.

    `scheduler` is the scheduler's config; the formula is `calculate_shift` and the exponential time shift of diffusers'
    `FluxPipeline` and `FlowMatchEulerDiscreteScheduler`, from Black Forest Labs' `flux/sampling.py`.
    """
    times = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
    if scheduler["use_dynamic_shifting"]:
        low, high = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
        slope = (scheduler["max_shift"] - scheduler["base_shift"]) / (high - low)
        mu = scheduler["base_shift"] + slope * (tokens - low)
        times = math.exp(mu) / (math.exp(mu) + (1 / times - 1))
    else:
        times = scheduler["shift"] * times / (1 + (scheduler["shift"] - 1) * times)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)]).float()
