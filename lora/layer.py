"""A linear layer of the transformer with its LoRA: frozen weights, float32 masters, and one pass over the outputs.

peft makes and names the layer; only its arithmetic is different here. peft computes W x, then B A x, then their sum:
three passes over a tensor of the layer's full width, and as many over the gradients; and with float32 masters on a bf16
base it does this in float32. Here both products are made in the base's type, and the small one is added inside the
large one's own output, forward and backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor


class AdaptedLinear(lora.Linear):
    """peft's LoRA layer over a frozen `nn.Linear` with a faster forward; one adapter, no dropout."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), in the type of x, which is the base's."""
        if self.disable_adapters:
            return self.base_layer(x)
        [name] = self.active_adapters
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return _Adapted.apply(x.flatten(0, -2), base.weight, base.bias, a, b, self.scaling[name]).unflatten(
            0, x.shape[:-1]
        )

    def _get_base_layer_device_and_dtype(self, base_layer: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
        """What peft makes an adapter's weights in: float32 whatever the base's type, for steps of 1e-4 vanish in bf16's
        8 bits."""
        return base_layer.get_parameter("weight").device, torch.float32


class _Adapted(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T for x (M, inputs); W and its bias get no gradient.

    Kept for the backward pass: x, which all layers that read it share, x A^T (M, rank), and A and B in the type of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = F.linear(x, a)  # (M, rank)
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(inner, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, a, b = ctx.saved_tensors
        of_inner = (gradient @ b) * ctx.scaling  # (M, rank)
        of_x = (gradient @ weight).addmm_(of_inner, a) if ctx.needs_input_grad[0] else None
        of_a, of_b = of_inner.T @ x, (gradient.T @ inner) * ctx.scaling
        return of_x, None, None, of_a.float(), of_b.float(), None
