"""The linear layers of the transformer in a training: frozen weights, in bf16 or in float8, and the LoRA.

peft makes and names the LoRA's layers; only their arithmetic is different here. peft computes W x, then B A x, then
their sum: three passes over a tensor of the layer's full width, and as many over the gradients. Here the small product
is added inside the large one's own output, forward and backward, all of it in the base's type; the float32 weights that
the optimizer moves are `lora.training.fit`'s.
"""

import re
from collections.abc import Sequence
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
        return _Frozen.apply(x.flatten(0, -2), self.weight, self.scale, self.bias).unflatten(0, x.shape[:-1])


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
        return self.base_layer(x) if self.disable_adapters else outputs(x, [self])[0]

    def held(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        """The frozen weights, their scale and their bias, A (rank, inputs) and B (outputs, rank)."""
        frozen = self.get_base_layer()
        assert isinstance(frozen, torch.nn.Linear)
        scale = frozen.scale if isinstance(frozen, Float8Linear) else None
        [name] = self.active_adapters
        return frozen.weight, scale, frozen.bias, self.lora_A[name].weight, self.lora_B[name].weight

    def _get_base_layer_device_and_dtype(self, base_layer: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
        """What peft makes an adapter's weights in: the type of the products."""
        held = base_layer.get_parameter("weight")
        return held.device, base_layer.scale.dtype if isinstance(base_layer, Float8Linear) else held.dtype


def outputs(x: Tensor, layers: Sequence[torch.nn.Module]) -> list[Tensor]:
    """(…, inputs) -> (…, outputs) of each of the layers, which all read x.

    Where all have a LoRA, x goes once through all A, and its gradient is added up within the products.
    """
    adapted = [layer for layer in layers if isinstance(layer, AdaptedLinear) and not layer.disable_adapters]
    if len(adapted) < len(layers):
        return [layer(x) for layer in layers]
    held = [tensor for layer in adapted for tensor in layer.held()]
    return [y.unflatten(0, x.shape[:-1]) for y in _Products.apply(x.flatten(0, -2), *held)]


def output_of_two(x: Tensor, y: Tensor, layer: torch.nn.Module) -> Tensor:
    """(…, inputs) of a layer whose inputs are those of x and then those of y -> (…, outputs)."""
    if not isinstance(layer, AdaptedLinear) or layer.disable_adapters:
        return layer(torch.cat([x, y], dim=-1))
    output = _ProductOfTwo.apply(x.flatten(0, -2), y.flatten(0, -2), *layer.held())
    return output.unflatten(0, x.shape[:-1])


def _taken_out(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weights that products are made with; where they are held in float8, for this moment alone."""
    return weight if scale is None else weight.to(scale.dtype) * scale


class _Frozen(torch.autograd.Function):
    """y = x W^T + bias for x (M, inputs) and W held in float8, of which alone something is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _taken_out(weight, scale), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ _taken_out(*ctx.saved_tensors), None, None, None


class _Products(torch.autograd.Function):
    """y = x W^T + bias + (x A^T) B^T for x (M, inputs) and each of the layers, given as W, its scale, bias, A and B.

    W and bias get no gradient. Kept for the backward pass: W as it is held, x, x A^T (M, rank), A and B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *held: Any) -> tuple[Tensor, ...]:
        weights, scales, biases, downs, ups = (held[i::5] for i in range(5))
        down = downs[0] if len(downs) == 1 else torch.cat(downs)  # (layers * rank, inputs)
        inner = F.linear(x, down)  # (M, layers * rank)
        ctx.layers = len(weights)
        ctx.save_for_backward(x, inner, down, *weights, *scales, *ups)
        parts = inner.chunk(ctx.layers, dim=1)
        return tuple(
            F.linear(x, _taken_out(weight, scale), bias).addmm_(part, up.T)
            for weight, scale, bias, part, up in zip(weights, scales, biases, parts, ups, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, down, *rest = ctx.saved_tensors
        weights, scales, ups = (rest[i : i + ctx.layers] for i in range(0, len(rest), ctx.layers))
        of_inner = torch.empty_like(inner)
        of_ups = []
        parts = zip(gradients, ups, inner.chunk(ctx.layers, 1), of_inner.chunk(ctx.layers, 1), strict=True)
        for gradient, up, part, of_part in parts:
            torch.mm(gradient, up, out=of_part)
            of_ups.append(gradient.T @ part)
        of_downs = (of_inner.T @ x).chunk(ctx.layers)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_inner @ down
            for gradient, weight, scale in zip(gradients, weights, scales, strict=True):
                of_x.addmm_(gradient, _taken_out(weight, scale))
        of_pairs = zip(of_downs, of_ups, strict=True)
        return of_x, *(g for of_down, of_up in of_pairs for g in (None, None, None, of_down, of_up))


class _ProductOfTwo(torch.autograd.Function):
    """The same of one layer, whose x lies in two tensors (M, its inputs): no third is made of them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        width = x.shape[1]
        wide = _taken_out(weight, scale)
        inner = F.linear(x, a[:, :width]).addmm_(y, a[:, width:].T)
        ctx.save_for_backward(x, y, inner, weight, scale, a, b)
        return F.linear(x, wide[:, :width], bias).addmm_(y, wide[:, width:].T).addmm_(inner, b.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, inner, weight, scale, a, b = ctx.saved_tensors
        width = x.shape[1]
        wide = _taken_out(weight, scale)
        of_inner = gradient @ b
        of_x = (gradient @ wide[:, :width]).addmm_(of_inner, a[:, :width])
        of_y = (gradient @ wide[:, width:]).addmm_(of_inner, a[:, width:])
        of_a = torch.cat([of_inner.T @ x, of_inner.T @ y], dim=1)
        return of_x, of_y, None, None, None, of_a, gradient.T @ inner
