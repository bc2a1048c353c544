"""The attention of the transformer in a training: its gradients arrive in one layout."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor


@contextlib.contextmanager
def in_one_layout(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """Within it the gradient of every attention's output is contiguous, as torch's cuDNN attention needs it.

    On Hopper that is torch's own choice. Its backward pass keeps a plan for each layout of queries, keys and values,
    and takes the first gradient's layout for all that follow (pytorch/pytorch#191576). A single block joins the
    attention's output with the MLP's, so its gradient lies in rows of both; a double block's, which comes later in the
    same pass, is then read beyond its end: seen on an H200 with torch 2.11.0, in the first steps of every training.
    """
    attentions = [block.attn for block in transformer.single_transformer_blocks]
    hooks = [attention.register_forward_hook(_contiguous_gradient) for attention in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _contiguous_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return _ContiguousGradient.apply(output)


class _ContiguousGradient(torch.autograd.Function):
    """The tensor itself; its gradient in memory row after row, copied where it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
