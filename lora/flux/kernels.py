"""What `lora.flux.rotary` does on a GPU, in Triton: each pass reads and writes queries or keys once.

A program takes ROWS heads of tokens, in float32. Only what is there with a GPU can import this file.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""4 KB of a bf16 tensor at FLUX.1-dev's width of a head, 128."""


def launch(
    kernel: Any,
    turn: Tensor,
    eps: float,
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    more: Sequence[tuple[Tensor, ...]],
    tokens: int,
) -> None:
    """Runs a kernel on every part, with the tensors that it needs besides."""
    offset = 0
    for x, weight, besides in zip(parts, weights, more, strict=True):
        own, heads, width = x.shape[1:]
        rows = len(x) * own * heads
        grid = (triton.cdiv(rows, ROWS),)
        kernel[grid](x, weight, turn, *besides, heads, own, tokens, offset, rows, eps, WIDTH=width, ROWS=ROWS)
        offset += own


@triton.jit
def forward(x, weight, turn, output, heads, own, tokens, offset, rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None]
    token = row // heads % own + offset
    place = ((row // (heads * own) * tokens + token) * heads + row % heads)[:, None] * WIDTH + column
    value = tl.load(x + row[:, None] * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None]
    value = value * scale * tl.load(weight + column).to(tl.float32)
    angle = tl.load(turn + token[:, None] * WIDTH + column, mask=inside, other=0.0)
    real, imaginary = tl.split(tl.reshape(value, (ROWS, WIDTH // 2, 2)))
    cosine, sine = tl.split(tl.reshape(angle, (ROWS, WIDTH // 2, 2)))
    joined = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    tl.store(output + place, tl.reshape(joined, (ROWS, WIDTH)).to(output.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    x, weight, turn, gradient, of_x, heads, own, tokens, offset, rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None]
    token = row // heads % own + offset
    place = ((row // (heads * own) * tokens + token) * heads + row % heads)[:, None] * WIDTH + column
    value = tl.load(x + row[:, None] * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None]
    angle = tl.load(turn + token[:, None] * WIDTH + column, mask=inside, other=0.0)
    down = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(down, (ROWS, WIDTH // 2, 2)))
    cosine, sine = tl.split(tl.reshape(angle, (ROWS, WIDTH // 2, 2)))
    joined = tl.join(real * cosine + imaginary * sine, imaginary * cosine - real * sine)
    down = tl.reshape(joined, (ROWS, WIDTH)) * tl.load(weight + column).to(tl.float32)
    value = value * scale
    down = scale * (down - value * (tl.sum(value * down, axis=1) / WIDTH)[:, None])
    tl.store(of_x + row[:, None] * WIDTH + column, down.to(of_x.dtype.element_ty), mask=inside)
