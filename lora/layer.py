"""The linear layers of the transformer in a training: frozen weights, in float8 where memory is short, and the LoRA.

peft makes and names the LoRA's layers; only their arithmetic is different here. peft computes W x, then B A x, then
their sum: three passes over a tensor of the layer's full width, and as many over the gradients; and with float32
masters on a bf16 base it does this in float32. Here both products are made in the base's type, and the small one is
added inside the large one's own output, forward and backward.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""That e4m3 holds (Micikevicius et al. 2022, arXiv:2209.05433, table 1); torch makes NaN of what is larger."""
IN_FLOAT8 = re.compile(r"transformer_blocks\.\d+\.(?!norm)")
"""What `to_float8` is for: attention and MLP of every block. The modulation, a fourth of FLUX.1-dev's weights, acts on
every token alike, and stays as it is."""


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) -> the same in float8, and a scale (outputs, 1) in the type of `weight`, their product ≈ it.

    The scale is a power of two that brings a row's largest weight to half of what e4m3 holds, or more. So what is taken
    out is exact in bf16, and e4m3's own rounding is all that is lost: one part in 16 of a weight, or 2^-10 of the
    scale, where that is more.
    """
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    _, exponent = torch.frexp(largest / LARGEST)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return (weight.float() / scale).to(FLOAT8), scale.to(weight.dtype)


def _taken_out(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weights that products are made with, for this moment alone where they are held in float8."""
    return weight if scale is None else weight.to(scale.dtype) * scale


class Float8Linear(torch.nn.Linear):
    """A frozen linear layer that holds a byte for each weight."""

    scale: Tensor

    def __init__(self, like: torch.nn.Linear) -> None:
        """In the size of `like`, on the meta device: `load_state_dict` brings weights and scales (`quantise`)."""
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta")
        self.weight = torch.nn.Parameter(torch.empty_like(self.weight, dtype=FLOAT8), requires_grad=False)
        self.register_buffer("scale", torch.empty(like.out_features, 1, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), in the type of x."""
        return F.linear(x, _taken_out(self.weight, self.scale), self.bias)


def to_float8(model: torch.nn.Module) -> set[str]:
    """Puts a Float8Linear in the place of every linear layer that IN_FLOAT8 means; returns their names."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and IN_FLOAT8.search(name)}
    for name, module in linear.items():
        model.set_submodule(name, Float8Linear(module))
    return set(linear)


class AdaptedLinear(lora.Linear):
    """peft's LoRA layer over a frozen linear layer with a faster forward; one adapter, no dropout."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), in the type of x, which is the base's."""
        if self.disable_adapters:
            return self.base_layer(x)
        [name] = self.active_adapters
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        scale = base.scale if isinstance(base, Float8Linear) else None
        outputs = _Adapted.apply(x.flatten(0, -2), base.weight, scale, base.bias, a, b, self.scaling[name])
        return outputs.unflatten(0, x.shape[:-1])

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
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = F.linear(x, a)  # (M, rank)
        ctx.save_for_backward(x, inner, weight, scale, a, b)
        ctx.scaling = scaling
        return F.linear(x, _taken_out(weight, scale), bias).addmm_(inner, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, scale, a, b = ctx.saved_tensors
        of_inner = (gradient @ b) * ctx.scaling  # (M, rank)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ _taken_out(weight, scale)).addmm_(of_inner, a)
        of_a, of_b = of_inner.T @ x, (gradient.T @ inner) * ctx.scaling
        return of_x, None, None, None, of_a.float(), of_b.float(), None
