"""Passes, run or recorded: the same training."""

import copy
import dataclasses
import gc

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lora.flux import adapter, forward
from lora.flux.encode import Example, Text
from lora.training import fit, graphs, prior
from lora.training.graphs import Passes
from tests.training.test_fit import SCHEDULER, SETTINGS


def test_gradients_are_added_up_until_they_are_zeroed() -> None:
    weight = torch.ones(3, requires_grad=True)
    passes = Passes([weight], torch.Generator())
    rows = [[torch.arange(3.0), torch.tensor(2.0)], [torch.arange(3.0, 6.0), torch.tensor(4.0)]]

    def loss(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        assert (x.shape, factor.shape) == ((2, 3), (2,))
        return (weight * x * factor[:, None]).sum()

    shown = passes("any", loss, rows)
    assert (shown.item(), shown.requires_grad) == (54.0, False)
    [once] = [gradient.clone() for gradient in passes.gradients]
    assert once.tolist() == [12.0, 18.0, 24.0]
    passes("any", loss, rows)
    assert torch.equal(passes.gradients[0], 2 * once)
    passes.zero()
    assert not passes.gradients[0].any()
    assert weight.grad is None


def test_an_error_of_a_recording_says_what_it_is() -> None:
    weight = torch.ones(3, requires_grad=True)
    passes = Passes([weight], torch.Generator())

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(graphs.CannotRecord, match="RuntimeError: operation not permitted"):
        passes.record([("any", fails, [[torch.ones(3)]])])

    def fills(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        passes.record([("any", fills, [[torch.ones(3)]])])

    def breaks_off(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(graphs.NoRoomToRecord, match="due to a previous error"):
        passes.record([("any", breaks_off, [[torch.ones(3)]])])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's own: CUDA graphs")
def test_after_a_recording_that_broke_off_its_memory_is_given_back_and_another_succeeds() -> None:
    device = torch.device("cuda", 0)
    weight = torch.ones(3, device=device, requires_grad=True)
    passes = Passes([weight], torch.Generator(device))
    rows = [[torch.arange(3.0)]]

    def waits(x: torch.Tensor) -> torch.Tensor:
        large = torch.ones(2**26, device=device)  # 256 MiB
        loss = (weight * x).sum() * large[0]
        if torch.cuda.is_current_stream_capturing():
            loss.item()
        return loss

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    try:
        passes.record([("any", waits, rows)])
        pytest.fail("nothing may wait in a recording")
    except graphs.CannotRecord:
        pass
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) < before + 2**26
    passes.zero()
    passes.record([("any", lambda x: (weight * x).sum(), rows)])
    assert passes("any", waits, rows).item() == 3.0
    assert passes.gradients[0].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's own: CUDA graphs")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch_size", "masked"), [(1, False), (2, False), (1, True), (2, True)])
def test_recorded_steps_train_as_those_that_run(
    checkpointing: bool,
    batch_size: int,
    masked: bool,
    tiny_flux: FluxTransformer2DModel,
    examples: list[Example],
    texts: dict[str, Text],
) -> None:
    device = torch.device("cuda")
    if masked:
        examples = [dataclasses.replace(one, weights=torch.rand(len(one.mean))) for one in examples]
    settings = dataclasses.replace(SETTINGS, steps=12, batch_size=batch_size, prior_every=2, uniform_share=0.25)
    tiny_flux.requires_grad_(False).to(device)
    if checkpointing:
        tiny_flux.enable_gradient_checkpointing()
    priors = prior.draw(tiny_flux, texts, ["a red house", "a VEK"], [(4, 4)] * 2, SCHEDULER, seed=1, steps=3)

    def train(record: bool) -> tuple[list[torch.Tensor], list[float]]:
        transformer = copy.deepcopy(tiny_flux)
        parameters = adapter.attach(transformer, 4, seed=3)
        with forward.for_training(transformer):
            reports = list(fit.fit(transformer, parameters, examples, priors, texts, settings, record))
        losses = [value for report in reports for value in (report.loss.item(), report.prior_loss.item())]
        return [parameter.detach() for parameter in parameters], losses

    (ran, shown), (recorded, shown_again) = train(False), train(True)
    assert shown_again == pytest.approx(shown, rel=1e-3)
    for ours, wanted in zip(recorded, ran, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-4)
