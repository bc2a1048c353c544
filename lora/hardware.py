"""What the machine has, and how a training uses it, with the reason in words."""

import dataclasses

import torch

from lora.request import TrainRequest

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory: int
    """Bytes in all."""
    capability: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    device: str
    dtype: torch.dtype
    """Of the frozen base; the adapter's weights are float32 always."""
    checkpointing: bool
    """Recompute each block in the backward pass instead of keeping its activations."""
    reason: str


def read_gpu() -> Gpu | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Gpu(name=found.name, memory=found.total_memory, capability=(found.major, found.minor))


def plan(gpu: Gpu | None, request: TrainRequest, weights: int, resolutions: tuple[int, ...]) -> Plan:
    """Chooses type and checkpointing from the GPU's memory.

    `weights` counts the transformer's parameters. Activations kept for the backward pass at FLUX.1-dev's size come to
    some 50 GiB for one picture of 1024 x 1024 with a float32 adapter (counted on diffusers' model), and grow with the
    tokens; a quarter of that is allowed for smaller models, which is never the limit.

    Raises ValueError where the weights alone do not fit.
    """
    if gpu is None:
        reason = "no GPU: on the CPU in float32, which only a toy base makes sense for"
        return Plan(device="cpu", dtype=torch.float32, checkpointing=False, reason=reason)
    base = 2 * weights
    tokens = (max(resolutions) / 16) ** 2 + 512
    activations = request.batch_size * 50 * GIB * (tokens / 4608) * (weights / 11.9e9)
    reserve = 4 * GIB
    have = f"{gpu.name} has {gpu.memory / GIB:.0f} GiB"
    if base + reserve > gpu.memory:
        raise ValueError(
            f"the base's weights need {base / GIB:.0f} GiB in bf16 and some {reserve / GIB:.0f} beside them, but"
            f" {have}; take a GPU with more memory (40 GiB or more for FLUX.1-dev)"
        )
    needed = base + reserve + activations
    checkpointing = needed > gpu.memory
    verdict = "so each block is recomputed in the backward pass" if checkpointing else "so everything is kept"
    reason = f"{have}, {needed / GIB:.0f} would keep all activations in bf16, {verdict}"
    return Plan(device="cuda", dtype=torch.bfloat16, checkpointing=checkpointing, reason=reason)


def safer(plan: Plan, batch_size: int) -> tuple[Plan, int] | None:
    """What to try when the memory ran out all the same: recomputing, else half the batch; None where nothing is."""
    if not plan.checkpointing:
        reason = "each block is recomputed in the backward pass, since the memory ran out"
        return dataclasses.replace(plan, checkpointing=True, reason=reason), batch_size
    if batch_size > 1:
        return dataclasses.replace(
            plan, reason=f"batch_size {batch_size // 2}, since the memory ran out"
        ), batch_size // 2
    return None
