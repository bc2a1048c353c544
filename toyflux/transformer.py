"""The toy base's transformer: its pool of encoded pictures, flow matching, and the meaning of its guidance."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.multiprocessing
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from toyflux import drawing, world
from toyflux.autoencoder import to_tensor
from toyflux.stage import Machine, fit
from toyflux.text import TEXT_TOKENS, Text


def new_transformer() -> FluxTransformer2DModel:
    """FLUX's double and single blocks, tiny, initialised as DiT (arXiv 2212.09748): blocks begin as the identity."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.startswith("time_text_embed"):
                nn.init.normal_(module.weight, std=0.02)
            if (
                name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
                or name == "proj_out"
            ):
                nn.init.zeros_(module.weight)
    return transformer


Pool: TypeAlias = Mapping[tuple[int, int], tuple[Tensor, list[world.Scene]]]
"""Pictures of the world, encoded once. By size: packed latents (n, tokens, 64) in half precision, the scenes shown."""

NATIVE_SHARE = 0.75
"""Share of batches, and of the pool, that are square; the rest has other proportions."""


def pool_scene(rng: random.Random, company: bool) -> world.Scene:
    """A scene of the training's kinds, those more often that take longest to learn: one in six shows two things (in
    the world one in ten does), and plain things are shown more often than striped and dotted ones. In `company`, one in
    four shows a creature beside a thing, and nearly half a style, two in five of these in outlines."""

    def weight(scene: world.Scene) -> float:
        look = scene.items[0].look
        if len(scene.items) == 2:
            creatures = sum(isinstance(item.look, world.Creature) for item in scene.items)
            return 16.0 if company and creatures == 1 else 2.0
        if scene.style is not None:
            return {"flat": 3.5, "hatched": 8.0, "outline": 16.0}[scene.style.ink] if company else 0.75
        if isinstance(look, world.Creature):
            return 1.3 if company else 1.0
        return 1.7 if look.fill == "plain" else 1.0

    heaviest = 16.0 if company else 2.0
    while True:
        scene = world.training_scene(rng)
        if rng.random() * heaviest < weight(scene):
            return scene


