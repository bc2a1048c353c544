"""A LoRA out of a change of weights, beside the exact singular values."""

import pytest
import torch
from torch import Tensor

from lora.flux import extract
from lora.flux.extract import Held


def _change(outputs: int, inputs: int, fall: float) -> Tensor:
    """With singular values that fall as 1 / number^fall."""
    generator = torch.Generator().manual_seed(0)
    count = min(outputs, inputs)
    u, v = (torch.linalg.qr(torch.randn(side, count, generator=generator))[0] for side in (outputs, inputs))
    return u * torch.arange(1, count + 1) ** -fall @ v.T


@pytest.mark.parametrize("exact_up_to", [1024, 0], ids=["all singular vectors", "the first ones"])
@pytest.mark.parametrize("fall", [0.3, 0.7])
def test_the_lora_is_the_nearest_of_its_rank_and_its_share_is_that_of_the_first_singular_values(
    fall: float, exact_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "EXACT_UP_TO", exact_up_to)
    change = _change(300, 200, fall)
    (a, b), whole, held = extract.extract(change, 16)
    assert (a.shape, b.shape, a.dtype) == ((16, 200), (300, 16), torch.float32)
    u, s, vh = torch.linalg.svd(change)
    nearest = (u[:, :16] * s[:16] @ vh[:16] - change).norm()
    assert (b @ a - change).norm() <= 1.001 * nearest
    assert (b @ a - change).norm() < 0.99 * (change - u[:, 8:24] * s[8:24] @ vh[8:24]).norm(), "others are further off"
    torch.testing.assert_close(whole, s.norm())
    torch.testing.assert_close(held, s[:16].norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_a_rank_that_is_higher_than_the_layer_holds_all_of_it_and_zeros(shape: tuple[int, int]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (a, b), whole, held = extract.extract(change, 12)
    assert (len(a), b.shape[1]) == (12, 12)
    torch.testing.assert_close(b @ a, change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, held)
    assert not a[10:].any()


def test_the_same_change_gives_the_same_lora_whatever_was_drawn_before_and_draws_nothing() -> None:
    change = _change(1200, 1100, 0.3)
    torch.manual_seed(1)
    (first, _), *_ = extract.extract(change, 4)
    torch.manual_seed(2)
    (second, _), *_ = extract.extract(change, 4)
    assert torch.equal(first, second)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(1), drawn)


def test_no_change_is_held_whole_and_all_layers_together_are_a_norm() -> None:
    (a, b), whole, held = extract.extract(torch.zeros(6, 5), 2)
    assert not a.any()
    assert not b.any()
    assert Held(whole=whole.item(), held=held.item()).share == 1
    both = extract.together([Held(whole=3.0, held=3.0), Held(whole=4.0, held=0.0)])
    assert (both.whole, both.held, both.share) == (5.0, 3.0, 0.6)
