"""The forward pass of a training, held against diffusers' own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from bench.speed import ways
from lora.flux import adapter, encode, flow, forward
from lora.flux.encode import Example, Text
from tests.flux.test_layer import in_float8

CPU = torch.device("cpu")
PARTS = {
    "everything": r".",
    "attention alone": r"attn",
    "the last layer alone": r"proj_out",
    "single blocks": r"single_transformer_blocks",
}


@pytest.fixture
def flux(tiny_flux: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Two blocks of each kind."""
    for blocks in (tiny_flux.transformer_blocks, tiny_flux.single_transformer_blocks):
        blocks.append(copy.deepcopy(blocks[0]))
    return tiny_flux


def _learn(transformer: FluxTransformer2DModel, texts: dict[str, Text], batch: int) -> tuple[Tensor, list[Tensor]]:
    """What it predicts, and the gradients of what is trained."""
    generator = torch.Generator().manual_seed(5)
    noisy, wanted = (torch.randn(batch, 6, 16, generator=generator).to(transformer.dtype) for _ in range(2))
    text = {
        key: tensor.to(transformer.dtype)
        for key, tensor in encode.stack(texts, ["a TOK", "a red house", ""][:batch], CPU).items()
    }
    times = torch.tensor([0.25, 0.5, 0.75])[:batch]
    predicted = flow.velocity(transformer, noisy, times, 3.5, text, (4, 6))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if not trained:
        return predicted, []
    return predicted.detach(), list(torch.autograd.grad(F.mse_loss(predicted.float(), wanted.float()), trained))


def _attach(transformer: FluxTransformer2DModel, pattern: str) -> None:
    asked, added = adapter.choose(adapter.target_modules(transformer), pattern)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.attach(transformer, 4, seed=3, modules=[*asked, *added]):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("part", PARTS)
def test_predictions_and_gradients_are_those_of_diffusers_model(
    part: str, batch: int, flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    _attach(flux, PARTS[part])
    wanted, of_wanted = _learn(flux, texts, batch)
    with forward.for_training(flux):
        predicted, gradients = _learn(flux, texts, batch)
        flux.enable_gradient_checkpointing()
        _, recomputed = _learn(flux, texts, batch)
    torch.testing.assert_close(predicted, wanted)
    assert len(gradients) == len(of_wanted) > 0
    for ours, again, theirs in zip(gradients, recomputed, of_wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours, again)


@pytest.mark.parametrize("guided", [True, False])
def test_without_a_lora_or_with_it_switched_off_it_is_the_base(
    guided: bool, flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    if not guided:  # such as FLUX.1-schnell
        flux = FluxTransformer2DModel(**{**flux.config, "guidance_embeds": False}).eval()
    flux.requires_grad_(False)
    wanted, _ = _learn(flux, texts, 2)
    with forward.for_training(flux):
        bare, _ = _learn(flux, texts, 2)
        torch.testing.assert_close(bare, wanted)
        _attach(flux, PARTS["everything"])
        assert not torch.allclose(_learn(flux, texts, 2)[0], wanted, rtol=0.1)
        flux.disable_adapters()
        assert torch.equal(_learn(flux, texts, 2)[0], bare)
    assert torch.equal(_learn(flux, texts, 2)[0], wanted), "diffusers' own is back"


@pytest.mark.parametrize("part", PARTS)
def test_on_a_float8_base_too(part: str, flux: FluxTransformer2DModel, texts: dict[str, Text]) -> None:
    narrow = in_float8(flux)
    _attach(narrow, PARTS[part])
    wanted, of_wanted = _learn(narrow, texts, 1)
    with forward.for_training(narrow):
        predicted, gradients = _learn(narrow, texts, 1)
    torch.testing.assert_close(predicted, wanted)
    for ours, theirs in zip(gradients, of_wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_in_bf16_it_is_nearer_to_float32_than_diffusers_model_is(
    flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    _attach(flux.bfloat16(), PARTS["everything"])
    _, exact = _learn(copy.deepcopy(flux).float(), texts, 1)
    _, theirs = _learn(flux, texts, 1)
    with forward.for_training(flux):
        _, ours = _learn(flux, texts, 1)

    def error(gradients: list[Tensor]) -> float:
        pairs = zip(gradients, exact, strict=True)
        return sum((ours.float() - wanted).norm().item() / wanted.norm().item() for ours, wanted in pairs)

    assert error(ours) < 1.05 * error(theirs)


def test_every_attentions_gradient_lies_alike_in_memory_which_in_diffusers_model_takes_a_copy(
    gradients_alike: list[bool], flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    _attach(flux, PARTS["everything"])
    _, wanted = _learn(flux, texts, 1)
    assert set(gradients_alike) == {True, False}
    gradients_alike.clear()
    with ways.in_one_layout(flux):
        _, mended = _learn(flux, texts, 1)
    assert gradients_alike == [True] * 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(mended, wanted, strict=True))
    for batch in (1, 3):
        gradients_alike.clear()
        with forward.for_training(flux):
            _learn(flux, texts, batch)
        assert gradients_alike == [True] * 4


def test_it_keeps_less_for_the_backward_pass_than_diffusers_model(
    flux: FluxTransformer2DModel, examples: list[Example], texts: dict[str, Text]
) -> None:
    _attach(flux, PARTS["everything"])

    def kept() -> int:
        found: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            _learn(flux, texts, 1)
        return sum(found.values())

    before = kept()
    with forward.for_training(flux):
        assert kept() < before
