"""The loss on fixed noise: the same whenever it is asked, without a trace in the training; and the turn."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lora.flux import adapter
from lora.flux.encode import Example, Text
from lora.training import fit, validation
from lora.training.fit import Settings

SETTINGS = Settings(steps=4, batch_size=1, learning_rate=1e-3, caption_dropout_rate=0.2, prior_ratio=0.0, seed=7)


def _weights(transformer: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text], look: bool) -> bytes:
    transformer = copy.deepcopy(transformer)
    parameters = adapter.attach(transformer, 4, seed=3)
    for _ in fit.fit(transformer, parameters, examples, [], texts, SETTINGS):
        if look:
            validation.loss(transformer, examples, texts, seed=1)
    return b"".join(parameter.detach().numpy().tobytes() for parameter in parameters)


def test_it_is_the_same_at_every_look_and_another_for_other_weights(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    before = validation.loss(tiny_flux, examples, texts, seed=1)
    assert validation.loss(tiny_flux, examples, texts, seed=1) == before
    assert validation.loss(tiny_flux, examples, texts, seed=2) != before
    with torch.no_grad():
        tiny_flux.proj_out.weight *= 1.1
    assert validation.loss(tiny_flux, examples, texts, seed=1) != before


def test_it_is_the_mean_over_timesteps_spread_evenly(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model predicts nothing, the loss is that of noise - latents."""
    with torch.no_grad():
        tiny_flux.proj_out.weight.zero_()
        tiny_flux.proj_out.bias.zero_()
    seen = []
    velocity = validation.flow.velocity
    monkeypatch.setattr(
        validation.flow, "velocity", lambda *given: (seen.extend(given[2].tolist()), velocity(*given))[1]
    )
    generator = torch.Generator().manual_seed(1)
    expected = [
        (torch.randn(example.mean.shape, generator=generator) - example.mean).square().mean()
        for example in (examples[i % 5] for i in range(validation.LOOKS))
    ]
    assert validation.loss(tiny_flux, examples, texts, seed=1) == pytest.approx(sum(expected).item() / 8, rel=1e-5)
    assert sorted(seen) == [pytest.approx((i + 0.5) / 8) for i in range(8)]


def test_looking_changes_nothing_of_the_training(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    assert _weights(tiny_flux, examples, texts, look=True) == _weights(tiny_flux, examples, texts, look=False)


def test_a_check_looks_at_the_smallest_size(examples: list[Example]) -> None:
    assert {len(example.mean) for example in validation.smallest(examples)} == {3}
    assert len(validation.smallest(examples * 5)) <= 4


def test_a_picture_is_held_out_of_eight_and_none_of_fewer() -> None:
    names = [f"{i}.png" for i in range(8)]
    assert validation.hold_out(names, 3) in names
    assert validation.hold_out(names, 3) == validation.hold_out(names[::-1], 3)
    assert len({validation.hold_out(names, seed) for seed in range(40)}) > 1
    assert validation.hold_out(names[:7], 3) is None


def test_an_example_is_known_by_its_photo_at_any_size(examples: list[Example]) -> None:
    [one, other] = [
        Example(name=name, size=(4, 4), mean=examples[1].mean, std=examples[1].std, caption="")
        for name in ("me at home.png at 512x512", "me.png at 96x96")
    ]
    assert validation.is_of("me at home.png", one)
    assert not validation.is_of("me", one)
    assert validation.is_of("me.png", other)
    assert not validation.is_of(None, other)


def test_the_turn_has_come_after_three_checks_above_the_lowest_and_its_weights_come_back() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    turn = validation.Turn([weight])
    losses = [0.5, 0.4, 0.45, 0.3, 0.31, 0.3, 0.35]
    came = []
    for step, loss in enumerate(losses, 1):
        with torch.no_grad():
            weight.fill_(step)
        came.append(turn.has_come(step, loss))
    assert came == [False] * 6 + [True]
    assert turn.step == 4
    turn.go_back()
    assert weight.tolist() == [4.0, 4.0]


def test_a_loss_that_is_no_number_is_no_turn() -> None:
    turn = validation.Turn([torch.nn.Parameter(torch.zeros(2))])
    assert not any(turn.has_come(step, float("nan")) for step in range(1, 9))
    assert turn.step == 0
