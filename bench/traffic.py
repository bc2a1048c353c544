"""How many bytes a step moves beside its matrix products: counted on FLUX.1-dev's shapes, without a weight or a GPU.

`script/bench traffic` runs one step forward and backward on torch's meta device, where tensors have shapes and no
contents, and adds up what every operation reads and writes. Large products and attention are left out: their time is in
their arithmetic. Everything else (norms, modulation, rotary embeddings, activations, the adapter) takes the time that
its bytes need.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.speed import model, ways
from bench.speed.case import FLUX_DEV, RANK, T5_TOKENS, Case
from lora.flux import adapter, forward

PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0}
"""Which argument is the first factor, by the operation's name."""
THIN = 64
"""A product with a side of so much or less moves its large factor for little arithmetic: the adapter's, and layers of
the modulation, which see one vector. Such ones count with the rest."""


class Traffic(TorchDispatchMode):
    """Within it, `moved` adds up the bytes that operations other than products read and write, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.kernels = 0
        """Operations that move anything, products too."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outcome = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in ("detach", "empty", "empty_like", "_unsafe_view"):
            self.kernels += 1
            if not _is_large_product(name, args):
                tensors = [leaf for leaf in tree_leaves((args, kwargs, outcome)) if isinstance(leaf, Tensor)]
                self.moved[name] += sum(tensor.nbytes for tensor in tensors)
        return outcome


def _is_large_product(name: str, args: tuple[Any, ...]) -> bool:
    if name not in PRODUCTS:
        return False
    a, b = args[PRODUCTS[name] : PRODUCTS[name] + 2]
    return min(*a.shape[-2:], b.shape[-1]) > THIN


class _Attention(torch.autograd.Function):
    """Attention's shapes, forward and backward, without its arithmetic: a fused kernel moves little beside it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3] or (kwargs["query"], kwargs["key"], kwargs["value"])
            return _Attention.apply(q, k, v)
        return func(*args, **kwargs)


Attach = Callable[[FluxTransformer2DModel], AbstractContextManager[None]]
"""Puts an adapter on a bare transformer; what it trains within."""


def ours(transformer: FluxTransformer2DModel) -> AbstractContextManager[None]:
    adapter.attach(transformer, RANK, seed=0)
    return forward.for_training(transformer)


def by_peft(transformer: FluxTransformer2DModel, dtype: torch.dtype) -> AbstractContextManager[None]:
    """peft's own adapter on the project's layers, its weights in `dtype`."""
    for parameter in ways.attach_by_peft(transformer, adapter.target_modules(transformer)):
        parameter.data = parameter.data.to(dtype)
    return ways.in_one_layout(transformer)


WAYS: Mapping[str, Attach] = {
    "ours": ours,
    "peft, bf16": lambda transformer: by_peft(transformer, torch.bfloat16),
    "peft, float32": lambda transformer: by_peft(transformer, torch.float32),
}


def of_a_step(config: Mapping[str, Any], side: int, text_tokens: int, attach: Attach) -> Traffic:
    """The traffic of one step at batch 1, forward and backward, in bf16, nothing recomputed."""
    with model.made_there(torch.device("meta"), torch.bfloat16):
        transformer = FluxTransformer2DModel(**config).eval().requires_grad_(False)
    trained = attach(transformer)
    lesson = model.make_lesson(Case(sides=(side,), batch_size=1), transformer, text_tokens)
    [[(inputs, target), _]] = ways.fixed_inputs(transformer, lesson)
    with trained, _FusedAttention(), Traffic() as traffic:
        F.mse_loss(transformer(**inputs)[0].float(), target).backward()
    return traffic


def main() -> None:
    argparse.ArgumentParser(
        prog="script/bench traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(
        "| pictures | way | GB beside the products | kernels | most of it |",
        "| --- | --- | --- | --- | --- |",
        sep="\n",
    )
    for side in (1024, 512):
        for name, attach in WAYS.items():
            traffic = of_a_step(FLUX_DEV, side, T5_TOKENS, attach)
            most = ", ".join(f"{what} {moved / 1e9:.0f}" for what, moved in traffic.moved.most_common(5))
            print(f"| {side} | {name} | {traffic.moved.total() / 1e9:.0f} | {traffic.kernels} | {most} |", flush=True)


if __name__ == "__main__":
    main()
