"""The attention's gradients: one layout for all, and the same numbers."""

import copy

import torch
from diffusers import FluxTransformer2DModel

from lora import adapter, attention, fit
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
