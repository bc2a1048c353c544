"""The ways to train that are compared: this project's, diffusers' with peft's adapter, ostris'."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from bench.speed.case import RANK, Case
from bench.speed.model import Lesson
from lora.flux import adapter, encode, flow, forward, hardware, layer
from lora.flux.hardware import Plan
from lora.training import fit
from lora.training.fit import Settings


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """A way to train."""

    name: str
    what: str
    start: Callable[[FluxTransformer2DModel, Lesson], Iterator[object]]
    """From a transformer of its own to the training: every `next` of it is a step."""
    prior: bool = False
    """Whether a step has the second pass that holds the model to the base."""


def planned(gpu: hardware.Gpu, parameters: int, case: Case) -> Plan:
    """What a training of this case would be planned as."""
    return hardware.plan(gpu, parameters, case.sides, batch_size=case.batch_size, rank=RANK)


def project(plan_for: Callable[[Case], Plan], weight: float) -> Callable[[FluxTransformer2DModel, Lesson], Iterator]:
    """As `lora.job` trains by this plan, holding on to the base with this weight."""

    def start(transformer: FluxTransformer2DModel, lesson: Lesson) -> Iterator[object]:
        plan = plan_for(lesson.case)
        if plan.batch_size < lesson.case.batch_size:
            raise torch.OutOfMemoryError(f"the plan takes no batch of {lesson.case.batch_size}: {plan.reason}")
        if plan.quantised:
            hold_in_float8(transformer)
        if plan.checkpointing:
            transformer.enable_gradient_checkpointing()
        parameters = adapter.attach(transformer, RANK, seed=0)
        settings = Settings(
            steps=1_000_000,
            batch_size=plan.batch_size,
            learning_rate=1e-4,
            caption_dropout_rate=0.05,
            prior_ratio=weight,
            seed=0,
            prior_every=1,  # a training does so in every second step: its mean is one step of "ours" to one without
        )
        priors = lesson.priors if weight else []
        with forward.for_training(transformer):
            yield from fit.fit(transformer, parameters, lesson.examples, priors, lesson.texts, settings, plan.recorded)

    return start


def hold_in_float8(transformer: FluxTransformer2DModel) -> None:
    """As a base is loaded where the plan wants it quantised."""
    weights = transformer.state_dict()
    for name in layer.to_float8(transformer):
        weights[f"{name}.weight"], weights[f"{name}.scale"] = layer.quantise(weights[f"{name}.weight"])
    transformer.load_state_dict(weights, assign=True)


def bare(passes: int) -> Callable[[FluxTransformer2DModel, Lesson], Iterator]:
    """The project's adapter and passes, and forward, backward and optimizer on the same tensors again and again."""

    def start(transformer: FluxTransformer2DModel, lesson: Lesson) -> Iterator[None]:
        parameters = adapter.attach(transformer, RANK, seed=0)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        with forward.for_training(transformer):
            for step in itertools.cycle(fixed_inputs(transformer, lesson)):
                for inputs, target in step[:passes]:
                    F.mse_loss(transformer(**inputs)[0].float(), target).backward()
                optimizer.step()
                optimizer.zero_grad()
                yield

    return start


def of_diffusers(checkpointing: bool) -> Callable[[FluxTransformer2DModel, Lesson], Iterator]:
    """As diffusers' train_dreambooth_lora_flux.py does it in bf16: peft's adapter in the base's type under autocast,
    torch's AdamW, clipped gradients; here at the project's rank and layers, and with nothing to prepare in a step."""

    def start(transformer: FluxTransformer2DModel, lesson: Lesson) -> Iterator[None]:
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        parameters = attach_by_peft(transformer, adapter.target_modules(transformer))
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4)
        for step in itertools.cycle(fixed_inputs(transformer, lesson)):
            inputs, target = step[0]
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=parameters[0].is_cuda):
                prediction = transformer(**inputs)[0]
            F.mse_loss(prediction.float(), target).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield

    return start


