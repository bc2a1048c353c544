"""A full fine-tuning: the step beside the published one, what is trained, and the LoRA that is made of it."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers.optimization import Adafactor as Published

from lora.flux import adapter, flow, forward
from lora.flux.encode import Example, Text
from lora.training import fit, full, prior
from lora.training.balance import PACE
from lora.training.full import Adafactor, Change
from tests.training import test_fit

SETTINGS = dataclasses.replace(test_fit.SETTINGS, steps=8, batch_size=1, prior_every=2, full=True)
RANK = 4


def _changed(
    transformer: FluxTransformer2DModel,
    examples: list[Example],
    texts: dict[str, Text],
    rank: int = RANK,
    **changes: Any,
) -> tuple[Change, list[fit.StepReport]]:
    """A training of SETTINGS, over; the change is still in the transformer."""
    settings = dataclasses.replace(SETTINGS, **changes)
    priors = prior.draw(transformer, texts, ["a red house", "a VEK"], [(4, 4)] * 2, test_fit.SCHEDULER, seed=1, steps=3)
    parameters = adapter.attach(transformer, rank, seed=3)
    change = Change(transformer, settings.seed)
    return change, list(fit.fit(transformer, parameters, examples, priors, texts, settings, mover=change))


def _velocity(transformer: FluxTransformer2DModel, texts: dict[str, Text]) -> torch.Tensor:
    noisy = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(5))
    text = {key: tensor[None] for key, tensor in texts["a TOK"].items()}
    with torch.no_grad():
        return flow.velocity(transformer, noisy, torch.tensor([0.6]), 1.0, text, (8, 8))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_step_is_that_of_the_published_adafactor_with_a_rate_of_its_own(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.zeros(shape), torch.nn.Parameter(torch.zeros(shape))
    optimizer = Adafactor(ours, generator)
    published = Published([theirs], lr=1e-2, scale_parameter=False, relative_step=False)
    for rate in (1e-2, 1e-2, 3e-3, 1e-2):
        gradient = torch.randn(shape, generator=generator) * rate
        published.param_groups[0]["lr"] = rate
        theirs.grad = gradient.clone()
        published.step()
        norm = optimizer.step(gradient, rate)
        torch.testing.assert_close(norm, gradient.square().sum())
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-8)


def test_small_steps_add_up_in_bf16_which_rounding_to_the_nearest_would_lose() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.full((40, 50), 2e-3, dtype=torch.bfloat16)
    assert torch.equal(weight, (weight.float() + 1e-6).to(torch.bfloat16))
    start, optimizer = weight.float().clone(), Adafactor(weight, generator)
    for _ in range(100):
        optimizer.step(-torch.ones(40, 50), 1e-6)
    torch.testing.assert_close((weight.float() - start).mean().item(), 1e-4, rtol=0.05, atol=0)
    exact = torch.randn(1000, generator=generator).to(torch.bfloat16)
    assert torch.equal(full.rounded(exact.float(), generator), exact), "what bf16 holds is left as it is"


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    weight, generator = torch.zeros(3, 4), torch.Generator()
    optimizer = Adafactor(weight, generator)
    optimizer.step(torch.ones(3, 4), 0.1)
    before = weight.clone()
    assert not optimizer.step(torch.full((3, 4), torch.nan), 0.1).isfinite()
    assert torch.equal(weight, before)
    optimizer.step(torch.ones(3, 4), 0.1)
    assert weight.isfinite().all()
    assert (weight < before).all()


def test_the_layers_move_and_the_rest_and_the_base_stay(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_flux.state_dict().items()}
    change, reports = _changed(tiny_flux, examples, texts)
    assert change.weights.keys() == {*adapter.target_modules(tiny_flux)}
    assert all(weight.any() for weight in change.weights.values())
    assert all(weight.grad is None for weight in change.weights.values()), "let go as soon as the step is made"
    after = {name.replace(".base_layer", ""): t for name, t in tiny_flux.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert reports[-1].prior_loss > 0
    assert not reports[-1].skipped


def test_training_lowers_the_loss(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    _, reports = _changed(tiny_flux, examples, texts, steps=120, prior_ratio=0.0, learning_rate=3e-3)
    losses = [report.loss.item() for report in reports]
    assert sum(losses[-30:]) < 0.9 * sum(losses[:30])


def test_a_step_equals_one_of_the_whole_weights_by_hand(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    """The weights of a copy with gradients of their own, and the published step on each."""
    reference = copy.deepcopy(tiny_flux)
    settings: dict[str, Any] = {"steps": 1, "prior_ratio": 0.0, "caption_dropout_rate": 0.0}
    change, [report] = _changed(tiny_flux, examples[:1], texts, **settings)
    generator = torch.Generator().manual_seed(SETTINGS.seed)
    columns = zip(*fit.rows_of_examples(examples[:1], [examples[0].caption], texts), strict=True)
    loss = fit.picture_loss(
        reference, examples[0].size, generator, SETTINGS, *(torch.stack(column) for column in columns)
    )
    weights = {name: reference.get_submodule(name).weight for name in change.weights}
    gradients = torch.autograd.grad(loss, list(weights.values()))
    torch.testing.assert_close(report.loss, loss.detach())
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        before = weight.detach().clone()
        weight.grad = gradient
        Published([weight], lr=report.learning_rate, scale_parameter=False, relative_step=False).step()
        torch.testing.assert_close(change.weights[name].detach(), weight.detach() - before, rtol=1e-2, atol=2e-7)


def test_the_preservations_weight_follows_the_ratio_of_the_norms(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    _, reports = _changed(tiny_flux, examples, texts, prior_weight=1e-3)
    balance = reports[-1].balance
    assert balance is not None
    assert 0 < balance.preservation < 0.1 * SETTINGS.prior_ratio * balance.pictures
    assert balance.weight.item() == pytest.approx(1e-3 * math.exp(4 * PACE))


@pytest.mark.parametrize("ours", [True, False], ids=["our forward pass", "diffusers'"])
def test_a_lora_of_full_rank_does_what_the_change_does_and_alone(
    ours: bool, tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    base = _velocity(tiny_flux, texts)
    with forward.for_training(tiny_flux):
        change, _ = _changed(tiny_flux, examples, texts, rank=64)
        with torch.no_grad():
            sums = {name: weight.clone() for name, weight in change.weights.items()}

        def seen() -> torch.Tensor:
            if ours:
                return _velocity(tiny_flux, texts)
            with forward.of_diffusers(tiny_flux):
                return _velocity(tiny_flux, texts)

        changed = seen()
        assert (changed - base).norm() > 0.01 * base.norm()
        with change.as_lora(8):
            torch.testing.assert_close(seen(), changed, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(seen(), changed)
        assert all(held.share == pytest.approx(1, abs=1e-5) for held in change.held[8].values())
        change.remove()
        torch.testing.assert_close(seen(), changed, rtol=1e-3, atol=1e-4)
        for name, (a, b) in adapter.pairs_of(tiny_flux).items():
            torch.testing.assert_close(b.float() @ a.float(), sums[name], rtol=0, atol=0.02 * sums[name].abs().max())
        tiny_flux.disable_adapters()
        torch.testing.assert_close(seen(), base, rtol=1e-4, atol=1e-5)


def test_a_training_that_goes_on_ends_with_the_same_change(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    another = copy.deepcopy(tiny_flux)
    priors = prior.draw(tiny_flux, texts, ["a red house"], [(4, 4)], test_fit.SCHEDULER, seed=1, steps=3)
    kept: dict[str, Any] = {}
    changes = []
    for transformer in (tiny_flux, another):
        parameters = adapter.attach(transformer, RANK, seed=3)
        change = Change(transformer, SETTINGS.seed)
        saved = kept or None
        for report in fit.fit(transformer, parameters, examples, priors, texts, SETTINGS, saved=saved, mover=change):
            if report.step == 3:
                with change.as_lora(3):
                    pass
                kept = copy.deepcopy(report.state())
        changes.append(change)
    first, second = changes
    assert second.held == first.held
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name])