def render_pool(machine: Machine, vae: AutoencoderKL, count: int, log: Callable[[str], None], company: bool) -> Pool:
    """This worker's share of `count` pictures of `pool_scene`, from the work folder where they lie there."""
    name = "company" if company else "pool"
    path = machine.work / f"{name}.{machine.rank}of{machine.workers}.pt"
    if path.exists():
        done: Pool = torch.load(path, weights_only=False)
        return done
    rng = random.Random(f"{name} {machine.rank}")
    scenes: dict[tuple[int, int], list[world.Scene]] = {}
    for _ in range(count // machine.workers):
        size = world.NATIVE if rng.random() < NATIVE_SHARE else rng.choice(world.SIZES)
        scenes.setdefault(size, []).append(pool_scene(rng, company))
    pool = {}
    for size, shown in scenes.items():
        packed = []
        for start in range(0, len(shown), 32):
            pictures = [drawing.draw(scene, rng.getrandbits(32), size) for scene in shown[start : start + 32]]
            with torch.no_grad():
                z = vae.encode(to_tensor(pictures).to(machine.device)).latent_dist.sample()
            z = (z - vae.config.shift_factor) * vae.config.scaling_factor
            packed.append(FluxPipeline._pack_latents(z, *z.shape).half().cpu())
            if machine.rank == 0 and start % 1024 == 0:
                log(f"{name} {size} {start}/{len(shown)}")
        pool[size] = (torch.cat(packed), shown)
    torch.save(pool, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    return pool


def train_transformer(
    name: str,
    machine: Machine,
    transformer: FluxTransformer2DModel,
    text: Text,
    pool: Pool,
    *,
    steps: int,
    batch: int,
    lr: float,
    log: Callable[[str], None],
) -> None:
    """Flow matching: predict noise - latents at sigma from a logit-normal (mean 1.2) mixed with a uniform.

    High noise is where the text alone decides: that is what takes long to learn. The uniform part is for detail.
    """
    transformer.train().requires_grad_(True)
    share = max(1, batch // machine.workers)

    def loss_of(step: int, rng: random.Random) -> Tensor:
        z, captions, size = sample_batch(pool, share, step, rng)
        z = z.to(machine.device)
        captions = ["" if rng.random() < 0.08 else c for c in captions]
        sigma, noise = sample_sigmas(len(z)).to(z), torch.randn_like(z)
        with torch.no_grad():
            pooled, tokens = text.encode(captions, TEXT_TOKENS if step % 8 == 0 else None)
        mixed = z.lerp(noise, sigma[:, None, None])
        v = velocity(transformer, mixed, sigma, 1 + 5 * torch.rand(len(z)).to(z), pooled, tokens, size)
        return F.mse_loss(v, noise - z)

    matrices = [p for n, p in transformer.named_parameters() if p.ndim == 2 and "blocks" in n and "norm" not in n]
    fit(name, machine, transformer, loss_of, steps=steps, lr=lr, matrices=matrices, hold=0.3, log=log)
    transformer.eval().requires_grad_(False)


def sample_batch(pool: Pool, count: int, step: int, rng: random.Random) -> tuple[Tensor, list[str], tuple[int, int]]:
    """Latents of one size (the same for all workers in a step) and captions in somebody's words."""
    draw = random.Random(f"size {step}")
    size = world.NATIVE if draw.random() < NATIVE_SHARE else draw.choice(world.SIZES)
    latents, scenes = pool[size]
    picked = [rng.randrange(len(scenes)) for _ in range(count)]
    return latents[picked].float(), [world.paraphrase(scenes[i], rng) for i in picked], size


def sample_sigmas(count: int) -> Tensor:
    """Noise levels in (0, 1): three in five logit-normal (arXiv 2403.03206), the rest uniform."""
    return torch.where(torch.rand(count) < 0.4, torch.rand(count), torch.sigmoid(torch.randn(count) + 1.2)).clamp(
        1e-3, 1
    )


def velocity(
    transformer: FluxTransformer2DModel,
    x: Tensor,
    sigma: Tensor,
    guidance: Tensor,
    pooled: Tensor,
    tokens: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """The model's prediction for packed latents x (n, tokens, 64) of `size` at noise levels sigma (n,)."""
    image_ids = FluxPipeline._prepare_latent_image_ids(1, size[1] // 16, size[0] // 16, x.device, x.dtype)
    text_ids = torch.zeros(tokens.shape[1], 3, device=x.device)
    return transformer(
        hidden_states=x,
        timestep=sigma,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]


def distil_guidance(
    machine: Machine,
    text: Text,
    teacher: FluxTransformer2DModel,
    pool: Pool,
    steps: int,
    batch: int,
    log: Callable[[str], None],
) -> FluxTransformer2DModel:
    """Give the guidance input its meaning (arXiv 2210.03142): g means classifier-free guidance of 1 + .55 (g - 1)."""
    torch.manual_seed(3)
    student = new_transformer().to(machine.device)
    student.load_state_dict(teacher.state_dict())
    share = max(1, batch // machine.workers)
    nothing = {length: text.encode([""], length) for length in range(8, TEXT_TOKENS + 1, 8)}

    def loss_of(step: int, rng: random.Random) -> Tensor:
        z, captions, size = sample_batch(pool, share, step, rng)
        z = z.to(machine.device)
        sigma, noise = sample_sigmas(len(z)).to(z), torch.randn_like(z)
        guidance = torch.where(torch.rand(len(z)) < 0.25, torch.ones(len(z)), 1 + 5 * torch.rand(len(z))).to(z)
        mixed = z.lerp(noise, sigma[:, None, None])
        with torch.no_grad():
            pooled, tokens = text.encode(captions, TEXT_TOKENS if step % 8 == 0 else None)
            no_pooled, no_tokens = (part.expand(len(z), *part.shape[1:]) for part in nothing[tokens.shape[1]])
            told = velocity(teacher, mixed, sigma, guidance, pooled, tokens, size)
            untold = velocity(teacher, mixed, sigma, guidance, no_pooled, no_tokens, size)
            target = untold.lerp(told, (1 + 0.55 * (guidance - 1))[:, None, None])
        return F.mse_loss(velocity(student, mixed, sigma, guidance, pooled, tokens, size), target)

    fit("distil", machine, student, loss_of, steps=steps, lr=4e-4, log=log)
    return student.eval().requires_grad_(False)
