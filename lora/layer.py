"""The linear layers of the transformer in a training: frozen weights, in bf16 or in float8, and the LoRA.

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
LARGEST = torch.finfo(FLOAT8).max
"""448, what e4m3 holds (Micikevicius et al. 2022, arXiv:2209.05433, table 1); torch makes NaN of what is larger."""
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
        return _product(x, self, None, None)


def to_float8(model: torch.nn.Module) -> set[str]:
    """Puts a Float8Linear in the place of every linear layer that IN_FLOAT8 means; returns their names."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and IN_FLOAT8.search(name)}
    for name, module in linear.items():
        model.set_submodule(name, Float8Linear(module))
    return set(linear)


class AdaptedLinear(lora.Linear):
    """peft's LoRA layer over a frozen linear layer with a faster forward; one adapter, alpha = rank, no dropout."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), in the type of x, which is the base's."""
        if self.disable_adapters:
            return self.base_layer(x)
        [name] = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _product(x, self.base_layer, a, b)

    def _get_base_layer_device_and_dtype(self, base_layer: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
        """What peft makes an adapter's weights in: float32 whatever the base's type, for steps of 1e-4 vanish in bf16's
        8 bits."""
        return base_layer.get_parameter("weight").device, torch.float32


def _product(x: Tensor, frozen: torch.nn.Linear, a: Tensor | None, b: Tensor | None) -> Tensor:
    """(…, inputs) -> (…, outputs) by a frozen layer, and by A and B where there are any."""
    scale = frozen.scale if isinstance(frozen, Float8Linear) else None
    outputs = _Product.apply(x.flatten(0, -2), frozen.weight, scale, frozen.bias, a, b)
    return outputs.unflatten(0, x.shape[:-1])


def _taken_out(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weights that products are made with. Where they are held in float8, eagerly for this moment alone; what a
    compiler makes of it keeps them to the block's backward pass."""
    return weight if scale is None else weight.to(scale.dtype) * scale


class _Product(torch.autograd.Function):
    """y = x W^T + bias + (x A^T) B^T for x (M, inputs); W and its bias get no gradient.

    Kept for the backward pass: W as it is held, x, which all layers that read it share, x A^T (M, rank), and A and B in
    the type of x; without A and B, W alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        outputs = F.linear(x, _taken_out(weight, scale), bias)
        if a is None or b is None:
            ctx.save_for_backward(weight, scale, None, None, None, None)
            return outputs
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = F.linear(x, a)  # (M, rank)
        ctx.save_for_backward(weight, scale, x, inner, a, b)
        # A compiler fuses the sum by itself, and torch 2.11's loses the gradient of a result that was made in place
        # (pytorch/pytorch#180642).
        if torch.compiler.is_compiling():
            return torch.addmm(outputs, inner, b.T)
        return outputs.addmm_(inner, b.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, x, inner, a, b = ctx.saved_tensors
        of_x = gradient @ _taken_out(weight, scale) if ctx.needs_input_grad[0] else None
        if x is None:
            return of_x, None, None, None, None, None
        of_inner = gradient @ b  # (M, rank)
        if of_x is not None:
            of_x.addmm_(of_inner, a)
        return of_x, None, None, None, (of_inner.T @ x).float(), (gradient.T @ inner).float()
