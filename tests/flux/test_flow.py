"""The mathematics, held against diffusers' own pipeline and scheduler."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from lora.flux import encode, flow
from tests.tiny_flux import CONFIG

DEV_SCHEDULER = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 8), (12, 6)])
def test_packing_is_the_pipelines(height: int, width: int) -> None:
    latents = torch.randn(3, 16, height, width)
    packed = flow.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 3, 16, height, width))
    assert torch.equal(flow.unpack(packed, height, width), latents)
    assert torch.equal(
        flow.unpack(packed, height, width), FluxPipeline._unpack_latents(packed, height * 8, width * 8, 8)
    )


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 8), (12, 6)])
def test_position_ids_are_the_pipelines(height: int, width: int) -> None:
    theirs = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    assert torch.equal(flow.image_ids(height, width), theirs)
    assert torch.equal(flow.text_ids(7), torch.zeros(7, 3))


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("tokens", [36, 256, 4096])
@pytest.mark.parametrize("dynamic", [True, False])
def test_drawing_times_are_the_schedulers(steps: int, tokens: int, dynamic: bool) -> None:
    config = {**DEV_SCHEDULER, "use_dynamic_shifting": dynamic}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu if dynamic else None)
    torch.testing.assert_close(flow.sigmas(steps, tokens, config), scheduler.sigmas)


def test_timesteps_are_diffusers_logit_normal() -> None:
    for mean in (0.0, 1.5):
        ours = flow.sample_timesteps(1000, torch.Generator().manual_seed(3), mean)
        theirs = compute_density_for_timestep_sampling(
            "logit_normal", 1000, mean, 1.0, generator=torch.Generator().manual_seed(3)
        )
        torch.testing.assert_close(ours, theirs)
        assert ours.min() > 0
        assert ours.max() < 1


def test_noise_is_added_as_the_scheduler_does_and_the_loss_asks_for_the_way_back() -> None:
    latents, noise = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    timesteps = scheduler.timesteps[[100, 700]]
    noisy = flow.add_noise(latents, noise, timesteps / 1000)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    velocity = noise - latents
    assert flow.flow_loss(velocity, latents, noise) == 0
    # The right velocity leads from anywhere on the way to the picture itself.
    torch.testing.assert_close(noisy - (timesteps / 1000).view(-1, 1, 1) * velocity, latents)
    torch.testing.assert_close(flow.flow_loss(velocity + 0.5, latents, noise), torch.tensor(0.25))


def test_one_euler_step_over_our_times_is_the_schedulers_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**DEV_SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), mu=calculate_shift(36))
    times = flow.sigmas(4, 36, DEV_SCHEDULER)
    x, v = torch.randn(1, 36, 8), torch.randn(1, 36, 8)
    theirs = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(x + (times[1] - times[0]) * v, theirs)


@pytest.mark.parametrize(("mean", "uniform_share"), [(0.0, 0.0), (2.5, 0.0), (2.5, 0.5), (2.5, 1.0)])
def test_the_shares_of_timesteps_are_those_of_the_samples(mean: float, uniform_share: float) -> None:
    times = flow.sample_timesteps(100_000, torch.Generator().manual_seed(1), mean, uniform_share)
    edges = [1.0, 0.95, 0.8, 0.5, 0.2, 0.0]
    shares = [flow.share_of_timesteps(low, high, mean, uniform_share) for high, low in itertools.pairwise(edges)]
    seen = [((low < times) & (times <= high)).float().mean().item() for high, low in itertools.pairwise(edges)]
    assert shares == pytest.approx(seen, abs=0.005)
    assert sum(shares) == pytest.approx(1)


def test_a_transformer_without_a_guidance_input_such_as_schnells_is_asked_without_one(
    texts: dict[str, encode.Text],
) -> None:
    transformer = FluxTransformer2DModel(**{**CONFIG, "guidance_embeds": False}).eval()
    text = encode.stack(texts, ["a TOK"], torch.device("cpu"))
    velocity = flow.velocity(transformer, torch.ones(1, 4, 16), torch.tensor([0.5]), 1.0, text, (4, 4))
    assert velocity.shape == (1, 4, 16)
    assert velocity.isfinite().all()
