"""How long a step of the training takes, beside other ways to train the same thing.

`script/bench step`, on a GPU: FLUX.1-dev's transformer at full size with random weights, made on the GPU, and whole
steps (forward, backward, optimizer) of the project's own `lora.training.fit` as a training runs them, beside diffusers'
model with peft's adapter and the way of ostris' trainer: in one run and by turns, so that what slows the machine
slows all.
`script/bench step --toy`, on a CPU: the same on the toy base, beside nothing but forward, backward and optimizer.

The work of a step is counted by a formula (`step_tflop`), which leaves out what is done twice to save memory; its share
is of the rate that large matrix products reach in the same run. With `--json FILE` every case is written as soon as it
is done, and a case that stands in the file is not measured again. Nothing is needed but torch, diffusers, peft,
transformers and this repository.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from lora.flux import adapter, base, encode, flow, forward, hardware, layer
from lora.flux.encode import Example, Text
from lora.flux.hardware import Plan
from lora.training import fit
from lora.training.fit import Settings
from lora.training.prior import Prior

FLUX_DEV: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
"""transformer/config.json of black-forest-labs/FLUX.1-dev."""
T5_TOKENS = 512
RANK = 16
PRIORS = 8
"""More than a batch, fewer than a training's 768: a step takes a few of them, whatever their number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained on: pictures of these sides, in pixels, by turns. A *lap* is one step of each side."""

    sides: tuple[int, ...]
    batch_size: int

    @property
    def name(self) -> str:
        return ",".join(map(str, self.sides)) + (f" batch {self.batch_size}" if self.batch_size > 1 else "")


