"""Attention in a training, and whether the implementation that torch takes for it can be trusted here.

On Hopper torch attends by cuDNN, nearly twice as fast as by FlashAttention-2 (docs/speed.md). Its backward pass has
been wrong more than once: it read beyond a gradient of another layout (`lora.flux.forward`), and it gave NaN with a
mask (pytorch/pytorch#196678). A wrong gradient trains a wrong LoRA and says so nowhere. So before a training on a GPU
records its passes, attention is computed once for each of its sizes by another implementation too, both ways.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora.flux import hardware

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values, (batch, tokens, heads, width of a head) each -> (batch, tokens, width)."""
Shape = tuple[int, int, int, int]
"""Batch, tokens, heads, width of a head."""

OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""All but cuDNN's."""
TOLERANCE = 2 * torch.finfo(torch.bfloat16).eps
"""Of a difference over what it is of, both as norms: .016. In bf16 sound implementations differ by .003 to .004:
torch's own on a CPU, and a model's gradients between cuDNN's and plain products on an H200."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by torch's own choice of implementation; an `Attend`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def by(*backends: SDPBackend) -> Attend:
    """Attention by the first of these implementations that can."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(list(backends)):
            return attention(q, k, v)

    return attend


def disagreement(one: Attend, other: Attend, shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative difference (as norms) of output and gradients, on random queries, keys and values.

    Infinite where the first gives what is no number. The gradient lies in memory as a training's does.
    """
    batch, tokens, heads, width = shape
    generator = torch.Generator(device).manual_seed(tokens)

    def randn(*sides: int) -> Tensor:
        return torch.randn(*sides, generator=generator, device=device).to(dtype)

    given = [randn(*shape).requires_grad_() for _ in range(3)]
    gradient = randn(batch, tokens, heads * width)

    def run(attend: Attend) -> list[Tensor]:
        output = attend(*given)
        return [output.detach(), *torch.autograd.grad(output, given, gradient)]

    found = 0.0
    for mine, wanted in zip(run(one), run(other), strict=True):
        difference = torch.dist(mine.float(), wanted.float()) / wanted.float().norm()
        found = max(found, difference.item() if torch.isfinite(mine).all() else float("inf"))
    return found


@contextlib.contextmanager
def checked(
    shapes: Sequence[Shape],
    device: torch.device,
    dtype: torch.dtype,
    log: Callable[[str], None],
    usual: Attend = attention,
    others: Sequence[SDPBackend] = OTHERS,
) -> Iterator[bool]:
    """Within it, attention runs by `usual` where it agrees with the `others` on every shape, and else by those.

    Gives whether it agrees; where it does not, the log is told, with the shapes and how far apart they are: infinitely
    where `usual` fails, as cuDNN's does that finds no plan (pytorch/pytorch#138529). Raises what says that the memory
    ran out.
    """

    def measured(shape: Shape) -> float:
        try:
            return disagreement(usual, by(*others), shape, device, dtype)
        except RuntimeError as error:
            if hardware.is_out_of_memory(error):
                raise
            return float("inf")

    apart = {shape: measured(shape) for shape in shapes}
    wrong = {shape: far for shape, far in apart.items() if not far <= TOLERANCE}
    if not wrong:
        yield True
        return
    shown = ", ".join(f"{tokens} tokens {far:.3g}" for (_, tokens, _, _), far in wrong.items())
    log(
        f"warning: this GPU's attention differs from another implementation's by more than rounding ({shown}; allowed"
        f" {TOLERANCE:.2g}): the other is used, which is slower"
    )
    with sdpa_kernel(list(others)):
        yield False
