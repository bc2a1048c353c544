"""Queries and keys on their way to attention: RMS norm and rotary position embeddings, on a GPU in one kernel.

Operation by operation, both passes move some five times the bytes that they need (counted; bench/NOTES.md).
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from lora.flux import kernels
except ImportError:  # torch brings Triton along for NVIDIA's GPUs under Linux, and nowhere else
    kernels = None  # type: ignore[assignment]

Part = tuple[Tensor, torch.nn.RMSNorm]
"""Queries or keys of some tokens, (batch, tokens, heads, width), and their norm."""


def turned(parts: Sequence[Part], turn: Tensor) -> Tensor:
    """The parts one behind the other along the tokens, each by its norm, and all turned by `turn`.

    `turn` (1, all tokens, 1, width / 2) is complex: a pair of numbers is a complex one, and its turn a product (Su et
    al. 2021, arXiv:2104.09864).
    """
    if turn.is_cuda and _there_is_a_kernel():
        return by_kernel(parts, turn)
    x = torch.cat([norm(part) for part, norm in parts], dim=1) if len(parts) > 1 else parts[0][1](parts[0][0])
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def by_kernel(parts: Sequence[Part], turn: Tensor) -> Tensor:
    """The same, rounded once instead of twice."""
    tensors = [tensor for part, norm in parts for tensor in (part, norm.weight)]
    return _Turned.apply(torch.view_as_real(turn), parts[0][1].eps, *tensors)


@functools.cache
def _there_is_a_kernel() -> bool:
    """Whether Triton is there and can make kernels, for which it needs a C compiler."""
    if kernels is None:
        return False
    x, norm = torch.ones(1, 1, 1, 16, device="cuda"), torch.nn.RMSNorm(16, eps=1e-6, device="cuda")
    try:
        by_kernel([(x, norm)], torch.ones(1, 1, 1, 8, dtype=torch.complex64, device="cuda"))
    except Exception as error:
        warnings.warn(f"Triton makes no kernels here ({error}): a step takes up to a tenth longer", stacklevel=2)
        return False
    return True


class _Turned(torch.autograd.Function):
    """`turn` (1, all tokens, 1, width / 2, 2) in float32, eps, and each part's numbers and its norm's weight, which
    has no gradient."""

    @staticmethod
    def forward(ctx: Any, turn: Tensor, eps: float, *tensors: Tensor) -> Tensor:
        parts, weights = [x.contiguous() for x in tensors[::2]], tensors[1::2]
        tokens = sum(part.shape[1] for part in parts)
        output = parts[0].new_empty(len(parts[0]), tokens, *parts[0].shape[2:])
        ctx.eps = eps
        ctx.save_for_backward(turn, *parts, *weights)
        kernels.launch(kernels.forward, turn, eps, parts, weights, [(output,)] * len(parts), tokens)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        turn, *tensors = ctx.saved_tensors
        parts, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        gradient = gradient.contiguous()
        of_parts = [torch.empty_like(part) for part in parts]
        whole = [(gradient, of_part) for of_part in of_parts]
        kernels.launch(kernels.backward, turn, ctx.eps, parts, weights, whole, gradient.shape[1])
        return None, None, *(g for of_part in of_parts for g in (of_part, None))
