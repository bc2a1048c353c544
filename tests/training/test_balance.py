"""Preservation's weight is steered to a ratio of gradient norms."""

import pytest
import torch

from lora.training.balance import BOUNDS, Balance

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_whatever_the_two_losses_scales_the_ratio_of_their_gradients_becomes_the_one_asked_for(scale: float) -> None:
    generator, balance, ratios = torch.Generator().manual_seed(1), Balance(0.5, 0.4, CPU), []
    for _ in range(300):
        noise = torch.exp(0.5 * torch.randn(2, generator=generator))
        pictures = [noise[0] * torch.randn(50, generator=generator), noise[0] * torch.randn(3, 4, generator=generator)]
        others = [scale * noise[1] * torch.randn(50, generator=generator), torch.zeros(3, 4)]
        before = [tensor.clone() for tensor in pictures]
        weight = balance.weight.clone()
        balance.add(pictures, others)
        torch.testing.assert_close(pictures[0], before[0] + others[0])
        assert balance.weight != weight
        ratios.append((balance.preservation / balance.pictures).item())
    assert sorted(ratios[150:])[75] == pytest.approx(0.5, rel=0.15)


def test_a_gradient_of_zero_or_of_no_number_moves_the_weight_no_further() -> None:
    for bad in (0.0, float("nan"), float("inf")):
        balance = Balance(0.5, 0.4, CPU)
        balance.add([torch.ones(3)], [torch.full((3,), bad)])
        assert balance.weight == pytest.approx(0.4)


def test_the_weight_stays_within_bounds() -> None:
    balance = Balance(0.5, 1.0, CPU)
    for _ in range(300):
        balance.add([torch.ones(3)], [torch.full((3,), 1e-10)])
    assert balance.weight == BOUNDS[1]
