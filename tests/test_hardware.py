"""The plan for machines that are not here."""

import pytest
import torch

from lora import hardware
from lora.hardware import GIB, Gpu
from tests.test_request import a_request

FLUX = 11_901_408_320
"""Parameters of FLUX.1-dev's transformer."""


@pytest.mark.parametrize(
    ("name", "gib", "resolutions", "batch_size", "checkpointing"),
    [
        ("NVIDIA H200", 140, (512, 768, 1024), 1, False),
        ("NVIDIA H100 80GB HBM3", 80, (512, 768, 1024), 1, False),
        ("NVIDIA H100 80GB HBM3", 80, (512, 768, 1024), 4, True),
        ("NVIDIA L40S", 48, (512, 768, 1024), 1, True),
        ("NVIDIA L40S", 48, (512,), 1, False),
    ],
)
def test_the_plan_follows_the_memory(
    tmp_path, name: str, gib: int, resolutions: tuple[int, ...], batch_size: int, checkpointing: bool
) -> None:
    gpu = Gpu(name=name, memory=gib * GIB, capability=(9, 0))
    plan = hardware.plan(gpu, a_request(tmp_path, batch_size=batch_size), FLUX, resolutions)
    assert (plan.device, plan.dtype, plan.checkpointing) == ("cuda", torch.bfloat16, checkpointing)
    assert name in plan.reason
    assert f"{gib} GiB" in plan.reason


def test_a_gpu_that_cannot_hold_the_weights_is_refused_with_the_figures(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"need 22 GiB.*RTX 4090 has 24 GiB"):
        hardware.plan(Gpu(name="RTX 4090", memory=24 * GIB, capability=(8, 9)), a_request(tmp_path), FLUX, (512,))


def test_without_a_gpu_it_is_float32_on_the_cpu_and_says_so(tmp_path) -> None:
    plan = hardware.plan(None, a_request(tmp_path), 2_000_000, (96,))
    assert (plan.device, plan.dtype) == ("cpu", torch.float32)
    assert "no GPU" in plan.reason


def test_when_the_memory_runs_out_it_recomputes_then_halves_the_batch_then_gives_up(tmp_path) -> None:
    first = hardware.plan(Gpu(name="H100", memory=80 * GIB, capability=(9, 0)), a_request(tmp_path), FLUX, (512,))
    assert not first.checkpointing
    second = hardware.safer(first, 3)
    assert second is not None
    assert (second[0].checkpointing, second[1]) == (True, 3)
    third = hardware.safer(*second)
    assert third is not None
    assert (third[0].checkpointing, third[1]) == (True, 1)
    assert hardware.safer(*third) is None
