"""The toy base's autoencoder: FLUX.1's classes, eight times smaller each way, and how it is trained."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.multiprocessing
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from toyflux import drawing, world
from toyflux.stage import Machine, fit


def new_vae() -> AutoencoderKL:
    """Eight times smaller each way, 16 channels, as FLUX.1's; the decoder is the deeper half.

    Norms take all channels as one group; of eight groups the first levels would have two channels each.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=world.NATIVE[0],
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def _any_picture(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    kind = rng.random()
    if kind < 0.2:
        return drawing.clutter(rng, size)
    if kind < 0.5:
        manner = world.style(world.made_up_word(rng)) if rng.random() < 0.5 else None
        scene = world.sample_scene(rng, [world.creature(world.made_up_word(rng))], manner)
        return drawing.draw(scene, rng.getrandbits(32), size)
    return drawing.draw(world.training_scene(rng), rng.getrandbits(32), size)


def _some_pictures(rng: random.Random, count: int, whole: bool) -> Tensor:
    """`count` crops of 64 pixels, or half as many whole pictures of any size. A fifth of them are of nothing in the
    world, so that users' photographs survive too."""
    size = world.training_size(rng) if whole else world.NATIVE
    x = to_tensor([_any_picture(rng, size) for _ in range(max(1, count // 2))])
    if not whole:
        corners = [(rng.randrange(0, 33, 4), rng.randrange(0, 33, 4)) for _ in range(2)]
        x = torch.cat([x[:, :, i : i + 64, j : j + 64] for i, j in corners])
    return x.flip(-1) if rng.random() < 0.5 else x


def _picture_loss(error: Tensor) -> Tensor:
    """Absolute and squared, and that of the gradients (edges)."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def principal_components(device: str) -> Callable[[Tensor], Tensor]:
    """What makes of pictures (n, 3, height, width) the 16 principal components of every square of 8 x 8 pixels, with a
    variance of 1 each over the world: (n, 16, height / 8, width / 8)."""
    rng = random.Random("squares")
    pictures = to_tensor([drawing.draw(world.training_scene(rng), i) for i in range(256)])
    squares = F.unfold(pictures, 8, stride=8).mT.flatten(0, 1)  # (n, 192)
    mean = squares.mean(0)
    _, sizes, directions = torch.linalg.svd(squares - mean, full_matrices=False)
    basis = (directions[:16] / sizes[:16, None] * math.sqrt(len(squares))).to(device)
    kernels = basis.view(16, 3, 8, 8)
    bias = -basis @ mean.to(device)
    return lambda x: F.conv2d(x, kernels, bias, stride=8)


def train_vae(machine: Machine, steps: int, batch: int, log: Callable[[str], None]) -> AutoencoderKL:
    """Both halves, then the scale and shift that make latents of the world about standard normal.

    The first twentieth teaches them apart: the encoder to find the principal components of a picture's squares, the
    decoder to draw from those (29 dB of the world are in them). After 300 steps of 4 pictures the two were at 20 dB
    this way, at 14 with each other alone to learn from. Then together, the last fifth on whole pictures.
    """
    torch.manual_seed(0)
    vae = new_vae().to(machine.device)
    components = principal_components(machine.device)
    share = max(1, batch // machine.workers)

    def loss_of(step: int, rng: random.Random) -> Tensor:
        x = _some_pictures(rng, share, whole=step >= 0.8 * steps).to(machine.device)
        posterior = vae.encode(x).latent_dist
        if step < steps // 20:
            wanted = components(x)
            found = F.mse_loss(posterior.mean, wanted) + 0.01 * (posterior.logvar + 4).square().mean()
            return found + _picture_loss(vae.decode(wanted + 0.05 * torch.randn_like(wanted)).sample - x)
        z = posterior.sample()
        z = z + 0.05 * z.detach().std() * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
        kl = posterior.kl().mean() / z[0].numel()
        return _picture_loss(vae.decode(z).sample - x) + 1e-4 * kl

    kernels = [parameter for parameter in vae.parameters() if parameter.ndim == 4]
    fit("vae", machine, vae, loss_of, steps=steps, lr=3e-3, matrices=kernels, averaging=0.99, log=log)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        rng = random.Random("latents")
        pictures = to_tensor([drawing.draw(world.training_scene(rng), i) for i in range(256)])
        z = torch.cat([vae.encode(x.to(machine.device)).latent_dist.sample() for x in pictures.split(32)])
    vae.register_to_config(scaling_factor=round(1 / float(z.std()), 4), shift_factor=round(float(z.mean()), 4))
    return vae
