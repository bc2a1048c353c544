"""Attention checked against another implementation: two sound ones agree, a wrong one is seen and is not used."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from lora.flux import attention
from lora.flux.attention import Attend, Shape

CPU = torch.device("cpu")
SHAPES: list[Shape] = [(1, 76, 4, 32), (2, 200, 3, 64)]
FLASH = attention.by(SDPBackend.FLASH_ATTENTION)
"""Two implementations that torch has on a CPU."""
MATH = (SDPBackend.MATH,)


class _WrongBackward(torch.autograd.Function):
    """The identity, with a gradient that is 3 % too long: no loss would show it."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 1.03 * gradient


def _forgets_a_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attention(q, k[:, 1:], v[:, 1:])


def _gives_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output = FLASH(q, k, v)
    return output.index_fill(1, torch.tensor([3]), float("nan"))


def _finds_no_plan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_sound_implementations_differ_by_a_third_of_what_is_allowed_at_most(
    shape: Shape, dtype: torch.dtype
) -> None:
    found = attention.disagreement(FLASH, attention.by(*MATH), shape, CPU, dtype)
    assert 0 < found < attention.TOLERANCE / 3


def test_what_is_right_is_used_as_it_is_and_nothing_is_said() -> None:
    lines: list[str] = []
    with attention.checked(SHAPES, CPU, torch.bfloat16, lines.append, FLASH, MATH) as agrees:
        assert torch.backends.cuda.flash_sdp_enabled()
    assert (agrees, lines) == (True, [])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: _WrongBackward.apply(FLASH(q, k, v)),
        lambda q, k, v: FLASH(_WrongBackward.apply(q), k, v),
        _forgets_a_key,
        _gives_nan,
        _finds_no_plan,
    ],
    ids=["all gradients", "the queries' gradient", "a key", "no number", "an error"],
)
def test_what_is_wrong_forward_or_backward_is_told_and_the_other_is_used(wrong: Attend) -> None:
    lines: list[str] = []
    with attention.checked(SHAPES[:1], CPU, torch.bfloat16, lines.append, wrong, MATH) as agrees:
        assert not agrees
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    [line] = lines
    assert line.startswith("warning: this GPU's attention differs")
    assert "76 tokens" in line


def test_memory_that_ran_out_is_no_disagreement() -> None:
    def runs_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with (
        pytest.raises(torch.OutOfMemoryError),
        attention.checked(SHAPES[:1], CPU, torch.bfloat16, print, runs_out, MATH),
    ):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's own: cuDNN's attention")
@pytest.mark.parametrize("tokens", [256 + 1024, 256 + 2304, 256 + 4096])
def test_torchs_choice_on_this_gpu_agrees_with_the_others_at_flux_1_devs_size(tokens: int) -> None:
    lines: list[str] = []
    shape = (1, tokens, 24, 128)
    with attention.checked([shape], torch.device("cuda"), torch.bfloat16, lines.append) as agrees:
        assert agrees, lines
