"""The linear layers of the transformer in a training: frozen weights, in bf16 or in float8, and the LoRA.

peft makes and names the LoRA's layers; only their arithmetic is different here. peft computes W x, then B A x, then
their sum: three passes over a tensor of the layer's full width, and as many over the gradients; and with float32
masters on a bf16 base it does this in float32. Here both products are made in the base's type, and the small one is
added inside the large one's own output, forward and backward.
"""

import re
from typing import Any, NamedTuple

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


class Held(NamedTuple):
    """The weights of a frozen layer as they lie in memory, and the two products that are made with them."""

    weight: Tensor
    """(outputs, inputs)"""
    scale: Tensor | None = None
    """(outputs, 1), where the weight is in float8."""
    turned: Tensor | None = None
    """(inputs, outputs) in float8, where the backward pass is made in it: a GPU multiplies float8 along adjacent
    numbers only, and that pass sums over the outputs."""
    turned_scale: Tensor | None = None
    """(inputs, 1) in float32."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(M, inputs) -> (M, outputs), in the type of x."""
        return F.linear(x, self._taken_out(), bias)

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient of the outputs, (M, outputs) -> of the inputs, (M, inputs)."""
        if self.turned is None or self.turned_scale is None:
            return gradient @ self._taken_out()
        return float8_product(gradient, self.turned, self.turned_scale)

    def _taken_out(self) -> Tensor:
        """The weights that products are made with. Where they are held in float8, eagerly for this moment alone; what a
        compiler makes of it keeps them to the block's backward pass."""
        return self.weight if self.scale is None else self.weight.to(self.scale.dtype) * self.scale


def float8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T made in float8 and added up in float32: x (M, K), W (N, K) in float8 with its scale (N, 1) in float32;
    (M, N) in the type of x.

    Each row of x, a token's, takes e4m3's whole range by a scale of its own. torch has had no public name for such a
    product in all of the versions that this runs on.
    """
    largest = torch.finfo(FLOAT8).max  # a constant to torch.compile, which makes an input of a module's own float
    taken_out = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-30) / largest  # (M, 1)
    narrow = (x.float() / taken_out).to(FLOAT8).contiguous()
    return torch._scaled_mm(
        narrow,
        weight.T,
        scale_a=taken_out,
        scale_b=scale.T,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )


class _Float8(torch.nn.Linear):
    """A frozen linear layer that makes a product, or holds its weights, in float8."""

    def held(self) -> Held:
        raise AssertionError("each kind has its own")

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), in the type of x."""
        return _product(x, self, None, None, 0.0)


class Float8Linear(_Float8):
    """A frozen linear layer that holds a byte for each weight."""

    scale: Tensor

    def __init__(self, like: torch.nn.Linear) -> None:
        """In the size of `like`, on the meta device: `load_state_dict` brings weights and scales (`quantise`)."""
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta")
        self.weight = torch.nn.Parameter(torch.empty_like(self.weight, dtype=FLOAT8), requires_grad=False)
        self.register_buffer("scale", torch.empty(like.out_features, 1, device="meta"))

    def held(self) -> Held:
        return Held(self.weight, scale=self.scale)


def to_float8(model: torch.nn.Module) -> set[str]:
    """Puts a Float8Linear in the place of every linear layer that IN_FLOAT8 means; returns their names."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and IN_FLOAT8.search(name)}
    for name, module in linear.items():
        model.set_submodule(name, Float8Linear(module))
    return set(linear)


class Float8Backward(_Float8):
    """A frozen linear layer with its weights once more in float8, for the product of the backward pass.

    What the model says stays exact, and so does what it is asked to learn; only gradients on their way down are
    rounded. A forward pass in float8 raised the loss on the toy base by 1.5 % (bench/NOTES.md).
    """

    turned: Tensor
    turned_scale: Tensor

    def __init__(self, like: torch.nn.Linear) -> None:
        """On the weights of `like`."""
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta")
        self.weight, self.bias = like.weight, like.bias
        turned, scale = quantise(like.weight.detach().T.contiguous())
        self.register_buffer("turned", turned)
        self.register_buffer("turned_scale", scale.float())

    def held(self) -> Held:
        return Held(self.weight, turned=self.turned, turned_scale=self.turned_scale)


def backward_in_float8(model: torch.nn.Module) -> None:
    """Puts a Float8Backward in the place of every linear layer that IN_FLOAT8 means."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and IN_FLOAT8.search(name):
            model.set_submodule(name, Float8Backward(module))


class AdaptedLinear(lora.Linear):
    """peft's LoRA layer over a frozen linear layer with a faster forward; one adapter, no dropout."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), in the type of x, which is the base's."""
        if self.disable_adapters:
            return self.base_layer(x)
        [name] = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _product(x, self.base_layer, a, b, self.scaling[name])

    def _get_base_layer_device_and_dtype(self, base_layer: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
        """What peft makes an adapter's weights in: float32 whatever the base's type, for steps of 1e-4 vanish in bf16's
        8 bits."""
        return base_layer.get_parameter("weight").device, torch.float32


def _product(x: Tensor, frozen: torch.nn.Linear, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    """(…, inputs) -> (…, outputs) by a frozen layer, and by A and B where there are any."""
    held = frozen.held() if isinstance(frozen, _Float8) else Held(frozen.weight)
    outputs = _Product.apply(x.flatten(0, -2), a, b, scaling, frozen.bias, *held)
    return outputs.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T for x (M, inputs); W and its bias get no gradient.

    Kept for the backward pass: x, which all layers that read it share, x A^T (M, rank), and A and B in the type of x;
    without A and B, nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        bias: Tensor | None,
        *held: Tensor | None,
    ) -> Tensor:
        outputs = Held(*held).forward(x, bias)  # type: ignore[arg-type]
        if a is None or b is None:
            ctx.save_for_backward(None, None, None, None, *held)
            return outputs
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = F.linear(x, a)  # (M, rank)
        ctx.save_for_backward(x, inner, a, b, *held)
        ctx.scaling = scaling
        # A compiler fuses the sum by itself, and torch 2.11's loses the gradient of a result that was made in place
        # (pytorch/pytorch#180642).
        if torch.compiler.is_compiling():
            return torch.addmm(outputs, inner, b.T, alpha=scaling)
        return outputs.addmm_(inner, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b, *held = ctx.saved_tensors
        of_x = Held(*held).backward(gradient) if ctx.needs_input_grad[0] else None
        none = [None] * (2 + len(held))
        if x is None:
            return of_x, None, None, *none
        if ctx.scaling != 1:
            inner, b = inner * ctx.scaling, b * ctx.scaling
        of_inner = gradient @ b  # (M, rank)
        if of_x is not None:
            of_x.addmm_(of_inner, a)
        of_a, of_b = of_inner.T @ x, gradient.T @ inner
        return of_x, of_a.float(), of_b.float(), *none
