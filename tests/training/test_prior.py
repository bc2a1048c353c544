"""What the base draws by itself: the states that are kept, and their sizes."""

import itertools

import torch
from diffusers import FluxTransformer2DModel

from lora.flux import flow
from lora.flux.encode import Example, Text, stack
from lora.training import prior
from lora.training.prompts import Asked


def test_each_step_kept_is_the_bases_own_prediction_where_the_drawing_stood(
    tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    scheduler = {"use_dynamic_shifting": False, "shift": 3.0}
    kept = prior.draw(
        tiny_flux, texts, ["a VEK"] * 3, [(4, 4)] * 3, scheduler, seed=1, guidance=3.5, steps=4, batch_size=2
    )
    assert len(kept) == 3 * 4
    for one, then in itertools.pairwise(sorted({(p.timestep, p.until) for p in kept}, reverse=True)):
        assert one[1] == then[0]
    assert min(p.until for p in kept) == 0
    for p in kept:
        with torch.no_grad():
            text = stack(texts, [p.prompt], p.noisy.device)
            again = flow.velocity(tiny_flux, p.noisy[None], torch.tensor([p.timestep]), 3.5, text, p.size)
        torch.testing.assert_close(again[0], p.velocity, rtol=1e-4, atol=1e-5)
    # From pure noise, and each step on from the last.
    first = [p for p in kept if p.timestep == 1]
    assert len(first) == 3
    times = flow.sigmas(4, 4, scheduler).tolist()
    here, then = kept[0], next(p for p in kept[1:] if p.timestep < 1)
    torch.testing.assert_close(here.noisy + (times[1] - times[0]) * here.velocity, then.noisy)


def test_most_drawings_have_the_smallest_resolution_and_a_few_the_largest_in_the_photographs_shapes() -> None:
    sizes = [(64, 64), (48, 80), (96, 96), (72, 120), (128, 128), (96, 160)]
    shared = prior.shared_out(sizes * 3, 48)
    assert [shared.count(size) for size in sizes] == [16, 16, 6, 6, 2, 2]
    assert prior.shared_out([(12, 12)], 5) == [(12, 12)] * 5
    assert len(prior.shared_out(sizes[:4], 7)) == 7


def test_a_drawing_may_go_by_another_guidance_than_that_of_the_velocities_that_are_kept(
    tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    scheduler = {"use_dynamic_shifting": False, "shift": 3.0}

    def drawn(**guidance: float) -> list[prior.Prior]:
        return prior.draw(tiny_flux, texts, ["a VEK"], [(4, 4)], scheduler, seed=1, steps=3, **guidance)

    plain, other, all_other = drawn(), drawn(drawing_guidance=3.5), drawn(guidance=3.5)
    torch.testing.assert_close(other[0].velocity, plain[0].velocity)
    torch.testing.assert_close(other[1].noisy, all_other[1].noisy)
    assert not torch.equal(other[1].noisy, plain[1].noisy)
    assert not torch.equal(other[1].velocity, all_other[1].velocity)


def test_the_users_pictures_with_noise_are_states_at_every_part_of_the_timesteps(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    asked = [Asked("a VEK", "a TOK"), Asked("a red house", "a TOK on a table")]
    kept = prior.noised(tiny_flux, texts, asked, examples, seed=1)
    assert len(kept) == 2 * prior.STATES
    assert {p.size for p in kept if p.prompt == "a VEK"} == {(4, 4)}
    assert sorted(p.until for p in kept if p.prompt == "a VEK") == [0, 0.25, 0.5, 0.75]
    for p in kept:
        assert p.until <= p.timestep <= p.since
        with torch.no_grad():
            text = stack(texts, [p.prompt], p.noisy.device)
            again = flow.velocity(tiny_flux, p.noisy[None], torch.tensor([p.timestep]), 1.0, text, p.size)
        torch.testing.assert_close(again[0], p.velocity, rtol=1e-4, atol=1e-5)
    pictures = [example.mean for example in examples if example.caption == "a TOK"]
    least = min(kept, key=lambda p: (p.prompt != "a VEK", p.timestep))
    noise = (least.noisy - (1 - least.timestep) * pictures[0]) / least.timestep
    other = (least.noisy - (1 - least.timestep) * pictures[1]) / least.timestep
    assert min(abs(noise.std() - 1), abs(other.std() - 1)) < 0.35


def test_pictures_of_several_shapes_that_share_a_caption_are_taken_at_every_resolution(
    tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    """As those have that came without captions and get a template; the shapes' areas differ a little."""
    shapes = [[(4, 4), (6, 6), (8, 8)], [(2, 8), (4, 8), (6, 10)], [(8, 2), (4, 10), (4, 16)]]
    examples = [
        Example(
            name=f"{number}.jpg at {high}x{wide}",
            size=(high, wide),
            mean=torch.zeros(high * wide // 4, 16),
            std=torch.zeros(high * wide // 4, 16),
            caption="a TOK",
        )
        for number, sizes in enumerate(shapes)
        for high, wide in sizes
    ]
    asked = [Asked("a VEK", "a TOK")] * len(prior.RESOLUTIONS)
    kept = prior.noised(tiny_flux, texts, asked, examples, seed=1)
    areas = [p.size[0] * p.size[1] for p in kept]
    many = [sum(least <= area <= most for area in areas) for least, most in ((16, 16), (32, 40), (60, 64))]
    assert many == [prior.STATES * prior.RESOLUTIONS.count(number) for number in range(3)]
