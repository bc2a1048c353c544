"""Norm and rotation of queries and keys, held against torch's and diffusers'."""

from collections.abc import Callable, Sequence

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from lora.flux import rotary
from lora.flux.rotary import Part

Turned = Callable[[Sequence[Part], Tensor], Tensor]
ANGLES = torch.randn(14, 64, generator=torch.Generator().manual_seed(0))


def _of_diffusers(parts: Sequence[Part], turn: Tensor) -> Tensor:
    angles = ANGLES.to(turn.device).repeat_interleave(2, dim=1)
    joined = torch.cat([norm(x) for x, norm in parts], dim=1)
    return apply_rotary_emb(joined, (angles.cos(), angles.sin()), sequence_dim=1)


def _by(turned: Turned, counts: Sequence[int], batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """What it gives, and the gradients; of numbers such as bf16 holds."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    parts = []
    for tokens in counts:
        norm = torch.nn.RMSNorm(128, eps=1e-6).to(device, dtype).requires_grad_(False)
        norm.weight += 0.2 * randn(128).bfloat16()
        norm.weight.data = norm.weight.bfloat16().to(dtype)
        parts.append((randn(batch, tokens, 3, 128).requires_grad_(), norm))
    turn = torch.polar(torch.ones_like(ANGLES), ANGLES)[None, :, None].to(device)
    output = turned(parts, turn)
    assert (output.dtype, output.shape) == (dtype, (batch, 14, 3, 128))
    return [output.detach(), *torch.autograd.grad(output, [x for x, _ in parts], randn(*output.shape))]


@pytest.mark.parametrize("counts", [(14,), (5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_diffusers_and_in_bf16_no_further_from_float32s(
    dtype: torch.dtype, counts: tuple[int, ...]
) -> None:
    exact = _by(_of_diffusers, counts, 2, torch.float32, "cpu")
    theirs = _by(_of_diffusers, counts, 2, dtype, "cpu")
    for ours, same, wanted in zip(_by(rotary.turned, counts, 2, dtype, "cpu"), theirs, exact, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(ours, wanted)
        else:
            assert (ours.float() - wanted).norm() < 1.01 * (same.float() - wanted).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's own: kernels")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("counts", [(14,), (5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_does_the_same(dtype: torch.dtype, counts: tuple[int, ...], batch: int) -> None:
    exact = _by(_of_diffusers, counts, batch, torch.float32, "cuda")
    theirs = _by(_of_diffusers, counts, batch, dtype, "cuda")
    for ours, same, wanted in zip(_by(rotary.by_kernel, counts, batch, dtype, "cuda"), theirs, exact, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        else:
            assert (ours.float() - wanted).norm() < 1.01 * (same.float() - wanted).norm()