def of_ostris(transformer: FluxTransformer2DModel, lesson: Lesson) -> Iterator[None]:
    """As ostris' ai-toolkit does it on Replicate, on a GPU of 100 GB and more.

    A float32 adapter on every linear layer of the blocks, modulation too, gradients clipped, an average of the weights
    (0.99), the loss read every step, checkpointing above batch 1. Its 8-bit AdamW is torch's fused one here, and its
    text encoders, which it runs every step, are left out: both to its favour.
    """
    if lesson.case.batch_size > 1:
        transformer.enable_gradient_checkpointing()
    layers = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name
    ]
    parameters = attach_by_peft(transformer, layers)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for step in itertools.cycle(fixed_inputs(transformer, lesson)):
        inputs, target = step[0]
        loss = F.mse_loss(transformer(**inputs)[0].float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, parameter in zip(average, parameters, strict=True):
                kept.lerp_(parameter, 0.01)
        loss.item()
        yield


def attach_by_peft(transformer: FluxTransformer2DModel, layers: Sequence[str]) -> list[torch.nn.Parameter]:
    """peft's own adapter on these layers, in the base's type; its weights."""
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(layers)))
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def fixed_inputs(transformer: FluxTransformer2DModel, lesson: Lesson) -> list[list[tuple[dict[str, Any], Tensor]]]:
    """For every step of a lap: the transformer's arguments and the target, of the pictures and then of the base's
    drawings."""

    def arguments(noisy: Tensor, size: tuple[int, int], guidance: float) -> dict[str, Any]:
        device = noisy.device
        text = encode.stack(lesson.texts, [lesson.examples[0].caption] * len(noisy), device)
        tokens = text["prompt_embeds"].shape[1]
        scale = torch.full((len(noisy),), guidance, device=device)
        return {
            "hidden_states": noisy,
            "timestep": torch.full((len(noisy),), 0.5, device=device, dtype=noisy.dtype),
            "guidance": scale if transformer.config.guidance_embeds else None,
            "pooled_projections": text["pooled"],
            "encoder_hidden_states": text["prompt_embeds"],
            "txt_ids": flow.text_ids(tokens, device),
            "img_ids": flow.image_ids(*size, device),
            "return_dict": False,
        }

    count, lap = lesson.case.batch_size, []
    drawings = lesson.priors[:count]
    for start in range(0, len(lesson.examples), count):
        pictures = lesson.examples[start : start + count]
        noisy = encode.batched([picture.mean for picture in pictures], transformer.device)
        of_pictures = arguments(noisy, pictures[0].size, flow.TRAINING_GUIDANCE), noisy.float()
        kept = encode.batched([drawing.noisy for drawing in drawings], transformer.device)
        of_drawings = arguments(kept, drawings[0].size, flow.TRAINING_GUIDANCE), kept.float()
        lap.append([of_pictures, of_drawings])
    return lap


def ways_on_a_gpu(gpu: hardware.Gpu, parameters: int) -> list[Way]:
    def plan_for(case: Case, **changes: bool) -> Plan:
        return dataclasses.replace(planned(gpu, parameters, case), **changes)  # type: ignore[arg-type]

    eager = functools.partial(plan_for, recorded=False)
    small = functools.partial(plan_for, quantised=True, checkpointing=True)
    return [
        Way(name="ours", what="this project's step that holds to the base", start=project(plan_for, 1.0), prior=True),
        Way(name="no-prior", what="this project, preservation off", start=project(plan_for, 0.0)),
        Way(name="eager", what="the same, kernel by kernel", start=project(eager, 0.0)),
        Way(name="float8", what="the same as on 24 GB: float8 weights, checkpointing", start=project(small, 0.0)),
        Way(name="peft", what="diffusers' model, peft's adapter in bf16", start=of_diffusers(False)),
        Way(name="peft-checkpointing", what="the same with checkpointing", start=of_diffusers(True)),
        Way(name="ostris", what="float32 adapter on every layer, average of the weights", start=of_ostris),
    ]


def on_a_cpu(case: Case) -> Plan:
    return Plan(device="cpu", dtype=torch.float32, checkpointing=False, reason="", batch_size=case.batch_size)


def ways_on_a_cpu() -> list[Way]:
    return [
        Way(name="no-prior", what="this project, preservation off", start=project(on_a_cpu, 0.0)),
        Way(name="bare", what="forward, backward, optimizer", start=bare(1)),
        Way(name="ours", what="this project's step that holds to the base", start=project(on_a_cpu, 1.0), prior=True),
        Way(name="bare-prior", what="both forwards and backwards, optimizer", start=bare(2), prior=True),
        Way(name="peft", what="diffusers' model, peft's adapter", start=of_diffusers(False)),
    ]


def steps_of(way: Way, transformer: FluxTransformer2DModel, lesson: Lesson) -> Iterator[object]:
    """The way's steps, so that they run on Hopper, too."""
    with in_one_layout(transformer):
        yield from way.start(transformer, lesson)


@contextlib.contextmanager
def in_one_layout(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """Within it the gradient of every attention's output is contiguous, which diffusers' own model lacks on Hopper: see
    `lora.flux.forward`."""
    attentions = [block.attn for block in transformer.single_transformer_blocks]
    hooks = [attention.register_forward_hook(_contiguous_gradient) for attention in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _contiguous_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return _ContiguousGradient.apply(output)


class _ContiguousGradient(torch.autograd.Function):
    """The tensor itself; its gradient in memory row after row, copied where it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
