"""What the machine has, and how a training uses it, with the reason in words."""

import dataclasses
import itertools
import os
from collections.abc import Iterator

import torch

GIB = 2**30
FLUX_DEV = 11_901_408_320
"""Parameters of FLUX.1-dev's transformer; what was counted on it is taken in proportion for another base."""
BYTES_IN_FLOAT8 = (8_606_711_808 + 2 * (FLUX_DEV - 8_606_711_808)) / FLUX_DEV
"""Of a parameter on average: attention and MLP of the blocks at one byte (`lora.flux.layer`), all else in bf16."""
KEPT, RECOMPUTED = 28.2 * GIB, 2.6 * GIB
"""Activations that a picture of 1024 x 1024 (4608 tokens) leaves for the backward pass, in bf16: counted by
saved tensors on FLUX.1-dev's shapes. Recomputed, the inputs of 57 blocks and what one of them needs."""
COUNTED_TOKENS = 4608
ADAPTER = 24 * 65_372_160 / 16 / FLUX_DEV
"""Bytes for each parameter of the base and each rank: a float32 weight, its gradients by the pictures and by what
preserves the base, Adam's two means, and once more a weight and its gradient in bf16; there are 65 million at rank 16.
"""
CHANGE = 2 * 8_606_711_808 / FLUX_DEV
"""Bytes for each parameter of the base where the layers' weights are trained (`lora.training.full`): those of attention
and MLP of every block, once more in bf16."""
LORA_OF_IT = 4 * 65_372_160 / 16 / FLUX_DEV
"""For each parameter of the base and each rank: the LoRA that is made of the change, at the most in float32."""
STEP = 2.5 * GIB
"""What its step needs of the widest layer, some seven times its weights in float32 (1.3 GiB on FLUX.1-dev), and the
joined inputs of the single blocks' last layers, which a LoRA keeps in parts (1 GiB for a picture of 1024 x 1024)."""
RESERVE = 1.5 * GIB
"""For CUDA itself, a batch's latents and text embeddings, and room that no tensor fits."""
RECORDING = 0.4 * GIB
"""What the driver keeps of a recorded pass of FLUX.1-dev, some 8,400 kernels, beside its tensors: at the most. A job on
an H100 with seven recordings had 53,301 MiB of the GPU in use, 2.8 GiB more than its tensors and CUDA itself; an older
driver was seen to keep 64 KB a kernel, half a GiB (forums.developer.nvidia.com/t/244901)."""
NVIDIA = ("/dev/nvidiactl", "/usr/lib/wsl/lib/nvidia-smi")
"""One of them is there where a machine has an NVIDIA GPU and its driver; the second in Windows' Linux."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory: int
    """Bytes in all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    device: str
    dtype: torch.dtype
    """Of the frozen base and of all arithmetic; the adapter's own weights are float32 always."""
    checkpointing: bool
    """Recompute each block in the backward pass instead of keeping its activations."""
    reason: str
    quantised: bool = False
    """Hold the weights of attention and MLP in float8; products are made in `dtype` all the same."""
    recorded: bool = False
    """Record the passes of each size of pictures and replay them (`lora.training.graphs`)."""
    batch_size: int = 1
    """What fits of the batch that was asked for."""


def read_gpu() -> Gpu | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Gpu(name=found.name, memory=found.total_memory)


def idle_gpu() -> str | None:
    """What to do about an NVIDIA GPU of this machine that torch cannot use; None where there is none such, or where
    CUDA_VISIBLE_DEVICES hides it."""
    there = any(os.path.exists(sign) for sign in NVIDIA)
    if torch.cuda.is_available() or not there or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if torch.version.cuda is None:
        return f"there is an NVIDIA GPU here, but torch {torch.__version__} is built for the CPU; install a CUDA build"
    return (
        f"there is an NVIDIA GPU here, but torch {torch.__version__} cannot use it: most often its driver is too old"
        f" for CUDA {torch.version.cuda} (nvidia-smi says which CUDA it can do); update the driver"
    )


