"""The loop: what one step computes, what a run repeats, and what the settings do."""

import copy
import dataclasses
import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from lora.flux import adapter, flow
from lora.flux.encode import Example, Text
from lora.training import fit, prior, recipe
from lora.training.fit import Settings
from lora.training.prior import Prior

SETTINGS = Settings(
    steps=6,
    batch_size=2,
    learning_rate=1e-3,
    caption_dropout_rate=0.2,
    prior_ratio=0.5,
    seed=7,
    prior_every=1,
)
SCHEDULER = {"use_dynamic_shifting": False, "shift": 3.0}


def _priors(transformer: FluxTransformer2DModel, texts: dict[str, Text]) -> list[Prior]:
    return prior.draw(transformer, texts, ["a red house", "a VEK"], [(4, 4)] * 2, SCHEDULER, seed=1, steps=3)


def _prior_loss(transformer: FluxTransformer2DModel, priors: list[Prior], texts: dict[str, Text]) -> torch.Tensor:
    columns = zip(*fit.rows_of_priors(priors, texts), strict=True)
    return fit.prior_loss(transformer, priors[0].size, 1.0, *(torch.stack(column) for column in columns))


def _train(
    transformer: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text], settings: Settings
) -> tuple[dict[str, torch.Tensor], list[fit.StepReport]]:
    priors = _priors(transformer, texts)
    parameters = adapter.attach(transformer, 4, seed=3)
    reports = list(fit.fit(transformer, parameters, examples, priors, texts, settings))
    return adapter.state_dict(transformer), reports


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"uniform_share": 0.5},
        {"uniform_share": 1.0},
        {"timestep_mean": 1.5},
        {"guidance": 3.5},
        {"weight_decay": 10.0},
        {"adam_epsilon": 1.0},
    ],
    ids=str,
)
def test_a_step_equals_one_written_by_hand(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text], changes: dict[str, Any]
) -> None:
    """diffusers' transformer called as its pipeline calls it, torch's AdamW, and the paper's loss in three lines."""
    settings = Settings(
        steps=1, batch_size=1, learning_rate=1e-3, caption_dropout_rate=0.0, prior_ratio=0.0, seed=7, **changes
    )
    reference = copy.deepcopy(tiny_flux)
    parameters = adapter.attach(tiny_flux, 4, seed=3)
    report = next(fit.fit(tiny_flux, parameters, examples[:1], [], texts, settings))

    example, generator = examples[0], torch.Generator().manual_seed(7)
    theirs = adapter.attach(reference, 4, seed=3)
    optimizer = torch.optim.AdamW(
        theirs, lr=1e-3, weight_decay=changes.get("weight_decay", 1e-4), eps=changes.get("adam_epsilon", 1e-8)
    )
    latents = example.mean[None] + example.std[None] * torch.randn(1, 3, 16, generator=generator)
    noise = torch.randn(1, 3, 16, generator=generator)
    t = torch.sigmoid(torch.randn(1, generator=generator) + changes.get("timestep_mean", 0.0))
    if "uniform_share" in changes:
        anywhere, chance = torch.rand(2, generator=generator)
        t = anywhere[None] if chance < changes["uniform_share"] else t
    predicted = reference(
        hidden_states=(1 - t) * latents + t * noise,
        timestep=t,
        guidance=torch.tensor([changes.get("guidance", 1.0)]),
        encoder_hidden_states=texts[example.caption]["prompt_embeds"][None],
        pooled_projections=texts[example.caption]["pooled"][None],
        txt_ids=torch.zeros(5, 3),
        img_ids=torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 0, 2]]),
    ).sample
    loss = ((predicted - (noise - latents)) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    optimizer.step()

    torch.testing.assert_close(report.loss, loss.detach())
    for ours, wanted in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_weights_of_tokens_weigh_their_errors_and_weights_of_one_change_nothing(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    settings = dataclasses.replace(SETTINGS, steps=1, batch_size=1, caption_dropout_rate=0.0, prior_ratio=0.0)
    wanted = torch.tensor([2.0, 0.7, 0.3])

    def loss(weights: torch.Tensor | None) -> torch.Tensor:
        transformer = copy.deepcopy(tiny_flux)
        parameters = adapter.attach(transformer, 4, seed=3)
        example = dataclasses.replace(examples[0], weights=weights)
        return next(fit.fit(transformer, parameters, [example], [], texts, settings)).loss

    example, generator = examples[0], torch.Generator().manual_seed(7)
    latents = example.mean[None] + example.std[None] * torch.randn(1, 3, 16, generator=generator)
    noise = torch.randn(1, 3, 16, generator=generator)
    t = torch.sigmoid(torch.randn(1, generator=generator))
    text = {name: tensor[None] for name, tensor in texts[example.caption].items()}
    predicted = flow.velocity(tiny_flux, (1 - t) * latents + t * noise, t, 1.0, text, (2, 6))
    errors = ((predicted - (noise - latents)) ** 2)[0].mean(1)
    torch.testing.assert_close(loss(wanted), (2.0 * errors[0] + 0.7 * errors[1] + 0.3 * errors[2]).detach() / 3)
    torch.testing.assert_close(loss(torch.ones(3)), loss(None))


class _Waiting(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU: reading a value, or making a tensor of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora_type", ["subject", "style"])
def test_a_step_reads_nothing_back_from_the_device(
    lora_type: str, tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    settings = Settings(**{**vars(SETTINGS), "uniform_share": recipe.TOY[lora_type].uniform_share})
    priors = _priors(tiny_flux, texts)
    parameters = adapter.attach(tiny_flux, 4, seed=3)
    steps = fit.fit(tiny_flux, parameters, examples, priors, texts, settings)
    next(steps)
    with _Waiting() as waiting:
        report = next(steps)
        taken = dict(waiting.seen)
        report.loss.item()
        torch.tensor([report.learning_rate])
    assert taken["addmm_"] > 0
    # The times of the base's drawings are the only numbers that come from the CPU, and go without waiting.
    assert (taken.get("_local_scalar_dense", 0), taken.get("lift_fresh", 0)) == (0, 1)
    assert (waiting.seen["_local_scalar_dense"], waiting.seen["lift_fresh"]) == (1, 2)


def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    once, _ = _train(copy.deepcopy(tiny_flux), examples, texts, SETTINGS)
    again, _ = _train(copy.deepcopy(tiny_flux), examples, texts, SETTINGS)
    other, _ = _train(copy.deepcopy(tiny_flux), examples, texts, Settings(**{**vars(SETTINGS), "seed": 8}))
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(not torch.equal(once[name], other[name]) for name in once)


def test_training_lowers_the_loss_and_leaves_the_base_alone(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    before = {name: weight.clone() for name, weight in tiny_flux.named_parameters()}
    settings = Settings(**{**vars(SETTINGS), "steps": 120, "learning_rate": 1e-2, "prior_ratio": 0.0})
    _, reports = _train(tiny_flux, examples, texts, settings)
    losses = [report.loss.item() for report in reports]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    after = dict(tiny_flux.named_parameters())
    assert all(
        torch.equal(
            weight,
            after.get(
                name, after.get(name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))
            ),
        )
        for name, weight in before.items()
    )


def test_the_prior_holds_the_model_to_the_base(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    def drift(ratio: float) -> float:
        transformer = copy.deepcopy(tiny_flux)
        priors = _priors(transformer, texts)
        settings = Settings(
            **{**vars(SETTINGS), "steps": 80, "learning_rate": 1e-2, "batch_size": 1, "prior_ratio": ratio}
        )
        parameters = adapter.attach(transformer, 4, seed=3)
        for _ in fit.fit(transformer, parameters, examples, priors, texts, settings):
            pass
        return _prior_loss(transformer, [p for p in priors if p.timestep == 1], texts).item()

    assert drift(5.0) < 0.5 * drift(0.0)


def test_the_prior_is_looked_at_every_so_many_steps(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    passes = []
    tiny_flux.register_forward_hook(lambda module, inputs, output: passes.append(None))
    _, reports = _train(tiny_flux, examples, texts, dataclasses.replace(SETTINGS, prior_every=3))
    assert len(passes) == 3 + 6 + 2  # the base's drawings, the steps, and of these every third
    shown = [at.prior_loss.item() for at in reports]
    assert shown[:2] == [0, 0]
    assert shown[2:5] == [shown[2]] * 3
    assert 0 < shown[2] != shown[5] > 0


def test_the_prior_is_looked_at_where_the_pictures_are(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    """The more noise the pictures are trained with, the more often the first steps of the base's drawings come."""

    def noisiest(mean: float) -> float:
        transformer, times = copy.deepcopy(tiny_flux), list[float]()
        transformer.register_forward_pre_hook(
            lambda module, inputs, named: times.extend(named["timestep"].tolist()), with_kwargs=True
        )
        settings = dataclasses.replace(SETTINGS, steps=60, timestep_mean=mean)
        _train(transformer, examples, texts, settings)
        drawn = sorted({prior.timestep for prior in _priors(tiny_flux, texts)})
        looked_at = [t for t in times[len(drawn) * 2 :] if any(t == pytest.approx(known) for known in drawn)]
        return sum(t == pytest.approx(1.0) for t in looked_at) / len(looked_at)

    assert noisiest(2.5) > 0.3 > 0.2 > noisiest(0.0)  # .45 and .09 by the formula


def test_an_untrained_adapter_keeps_every_prior(tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]) -> None:
    priors = _priors(tiny_flux, texts)
    assert len(priors) == 2 * 3
    adapter.attach(tiny_flux, 4, seed=3)
    torch.testing.assert_close(_prior_loss(tiny_flux, priors, texts), torch.tensor(0.0), atol=1e-8, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_example_comes_equally_often_in_full_batches_of_one_size(
    examples: list[Example], batch_size: int
) -> None:
    """However few there are of its size: one in a batch of its own would weigh as much as all of another."""
    source, seen = fit.batches(examples, batch_size, random.Random(0)), Counter[str]()
    for _ in range(60 // batch_size):
        batch = next(source)
        assert len({example.size for example in batch}) == 1
        assert len(batch) == batch_size
        seen.update(example.name for example in batch)
    assert max(seen.values()) - min(seen.values()) <= batch_size, seen
    if batch_size == 1:
        assert set(seen.values()) == {12}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_largest_size_comes_half_as_often_and_every_picture_of_it_as_often_as_any_other(batch_size: int) -> None:
    """512, 768 and 1024 as 2 : 2 : 1; five pictures, which no half is a whole number of."""
    examples = [
        Example(name=f"{i} at {side}", size=(side, side), mean=torch.zeros(tokens, 1), std=torch.zeros(0), caption="")
        for i in range(5)
        for side, tokens in ((64, 1024), (96, 2304), (128, 4096))
    ]
    source, seen = fit.batches(examples, batch_size, random.Random(0), half_above=3072), Counter[str]()
    for _ in range(500 // batch_size):
        seen.update(example.name for example in next(source))
    for name, times in seen.items():
        assert times == pytest.approx(20 if name.endswith("128") else 40, abs=2), seen


def test_the_sizes_of_a_round_are_mixed() -> None:
    nothing = torch.zeros(1)
    examples = [
        Example(name=str(i), size=(4, 4) if i < 8 else (2, 6), mean=nothing, std=nothing, caption="") for i in range(16)
    ]
    sizes = [batch[0].size for batch in itertools.islice(fit.batches(examples, 1, random.Random(0)), 16)]
    assert sum(one != other for one, other in itertools.pairwise(sizes)) > 2


def test_a_step_that_looks_at_preservation_adds_its_weighted_gradient(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    """By hand: with an epsilon that hides Adam's own scaling, the step is the sum of both gradients."""
    priors, generator = _priors(tiny_flux, texts), torch.Generator().manual_seed(9)
    parameters = adapter.attach(tiny_flux, 4, seed=3)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    before = [parameter.detach().clone() for parameter in parameters]
    plain = dataclasses.replace(
        SETTINGS, steps=1, batch_size=1, caption_dropout_rate=0.0, adam_epsilon=1e9, weight_decay=0.0, learning_rate=1e9
    )

    def moved(**changes: Any) -> torch.Tensor:
        for parameter, start in zip(parameters, before, strict=True):
            parameter.data.copy_(start)
        list(fit.fit(tiny_flux, parameters, examples, priors, texts, dataclasses.replace(plain, **changes)))
        return torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])

    light, double = moved(prior_ratio=0.5, prior_weight=1e-3), moved(prior_ratio=0.5, prior_weight=2e-3)
    nothing = moved(prior_ratio=0.0)
    assert (light - nothing).norm() > 0
    torch.testing.assert_close(double - nothing, 2 * (light - nothing), rtol=0.1, atol=1e-5)


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    broken = dataclasses.replace(examples[0], name="broken", mean=torch.full_like(examples[0].mean, float("nan")))
    settings = dataclasses.replace(SETTINGS, steps=8, batch_size=1, prior_ratio=0.0, caption_dropout_rate=0.0)
    parameters = adapter.attach(tiny_flux, 4, seed=3)
    last, changed = [p.detach().clone() for p in parameters], []
    for at in fit.fit(tiny_flux, parameters, [examples[0], broken], [], texts, settings):
        changed.append(any(not torch.equal(p, old) for p, old in zip(parameters, last, strict=True)))
        assert changed[-1] == bool(at.loss.isfinite()) == (at.in_a_row == 0)
        last = [p.detach().clone() for p in parameters]
    assert at.skipped == changed.count(False) == 4
    assert all(p.isfinite().all() for p in parameters)


def test_priors_of_a_batch_have_one_size() -> None:
    nothing = torch.zeros(1)
    priors = [
        Prior(
            prompt="", size=(4, 4) if i % 3 else (2, 6), noisy=nothing, timestep=1, since=1, until=0, velocity=nothing
        )
        for i in range(9)
    ]
    rng, seen = random.Random(0), Counter[tuple[int, int]]()
    for _ in range(60):
        batch = fit.of_one_size(priors, [1.0] * 9, 3, rng)
        assert len({prior.size for prior in batch}) == 1
        seen[batch[0].size] += 1
    assert set(seen) == {(4, 4), (2, 6)}


def test_a_gradient_is_cut_to_a_norm_of_one(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    """With an epsilon that hides Adam's own scaling no step is longer than the gradient."""
    tiny_flux.proj_out.weight.data *= 100
    settings = dataclasses.replace(
        SETTINGS, steps=1, prior_ratio=0.0, learning_rate=1.0, adam_epsilon=1.0, weight_decay=0.0
    )
    parameters = adapter.attach(tiny_flux, 4, seed=3)
    before = [parameter.detach().clone() for parameter in parameters]
    list(fit.fit(tiny_flux, parameters, examples, [], texts, settings))
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)]).norm()
    assert 0.1 < moved <= 1


def test_caption_dropout_shows_the_empty_caption_and_no_other(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    """With every caption dropped, the captions' own embeddings can be anything."""
    always = Settings(**{**vars(SETTINGS), "caption_dropout_rate": 1.0, "prior_ratio": 0.0})
    other = {prompt: text if prompt == "" else {k: v + 1 for k, v in text.items()} for prompt, text in texts.items()}
    once, _ = _train(copy.deepcopy(tiny_flux), examples, texts, always)
    again, _ = _train(copy.deepcopy(tiny_flux), examples, other, always)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_training_that_no_gradient_reaches_says_so_at_once(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    torch.nn.init.zeros_(tiny_flux.proj_out.weight)
    parameters = adapter.attach(tiny_flux, 4, seed=3)
    with pytest.raises(RuntimeError, match="no gradient reaches the LoRA"):
        next(fit.fit(tiny_flux, parameters, examples, [], texts, SETTINGS))


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [fit.learning_rate_at(step, 1000, 1.0, 0.0) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[19] == pytest.approx(1.0)
    assert all(later < sooner for sooner, later in itertools.pairwise(rates[19:]))
    assert rates[-1] == pytest.approx(0.1)
    assert fit.learning_rate_at(1, 1, 1.0, 0.0) == fit.learning_rate_at(1, 1, 1.0, 0.5) == 1.0


def test_a_rate_that_is_held_for_half_stays_at_its_peak_until_then_and_ends_where_the_other_does() -> None:
    rates = [fit.learning_rate_at(step, 1000, 1.0, 0.5) for step in range(1, 1001)]
    assert rates[:19] == [fit.learning_rate_at(step, 1000, 1.0, 0.0) for step in range(1, 20)]
    assert set(rates[19:510]) == {1.0}
    assert all(later < sooner for sooner, later in itertools.pairwise(rates[509:]))
    assert rates[754] == pytest.approx(0.55, abs=0.01)
    assert rates[-1] == pytest.approx(0.1)


def test_a_constant_rate_is_the_peak_at_every_step(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    _, falling = _train(copy.deepcopy(tiny_flux), examples, texts, SETTINGS)
    _, constant = _train(tiny_flux, examples, texts, dataclasses.replace(SETTINGS, held=1.0))
    assert [report.learning_rate for report in constant] == [1e-3] * 6
    assert falling[-1].learning_rate == pytest.approx(1e-4)


def test_the_running_mean_takes_the_weights_place_at_the_end_and_changes_nothing_before(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    """Beside a mean over the weights of a run without one, as ai-toolkit's `ema.py` keeps it."""

    def weights_after_each_step(settings: Settings) -> list[list[torch.Tensor]]:
        transformer = copy.deepcopy(tiny_flux)
        parameters = adapter.attach(transformer, 4, seed=3)
        after = [[p.detach().clone() for p in parameters]]
        for _ in fit.fit(transformer, parameters, examples, [], texts, settings):
            after.append([p.detach().clone() for p in parameters])
        return after

    plain = weights_after_each_step(SETTINGS)
    averaged = weights_after_each_step(dataclasses.replace(SETTINGS, ema_decay=0.8))
    mean = plain[0]
    for weights in plain[1:]:
        mean = [0.8 * m + 0.2 * w for m, w in zip(mean, weights, strict=True)]
    for before, same in zip(plain[:-1], averaged[:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, same, strict=True))
    for ours, wanted in zip(averaged[-1], mean, strict=True):
        torch.testing.assert_close(ours, wanted)
