"""The training loop that all stages of the base's build share: checkpoints, workers, a mean of the weights.

Every step draws from its own seed, and a stage goes on where it was stopped.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from toyflux.muon import Muon


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a stage runs: this process's place among its workers, and the device."""

    rank: int
    workers: int
    device: str
    work: Path


def fit(
    name: str,
    machine: Machine,
    module: nn.Module,
    loss_of: Callable[[int, random.Random], Tensor],
    *,
    steps: int,
    lr: float,
    matrices: Sequence[nn.Parameter] = (),
    averaging: float = 0.998,
    hold: float = 0.0,
    log: Callable[[str], None] = print,
) -> None:
    """Train the module's parameters on `loss_of(step, rng)` and leave their moving average in it.

    Warm-up over 2 % of the steps, then (after a share `hold` of them) half a cosine down to 2 % of `lr`. `matrices` go
    to Muon at 2.5 times the rate, the rest to AdamW. A checkpoint every 200 steps in the work folder; a stage that is
    done returns at once.
    """
    path = machine.work / f"{name}.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    ]
    if matrices:
        optimizers.append(Muon(list(matrices), lr=lr))
    average = [p.detach().clone() for p in parameters]
    first = 0
    if path.exists():
        saved = torch.load(path, map_location=machine.device)
        first = saved["step"]
        for target, source in ((parameters, saved["parameters"]), (average, saved["average"])):
            for a, b in zip(target, source, strict=True):
                a.data.copy_(b)
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    started, smooth = time.monotonic(), 0.0
    for step in range(first, steps):
        progress = max(0.0, step / steps - hold) / (1 - hold)
        rate = lr * min(1.0, (step + 1) / (0.02 * steps)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (2.5 if isinstance(optimizer, Muon) else 1)
        torch.manual_seed(hash_of(name, step, machine.rank))
        loss = loss_of(step, random.Random(f"{name} {step} {machine.rank}"))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if machine.workers > 1:
            flat = torch.cat(
                [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
            )
            dist.all_reduce(flat)
            flat /= machine.workers
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = g.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list[Tensor](parameters), 1 - min(averaging, (1 + step) / (10 + step)))
        value = float(loss.detach())
        smooth = value if step == first else 0.98 * smooth + 0.02 * value
        if machine.rank == 0 and (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            left = pace * (steps - step - 1) / 60
            log(f"{name} {step + 1}/{steps} loss {smooth:.4f} lr {rate:.1e} {pace:.3f} s/it {left:.1f} min left")
        if machine.rank == 0 and ((step + 1) % 200 == 0 or step + 1 == steps):
            state = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(
                {"step": step + 1, "parameters": parameters, "average": average, "optimizers": state},
                path.with_suffix(".new"),
            )
            path.with_suffix(".new").replace(path)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)


def hash_of(name: str, step: int, rank: int) -> int:
    """A seed for one step of one worker."""
    return random.Random(f"seed {name} {step} {rank}").getrandbits(48)