def plan(
    gpu: Gpu | None,
    weights: int,
    resolutions: tuple[int, ...],
    *,
    batch_size: int,
    rank: int,
    recordings: int = 4,
    full: bool = False,
) -> Plan:
    """How to train on this GPU, from its memory: the first that fits of the ways below, the fastest first.

    `weights` counts the transformer's parameters, `recordings` the passes of a size of their own; with `full` the
    layers' own weights are trained, and nothing is recorded. Raises ValueError where not even the last of the ways
    fits.
    """
    if gpu is None:
        reason = "no GPU, so on the CPU in float32, which is fast enough for a toy base alone"
        return Plan(device="cpu", dtype=torch.float32, checkpointing=False, reason=reason, batch_size=batch_size)
    tokens = (max(resolutions) / 16) ** 2 + 512
    have = f"{gpu.name} has {gpu.memory / GIB:.0f} GiB"
    trained = (CHANGE + LORA_OF_IT * rank) if full else ADAPTER * rank
    reserve = RESERVE + STEP if full else RESERVE
    for fitting, (quantised, checkpointing, recorded) in itertools.product(
        _halvings(batch_size), WAYS_OF_FULL if full else WAYS
    ):
        activations = (RECOMPUTED if checkpointing else KEPT) * tokens / COUNTED_TOKENS * fitting
        kept = activations + RECORDING * recordings * recorded
        needed = reserve + weights * ((BYTES_IN_FLOAT8 if quantised else 2) + trained + kept / FLUX_DEV)
        if needed <= gpu.memory:
            break
    else:
        if full:
            raise ValueError(
                f"finetune_type: {have}, and full needs {needed / GIB:.0f} GiB here even with the base's weights in"
                " float8, every block recomputed and batch_size 1; take a GPU with more memory (48 GB or more for"
                " FLUX.1-dev), set a lower resolution, or leave finetune_type at lora"
            )
        raise ValueError(
            f"{have}, and this training needs {needed / GIB:.0f} GiB even with its weights in float8, every block"
            " recomputed and batch_size 1; take a GPU with more memory (24 GB or more for FLUX.1-dev), or set a lower"
            " lora_rank or resolution"
        )
    reasons = [
        f"{have}, {needed / GIB:.0f} are needed with the base in {'float8' if quantised else 'bf16'}"
        f" and {'each block recomputed in the backward pass' if checkpointing else 'all activations kept'}",
    ]
    if full:
        reasons.append("the change of the layers' weights in bf16 among them")
    elif recorded:
        reasons.append(f"{RECORDING * recordings * weights / FLUX_DEV / GIB:.1f} of them to record {recordings} passes")
    else:
        reasons.append(f"without recording its {recordings} passes, for which there is no room")
    if fitting < batch_size:
        reasons.append(f"batch_size {fitting}, since {batch_size} would not fit")
    return Plan(
        device="cuda",
        dtype=torch.bfloat16,
        checkpointing=checkpointing,
        reason="; ".join(reasons),
        quantised=quantised,
        recorded=recorded,
        batch_size=fitting,
    )


WAYS = ((False, False, True), (False, True, True), (True, True, True), (True, True, False))
"""(quantised, checkpointing, recorded), the fastest first: float8 saves no time, and costs some of the base's
precision. Not to record costs little on a GPU of little room: its kernels take longer than launching them."""
WAYS_OF_FULL = ((False, False, False), (False, True, False), (True, True, False))
"""The same. A step lies within the backward pass, its number and its learning rate with it: that is not recorded."""


def _halvings(batch_size: int) -> list[int]:
    return [batch_size >> times for times in range(batch_size.bit_length())]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether it says, or what it came of, that the GPU's memory ran out: torch's allocator has a class for it, CUDA's
    libraries words."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return any(isinstance(e, torch.OutOfMemoryError) or any(word in str(e) for word in words) for e in _chain(error))


def is_capture_out_of_memory(error: BaseException) -> bool:
    """Whether a recording broke off because the memory ran out.

    torch then gives cached memory back to make room, which CUDA forbids meanwhile: the recording becomes invalid, and
    of the memory nothing is said (pytorch/pytorch#187795). What may not be recorded breaks one off too, but it is named
    in the chain of errors.
    """
    told = " ".join(str(e) for e in _chain(error))
    forbidden = ("not permitted", "StreamCaptureUnsupported", "StreamCaptureIsolation", "StreamCaptureImplicit")
    invalid = "StreamCaptureInvalidated" in told or "due to a previous error during capture" in told
    return is_out_of_memory(error) or (invalid and not any(word in told for word in forbidden))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def safer(plan: Plan) -> Plan | None:
    """What to try when the memory ran out all the same: recomputing, half the batch, float8, no recordings; or None."""
    if not plan.checkpointing:
        reason = "each block is recomputed in the backward pass"
        plan = dataclasses.replace(plan, checkpointing=True)
    elif plan.batch_size > 1:
        plan = dataclasses.replace(plan, batch_size=plan.batch_size // 2)
        reason = f"batch_size {plan.batch_size}"
    elif not plan.quantised:
        plan = dataclasses.replace(plan, quantised=True)
        reason = "the base's weights are held in float8"
    elif plan.recorded:
        plan = dataclasses.replace(plan, recorded=False)
        reason = "the passes are not recorded"
    else:
        return None
    return dataclasses.replace(plan, reason=f"{reason}, since the memory ran out")
