"""The attention of a training: diffusers' numbers; its gradients in one layout."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb

from lora import adapter, attention, fit, validation
from lora.encode import Example, Text
from tests.test_fit import SETTINGS


def test_without_it_a_single_blocks_gradient_lies_otherwise_than_a_double_blocks_and_with_it_alike(
    gradients_alike: list[bool],
    tiny_flux: FluxTransformer2DModel,
    examples: list[Example],
    texts: dict[str, Text],
) -> None:
    def train(transformer: FluxTransformer2DModel) -> list[torch.nn.Parameter]:
        gradients_alike.clear()
        parameters = adapter.attach(transformer, 4, seed=3)
        list(fit.fit(transformer, parameters, examples, [], texts, SETTINGS))
        return parameters

    tiny_flux.requires_grad_(False)
    bare, mended, after = (copy.deepcopy(tiny_flux) for _ in range(3))
    wanted = train(bare)
    assert set(gradients_alike) == {True, False}

    with attention.in_one_layout(mended), attention.in_one_layout(after):
        trained = train(mended)
    assert set(gradients_alike) == {True}
    for ours, theirs in zip(trained, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    train(after)
    assert set(gradients_alike) == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_that_of_diffusers_and_its_gradient_is_no_further_from_it_than_its_own_rounding(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(7, 4, generator=generator)
    rotation = angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)
    query, key, direction = (torch.randn(2, 7, 3, 8, generator=generator) for _ in range(3))

    def by(
        rotate: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.to(dtype, copy=True).requires_grad_()
        rotated = rotate(x)
        assert rotated.dtype == dtype
        return rotated.detach(), torch.autograd.grad(rotated, x, direction.to(dtype))[0]

    for which, x in enumerate((query, key)):
        theirs = by(lambda x: apply_rotary_emb(x, rotation, sequence_dim=1), x.to(dtype).float(), torch.float32)
        ours = by(lambda x: attention.rotate(x, x, rotation)[which], x, dtype)  # noqa: B023
        torch.testing.assert_close(ours[0], theirs[0].to(dtype))
        within = 1e-6 if dtype == torch.float32 else 2**-7  # of the direction's rounding, and of the result's
        torch.testing.assert_close(ours[1].float(), theirs[1], rtol=within, atol=within)


def test_the_transformer_says_what_it_says_without_and_has_its_processors_back(
    tiny_flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    before = tiny_flux.attn_processors
    wanted = validation.loss(tiny_flux, examples, texts, seed=0)
    with attention.for_training(tiny_flux):
        assert all(isinstance(p, attention.Processor) for p in tiny_flux.attn_processors.values())
        assert validation.loss(tiny_flux, examples, texts, seed=0) == wanted
    assert tiny_flux.attn_processors == before
