"""A training's steps on a device that is not the CPU, without a GPU: on torch's meta device, which has shapes and types
but no numbers. What mixes devices fails there, and so does what waits for the device, as `.item()` does.

What only a real device has is left out: its own generator and fused AdamW.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.flux import adapter, forward
from lora.flux.encode import Example, Text
from lora.training import fit, full, prior
from lora.training.balance import Balance
from lora.training.graphs import Passes
from lora.training.masters import Masters, Mover
from lora.training.prompts import Asked
from lora.training.ranks import ALONE
from tests.training.test_fit import SCHEDULER, SETTINGS

DEVICE = torch.device("meta")
GENERATOR = torch.Generator


class _Noise(torch.Generator):
    """A generator as the meta device has none."""

    device = DEVICE  # type: ignore[assignment]

    def __new__(cls, device: object = None) -> "_Noise":
        return super().__new__(cls)


class _Plain(torch.optim.AdamW):
    """Without what the fused one alone takes, which must lie on the device."""

    def __init__(self, weights: list[Tensor], fused: bool, **options: Any) -> None:
        assert fused
        super().__init__(weights, **options)

    def step(self) -> None:  # type: ignore[override]
        broken = self.found_inf  # type: ignore[has-type]
        assert (broken.device, broken.dtype, broken.ndim) == (DEVICE, torch.float32, 0)
        self.found_inf = None
        super().step()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(*arguments: Any, generator: torch.Generator, device: Any = "cpu", **options: Any) -> Tensor:
            assert generator.device == torch.device(device)
            return plain(*arguments, device=device, **options)

        return draw

    for name in ("randn", "rand", "randint"):
        monkeypatch.setattr(torch, name, drawing(getattr(torch, name)))
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": _Noise() if device == DEVICE else GENERATOR(device))
    monkeypatch.setattr(torch.optim, "AdamW", _Plain)
    monkeypatch.setattr(prior, "in_host_memory", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))


def _in_bf16(example: Example) -> Example:
    weights = torch.ones(len(example.mean))
    return dataclasses.replace(example, mean=example.mean.bfloat16(), std=example.std.bfloat16(), weights=weights)


def _masters(parameters: list[torch.nn.Parameter], generator: torch.Generator) -> Masters:
    return Masters(
        parameters,
        Passes(parameters, generator),
        ALONE,
        rows=2,
        learning_rate=1e-4,
        weight_decay=0.1,
        epsilon=1e-8,
        ema_decay=0.9,
    )


@pytest.mark.parametrize(
    ("whole", "checkpointing"), [(False, False), (True, True)], ids=["a LoRA", "whole weights, recomputed"]
)
def test_a_step_stays_on_its_device_and_never_waits_for_it(
    whole: bool,
    checkpointing: bool,
    tiny_flux: FluxTransformer2DModel,
    examples: list[Example],
    texts: dict[str, Text],
) -> None:
    transformer = copy.deepcopy(tiny_flux).to(DEVICE, torch.bfloat16).requires_grad_(False)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    examples = [_in_bf16(example) for example in examples]
    texts = {prompt: {name: tensor.bfloat16() for name, tensor in text.items()} for prompt, text in texts.items()}
    generator = torch.Generator(DEVICE)
    settings = dataclasses.replace(SETTINGS, batch_size=2, uniform_share=0.25, full=whole)
    with forward.for_training(transformer):
        drawn = prior.draw(transformer, texts, ["a VEK"], [(4, 4)], SCHEDULER, 1, drawing_guidance=3.5, steps=2)
        drawn += prior.noised(transformer, texts, [Asked("a VEK", "a TOK")], examples, seed=1)
        parameters = adapter.attach(transformer, 4, seed=3)
        balance = Balance(0.5, 0.5, DEVICE)
        mover: Mover = full.Change(transformer, 1) if whole else _masters(parameters, generator)
        for example, kept in zip(examples[:2], drawn[-2:], strict=True):
            rows = fit.rows_of_examples([example] * 2, [example.caption] * 2, texts)
            loss = functools.partial(fit.picture_loss, transformer, example.size, generator, settings)
            held = functools.partial(fit.prior_loss, transformer, kept.size, 1.0)
            told = mover.move(
                ("pictures", loss, rows), ("drawings", held, fit.rows_of_priors([kept] * 2, texts)), 1e-4, balance
            )
            on = [*told, balance.weight, balance.pictures, mover.skipped, mover.in_a_row]
            assert {(tensor.device, tensor.dtype) for tensor in on if tensor is not None} == {(DEVICE, torch.float32)}
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        mover.go_on(mover.state())
