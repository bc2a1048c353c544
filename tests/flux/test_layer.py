"""The adapted layer, held against peft's own and against plain float32."""

import copy
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from lora.flux import adapter, encode, flow, layer
from lora.flux.base import Base
from lora.flux.encode import Text
from lora.flux.hardware import Plan
from lora.flux.layer import AdaptedLinear, Float8Linear
from lora.training import fit, recipe
from lora.training.fit import Settings
from toyflux import world
from toyflux.examples import subject_set

CPU = torch.device("cpu")
SIZES = ((4, 4), (2, 6))


def _by_peft(transformer: FluxTransformer2DModel) -> None:
    """peft's own layer, with masters in float32."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=adapter.target_modules(transformer)))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


_by_us = functools.partial(adapter.attach, rank=4, seed=3)


def _gradients(
    transformer: FluxTransformer2DModel,
    attach: Callable[[FluxTransformer2DModel], object],
    texts: dict[str, Text],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Gradients at LoRA weights, inputs and targets that are the same in every call, all of them such as bf16 holds."""
    return _gradients_on(copy.deepcopy(transformer).bfloat16().to(dtype), attach, texts, dtype)


def _gradients_on(
    transformer: FluxTransformer2DModel,
    attach: Callable[[FluxTransformer2DModel], object],
    texts: dict[str, Text],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The same on a transformer as it is, which then has the adapter."""
    attach(transformer)
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for name in sorted(trained):
        trained[name].data = (0.3 * randn(*trained[name].shape)).to(trained[name].dtype)
    said = {prompt: {key: t.bfloat16().to(dtype) for key, t in text.items()} for prompt, text in texts.items()}
    for size in SIZES:
        noisy, wanted = randn(2, size[0] * size[1] // 4, 16), randn(2, size[0] * size[1] // 4, 16)
        # 1000 times the timestep and the guidance are such as bf16 holds, too.
        times, text = torch.tensor([0.25, 0.5]), encode.stack(said, ["a TOK", "a red house"], CPU)
        predicted = flow.velocity(transformer, noisy.to(dtype), times, 1.0, text, size)
        F.mse_loss(predicted.float(), wanted.float()).backward()
    return {name: p.grad for name, p in trained.items() if p.grad is not None}


def _errors(gradients: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Of each gradient, relative to its size."""
    assert gradients.keys() == wanted.keys()
    return torch.stack([(gradients[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted])


def test_in_float32_every_gradient_is_what_pefts_layer_gives(
    tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    gradients = _gradients(tiny_flux, _by_us, texts, torch.float32)
    wanted = _gradients(tiny_flux, _by_peft, texts, torch.float32)
    assert len(gradients) == 2 * len(adapter.target_modules(tiny_flux))
    assert _errors(gradients, wanted).max() < 1e-5


def test_in_bf16_every_gradient_is_float32s_within_bf16s_rounding_and_no_worse_than_pefts(
    tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    wanted = _gradients(tiny_flux, _by_us, texts, torch.float32)
    gradients = _gradients(tiny_flux, _by_us, texts, torch.bfloat16)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}
    errors = _errors(gradients, wanted)
    theirs = _errors(_gradients(tiny_flux, _by_peft, texts, torch.bfloat16), wanted)
    assert errors.max() < 8 * 2**-8
    assert errors.mean() < 1.1 * theirs.mean()


def test_switched_off_it_is_the_base(tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]) -> None:
    def predict() -> Tensor:
        text = encode.stack(texts, ["a TOK"], CPU)
        with torch.no_grad():
            return flow.velocity(tiny_flux, torch.ones(1, 4, 16), torch.tensor([0.5]), 1.0, text, (4, 4))

    plain = predict()
    for parameter in adapter.attach(tiny_flux, 4, seed=3):
        parameter.data += 0.1
    assert not torch.allclose(predict(), plain)
    tiny_flux.disable_adapters()
    assert torch.equal(predict(), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_its_input_once_and_little_beside_it(dtype: torch.dtype) -> None:
    """What is kept for the backward pass, counted by its storages: q, k and v of one input share that input."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = torch.nn.ModuleList(torch.nn.Linear(64, 64, dtype=dtype) for _ in range(3)).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "1", "2"])
    config._register_custom_module({torch.nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, model)
    weights = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    x = torch.randn(2, 100, 64, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = [layer(x) for layer in model]
    assert [output.shape for output in outputs] == [x.shape] * 3
    masters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert sum(kept.values()) <= x.nbytes + 3 * x.nbytes * 4 // 64 + weights + masters


def in_float8(model: FluxTransformer2DModel, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """As `lora.flux.base` loads it."""
    weights = copy.deepcopy(model).to(dtype).state_dict()
    model = copy.deepcopy(model)
    for name in layer.to_float8(model):
        weights[f"{name}.weight"], weights[f"{name}.scale"] = layer.quantise(weights[f"{name}.weight"])
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def _taken_out(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The same weights in plain layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Float8Linear):
            plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data, plain.bias = module.weight.to(module.scale.dtype) * module.scale, module.bias
            model.set_submodule(name, plain)
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_is_within_a_sixteenth_of_a_weight_and_the_scale_loses_nothing(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0.0
    weight[6, 1:], weight[6, 0] = 0.0, 448.0
    weight = weight.to(dtype)
    narrow, scale = layer.quantise(weight)
    assert (narrow.dtype, narrow.element_size(), scale.dtype, scale.shape) == (layer.FLOAT8, 1, dtype, (64, 1))
    back = narrow.float() * scale.float()
    assert torch.equal(back, (narrow.to(dtype) * scale).float())
    assert torch.equal(back[5:7], weight[5:7].float())
    bound = torch.maximum(weight.float().abs() / 16, scale.float() * 2**-10)
    assert ((back - weight.float()).abs() <= bound).all()
    # Half of what e4m3 holds, or more, is used in every row but the empty one.
    used = narrow.float().abs().amax(dim=1)
    assert ((used >= layer.LARGEST / 2) | (used == 0)).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_float8_base_gradients_are_those_on_the_weights_that_it_holds(
    checkpointing: bool, tiny_flux: FluxTransformer2DModel, texts: dict[str, Text]
) -> None:
    narrow = in_float8(copy.deepcopy(tiny_flux).bfloat16().float())
    plain = _taken_out(narrow)
    if checkpointing:
        narrow.enable_gradient_checkpointing()
    gradients = _gradients_on(narrow, _by_us, texts, torch.float32)
    assert _errors(gradients, _gradients_on(plain, _by_us, texts, torch.float32)).max() < 1e-5
    # And not far from those of the whole base: its weights are off by 2.6 % of themselves on average.
    assert _errors(gradients, _gradients(tiny_flux, _by_us, texts, torch.float32)).max() < 0.25


def test_in_float8_attention_and_mlp_take_a_byte_a_weight_and_nothing_else_is_touched(
    tiny_flux: FluxTransformer2DModel,
) -> None:
    narrow = in_float8(tiny_flux, torch.bfloat16)
    found = {name for name, module in narrow.named_modules() if isinstance(module, Float8Linear)}
    assert found == set(adapter.target_modules(tiny_flux))
    saved = sum(outputs * inputs - 2 * outputs for outputs, inputs in map(adapter.shapes(narrow).get, found))

    def held(model: FluxTransformer2DModel) -> int:
        return sum(tensor.nbytes for tensor in model.state_dict().values())

    assert held(narrow) == held(copy.deepcopy(tiny_flux).bfloat16()) - saved
    trained = adapter.attach(narrow, 4, seed=3)
    plain = adapter.attach(copy.deepcopy(tiny_flux).bfloat16(), 4, seed=3)
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained, plain, strict=True))


def test_a_float8_layer_without_a_lora_passes_the_gradient_on_and_keeps_only_what_it_holds() -> None:
    plain = torch.nn.Linear(64, 32).requires_grad_(False)
    narrow = Float8Linear(plain)
    weight, scale = layer.quantise(plain.weight)
    narrow.load_state_dict({"weight": weight, "scale": scale, "bias": plain.bias}, assign=True)
    kept = []
    x = torch.randn(2, 5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        outputs = narrow(x)
    wide = weight.float() * scale
    assert torch.equal(outputs, F.linear(x, wide, plain.bias))
    [of_x] = torch.autograd.grad(outputs.sum(), x)
    assert torch.allclose(of_x, wide.sum(dim=0).expand_as(x), atol=1e-6)
    assert set(kept) <= {narrow.weight.data_ptr(), narrow.scale.data_ptr()}


def test_the_toy_base_learns_as_with_pefts_own_layer(toy: Base, cpu: Plan) -> None:
    """The losses of the same noise, step by step."""
    look = dataclasses.replace(world.SUBJECTS[0], name="TOK")
    pictures = [(str(i), said, picture) for i, (picture, said) in enumerate(subject_set(look, 8, 1))]
    examples = encode.encode_pictures(toy, cpu, pictures)
    texts = encode.encode_texts(toy, cpu, ["", *(example.caption for example in examples)], toy.t5_tokens)
    rate, _ = recipe.learning_rate_for(recipe.TOY["subject"], toy.width, 16)
    settings = Settings(steps=100, batch_size=1, learning_rate=rate, caption_dropout_rate=0.0, prior_ratio=0.0, seed=1)

    def losses(attach: Callable[[FluxTransformer2DModel], object]) -> Tensor:
        with toy.transformer(cpu) as transformer, torch.random.fork_rng():
            torch.manual_seed(3)
            attach(transformer)
            parameters = [p for p in transformer.parameters() if p.requires_grad]
            reports = fit.fit(transformer, parameters, examples, [], texts, settings)
            return torch.stack([report.loss for report in reports]).unflatten(0, (4, 25)).mean(dim=1)

    ours, theirs = losses(_by_us), losses(_by_peft)
    assert ours[-1] < 0.95 * ours[0]
    assert ((theirs - ours) / ours).abs().max() < 1e-3