CASES = (
    # the mixed one first, because it is what a training does
    Case(sides=(512, 768, 1024), batch_size=1),
    Case(sides=(1024,), batch_size=1),
    Case(sides=(768,), batch_size=1),
    Case(sides=(512,), batch_size=1),
    Case(sides=(512,), batch_size=4),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """A case with its data, encoded and on the device."""

    case: Case
    examples: Sequence[Example]
    priors: Sequence[Prior]
    texts: Mapping[str, Text]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """A way to train."""

    name: str
    what: str
    start: Callable[[FluxTransformer2DModel, Lesson], Iterator[object]]
    """From a transformer of its own to the training: every `next` of it is a step."""
    prior: bool = False
    """Whether a step has the second pass that holds the model to the base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One way in one case."""

    case: str
    way: str
    first: float
    """Seconds from the bare transformer to the end of the first lap: the adapter, all recordings, one step a side."""
    rounds: list[list[float]]
    """Seconds a step, for every lap of every turn."""
    processor: list[list[float]]
    """The same by what the process used of the processors: on a GPU, what launching its kernels takes; on a CPU, what
    other processes cannot slow."""
    tflop: float
    """Of a step, by the formula."""
    matrix_rate: float
    """TFLOP/s of large matrix products just before."""
    peak: float | None
    """GB (10⁹ bytes) of the GPU's memory, with the weights; None on a CPU."""
    fault: str = ""
    """Why nothing was measured, where nothing was."""

    @property
    def seconds(self) -> list[float]:
        return sorted(lap for turn in self.rounds for lap in turn)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


# ---------------------------------------------------------------- the model and what it learns


def random_transformer(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """A transformer of this config with the classes' own random weights."""
    with made_there(device, dtype):
        return FluxTransformer2DModel(**config).eval().requires_grad_(False)


@contextlib.contextmanager
def made_there(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Whatever is made meanwhile is made on the device and in the type: no room is needed but for the weights."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def twin(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Another transformer on the same weights: not a byte of theirs is copied."""
    with torch.device("meta"):
        other = FluxTransformer2DModel.from_config(transformer.config)
    other.load_state_dict(transformer.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def make_lesson(case: Case, transformer: FluxTransformer2DModel, text_tokens: int) -> Lesson:
    """Random pictures, base's drawings and texts of the case's shapes; the drawings have its smallest side, as in a
    training."""
    weight, config = next(transformer.parameters()), transformer.config
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    def shape(side: int) -> tuple[int, int]:
        return (side // 16) ** 2, config.in_channels

    caption, small = "a photo of TOK", min(case.sides)
    examples = [
        Example(
            name=f"{number} at {side}x{side}",
            size=(side // 8, side // 8),
            mean=encode.in_host_memory(randn(*shape(side))),
            std=encode.in_host_memory(randn(*shape(side)).abs() / 10),
            caption=caption,
        )
        for side in case.sides
        for number in range(case.batch_size)
    ]
    priors = [
        Prior(
            prompt=caption,
            size=(small // 8, small // 8),
            noisy=encode.in_host_memory(randn(*shape(small))),
            timestep=(n + 1) / PRIORS,
            until=n / PRIORS,
            velocity=encode.in_host_memory(randn(*shape(small))),
        )
        for n in range(PRIORS)
    ]
    texts = {
        prompt: {
            "prompt_embeds": encode.in_host_memory(randn(text_tokens, config.joint_attention_dim)),
            "pooled": encode.in_host_memory(randn(config.pooled_projection_dim)),
        }
        for prompt in ("", caption)
    }
    return Lesson(case=case, examples=examples, priors=priors, texts=texts)


def step_tflop(config: Mapping[str, Any], side: int, batch_size: int, text_tokens: int) -> float:
    """10¹² operations of forward and backward on frozen weights, for one step at a side in pixels.

    The products of a block take 24 d² S + 4 d S² operations forward (a multiply and an add each; d the width, S image
    and text tokens), the first term its linear layers and the second its attention; on FLUX.1-dev's 57 blocks that is
    1368 d² S + 228 d S². Backward, linear layers cost as much once more, because frozen weights have no gradient, and
    attention twice as much. Embedders, modulation and the adapter come to one or two percent, and are left out.
    """
    d = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config["num_single_layers"]
    tokens = (side // 16) ** 2 + text_tokens
    return batch_size * blocks * (2 * 24 * d**2 * tokens + 3 * 4 * d * tokens**2) / 1e12


# ---------------------------------------------------------------- the ways


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


# ---------------------------------------------------------------- measuring


def measure(
    ways: Sequence[Way], transformer: FluxTransformer2DModel, case: Case, text_tokens: int, rounds: int, laps: int
) -> list[Cell]:
    """Every way in one case: first all of them get going, then in every round each has a turn of `laps`.

    A turn's first lap is not counted. A way that does not fit the GPU's memory is left out, and says so.
    """
    device = next(transformer.parameters()).device
    lesson = make_lesson(case, transformer, text_tokens)
    rate = matrix_rate(device)
    running: dict[str, tuple[Iterator[object], int]] = {}
    cells: dict[str, Cell] = {}
    for way in ways:
        tflop = statistics.mean(step_tflop(transformer.config, s, case.batch_size, text_tokens) for s in case.sides)
        if way.prior:
            tflop += step_tflop(transformer.config, min(case.sides), case.batch_size, text_tokens)
        cell = Cell(
            case=case.name,
            way=way.name,
            first=0.0,
            rounds=[],
            processor=[],
            tflop=tflop,
            matrix_rate=rate,
            peak=None,
        )
        try:
            steps, held, first, peak = begin(way, transformer, lesson)
        except torch.OutOfMemoryError:
            cells[way.name] = dataclasses.replace(cell, fault="out of memory")
            continue
        cells[way.name] = dataclasses.replace(cell, first=first, peak=peak)
        running[way.name] = steps, held
        print(f"{case.name}, {way.name}: first lap after {first:.1f} s", flush=True)
    for _ in range(rounds):
        for name, (steps, held) in running.items():
            _settle(device)
            others = _allocated(device) - held
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, processor = turn(steps, laps, len(case.sides), device)
            cells[name].rounds.append(seconds)
            cells[name].processor.append(processor)
            if device.type == "cuda":
                peak = max(cells[name].peak or 0.0, (torch.cuda.max_memory_allocated() - others) / 1e9)
                cells[name] = dataclasses.replace(cells[name], peak=peak)
    return list(cells.values())


def begin(
    way: Way, transformer: FluxTransformer2DModel, lesson: Lesson
) -> tuple[Iterator[object], int, float, float | None]:
    """The way after its first lap; the bytes that are its own between the steps, with the shared weights that it uses;
    its seconds so far, and the most GB so far: what a recording holds for its passes is seen only as it is made."""
    device = next(transformer.parameters()).device
    shared = {parameter.data_ptr(): parameter.nbytes for parameter in transformer.parameters()}
    _settle(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, started = _allocated(device), time.perf_counter()
    own = twin(transformer)
    steps = steps_of(way, own, lesson)
    for _ in lesson.case.sides:
        next(steps)
    _settle(device)
    others = before - sum(shared.get(parameter.data_ptr(), 0) for parameter in own.parameters())
    peak = (torch.cuda.max_memory_allocated() - others) / 1e9 if device.type == "cuda" else None
    return steps, _allocated(device) - others, time.perf_counter() - started, peak


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


def turn(steps: Iterator[object], laps: int, steps_a_lap: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds a step for each of `laps`, after one that is not counted: by the device's own clock, without a wait
    between the steps that the training would not have, and of the processors."""
    marks, processor = [], []
    for _ in range(laps + 1):
        for _ in range(steps_a_lap):
            next(steps)
        marks.append(_mark(device))
        processor.append(time.process_time())
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (
        [_between(before, after) / steps_a_lap for before, after in itertools.pairwise(marks)],
        [(after - before) / steps_a_lap for before, after in itertools.pairwise(processor)],
    )


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of products of two large random matrices: bf16 on a GPU, float32 elsewhere; the median of ten."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    marks = []
    for _ in range(14):
        a @ b
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    times = [_between(before, after) for before, after in itertools.pairwise(marks)][3:]
    return 2 * side**3 / statistics.median(times) / 1e12


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


def _settle(device: torch.device) -> None:
    """Nothing under way on a GPU, nothing cached: one way's leftovers are not the next one's burden."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


# ---------------------------------------------------------------- what is said of it


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row for each case and way."""
    rows = [
        "| pictures | way | seconds a step (10 % to 90 %) | of the processors | TFLOP/s | of the matrix rate | peak GB"
        " | first lap, s |",
        "|" + " --- |" * 8,
    ]
    for cell in cells:
        if cell.fault:
            rows.append(f"| {cell.case} | {cell.way} | {cell.fault} | | | | | |")
            continue
        seconds, rate = cell.seconds, cell.tflop / cell.median
        processor = statistics.median(itertools.chain(*cell.processor))
        low, high = seconds[len(seconds) // 10], seconds[-1 - len(seconds) // 10]
        rows.append(
            f"| {cell.case} | {cell.way} | {cell.median:.4f} ({low:.4f} to {high:.4f}) | {processor:.4f} | {rate:.4g}"
            f" | {rate / cell.matrix_rate:.0%} | {'' if cell.peak is None else f'{cell.peak:.1f}'} | {cell.first:.1f} |"
        )
    return "\n".join(rows)


RATIOS = (
    # a way, what it is held against, what is said of the two, and the goal for it in each case: at most so much
    ("ours", "no-prior", "what holding on to the base costs", None),
    ("no-prior", "bare", "what the loop costs", 1.1),
    ("ours", "bare-prior", "what the loop costs, with both passes", 1.1),
    ("no-prior", "eager", "what recordings gain", None),
    ("float8", "no-prior", "what the way for 24 GB costs", None),
    ("no-prior", "peft", "against diffusers without checkpointing", 1 / 1.5),
    ("no-prior", "peft-checkpointing", "against diffusers with checkpointing", None),
    ("no-prior", "ostris", "against the ostris way", 1 / 2),
)
GOALS = {"1024": 0.30, "768": 0.16, "512": 0.085}
"""Seconds a step on an H200, without the prior pass."""
GOAL_THOUSAND = 180.0
"""Seconds for 1000 steps over 512, 768 and 1024, as trained by default."""
GOAL_PEAK = 75.0
"""GB at 1024, so that an 80 GB GPU runs the same plan."""


def verdicts(cells: Sequence[Cell]) -> list[str]:
    """What the cells say of each other, turn against turn, and of the goals; a line each. On a CPU, which others use
    too, by processor time."""
    lines = []
    on_a_gpu = any(cell.peak is not None for cell in cells)
    by_case: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        if not cell.fault:
            by_case.setdefault(cell.case, {})[cell.way] = cell
    for case, found in by_case.items():
        for one, other, what, goal in RATIOS:
            if one in found and other in found:
                ratios = turn_against_turn(found[one].rounds, found[other].rounds)
                if not on_a_gpu:
                    ratios = turn_against_turn(found[one].processor, found[other].processor)
                ratio = statistics.median(ratios)
                reached = "" if goal is None or (other == "peft" and not on_a_gpu) else _reached(ratio, goal, "")
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                lines.append(f"{case}: {one} / {other} = {ratio:.3f} ({spread}), {what}{reached}")
        if on_a_gpu and "no-prior" in found and case in GOALS:
            lines.append(
                f"{case}: {found['no-prior'].median:.3f} s{_reached(found['no-prior'].median, GOALS[case], ' s')}"
            )
        if on_a_gpu and {"ours", "no-prior"} <= found.keys() and case == CASES[0].name:
            held = 1 / Settings.prior_every
            thousand = 1000 * (held * found["ours"].median + (1 - held) * found["no-prior"].median)
            lines.append(f"{case}: {thousand:.0f} s for 1000 steps{_reached(thousand, GOAL_THOUSAND, ' s')}")
        if on_a_gpu and "ours" in found and case == "1024":
            peak = found["ours"].peak or 0.0
            lines.append(f"{case}: {peak:.1f} GB at the most{_reached(peak, GOAL_PEAK, ' GB')}")
    return lines


def turn_against_turn(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(of_a) / statistics.median(of_b) for of_a, of_b in zip(a, b, strict=True)]


def _reached(value: float, goal: float, unit: str) -> str:
    return f"; goal {goal:.3g}{unit}: {'reached' if value <= goal else 'MISSED'}"


# ---------------------------------------------------------------- the command


def read(file: Path | None) -> list[Cell]:
    """The cells that stand in a file of earlier results, if there is one."""
    if file is None or not file.is_file():
        return []
    return [Cell(**cell) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]


def write(file: Path, about: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    content = {**about, "cells": [dataclasses.asdict(cell) for cell in cells]}
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def about_the_machine(device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "command": " ".join(sys.argv[1:]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="on the CPU, with the toy base")
    parser.add_argument("--only", default="", help="cases and ways, separated by semicolons: '1024;ours;ostris'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--laps", type=int, default=5, help="of a turn; a lap is a step of each size")
    parser.add_argument("--json", type=Path, help="write the figures here; cases that stand there are not repeated")
    arguments = parser.parse_args(argv)
    gpu = None if arguments.toy else hardware.read_gpu()
    if gpu is None and not arguments.toy:
        parser.error("there is no GPU here; --toy measures on the CPU")

    if gpu is None:
        flux = base.find(None, None)
        cases = [Case(sides=(flux.native,), batch_size=size) for size in (1, 4)]
        ways, text_tokens = ways_on_a_cpu(), flux.t5_tokens
    else:
        cases, text_tokens = list(CASES), T5_TOKENS
        with torch.device("meta"):
            parameters = sum(p.numel() for p in FluxTransformer2DModel(**FLUX_DEV).parameters())
        ways = ways_on_a_gpu(gpu, parameters)
    only = [name.strip() for name in arguments.only.split(";") if name.strip()]
    unknown = set(only) - {case.name for case in cases} - {way.name for way in ways}
    if unknown:
        names = [*(case.name for case in cases), *(way.name for way in ways)]
        parser.error(f"--only: {'; '.join(sorted(unknown))}: not one of {'; '.join(names)}")
    cases = [case for case in cases if case.name in only] or cases
    ways = [way for way in ways if way.name in only] or ways
    for way in ways:
        print(f"{way.name}: {way.what}")

    if gpu is None:
        with flux.transformer(on_a_cpu(cases[0])) as transformer:
            cells = run(ways, transformer, cases, text_tokens, arguments)
    else:
        transformer = random_transformer(FLUX_DEV, torch.device("cuda"), torch.bfloat16)
        cells = run(ways, transformer, cases, text_tokens, arguments)
    print(table(cells), *verdicts(cells), sep="\n")


def run(
    ways: Sequence[Way],
    transformer: FluxTransformer2DModel,
    cases: Sequence[Case],
    text_tokens: int,
    arguments: argparse.Namespace,
) -> list[Cell]:
    """Measures the cases that are not yet in the results file, and writes it after every one of them."""
    cells = read(arguments.json)
    about = about_the_machine(next(transformer.parameters()).device)
    for case in cases:
        there = {cell.way for cell in cells if cell.case == case.name}
        if {way.name for way in ways} <= there:
            continue
        if there:
            raise SystemExit(
                f"{arguments.json} holds other ways of {case.name} ({', '.join(sorted(there))}), and speeds are"
                " compared within one run: name another file, or all ways at once"
            )
        found = measure(ways, transformer, case, text_tokens, arguments.rounds, arguments.laps)
        cells += found
        if arguments.json:
            write(arguments.json, about, cells)
    return cells


if __name__ == "__main__":
    main()
