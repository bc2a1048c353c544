"""The plan for machines that are not here."""

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from bench import step
from lora.flux import adapter, hardware, layer
from lora.flux.hardware import FLUX_DEV, GIB, Gpu, Plan
from lora.training.graphs import Passes
from lora.training.masters import Masters
from lora.training.ranks import ALONE


def _plan(gib: float, **changes: Any) -> Plan:
    wanted = {"resolutions": (512, 768, 1024), "batch_size": 1, "rank": 16} | changes
    gpu = Gpu(name="NVIDIA X", memory=round(gib * GIB))
    return hardware.plan(gpu, FLUX_DEV, **wanted)


@pytest.mark.parametrize(
    ("gpu", "gib", "changes", "quantised", "checkpointing", "batch_size"),
    [
        ("H200", 139.8, {}, False, False, 1),
        ("H200", 139.8, {"batch_size": 3}, False, False, 3),
        ("H200", 139.8, {"batch_size": 8}, False, True, 8),
        ("H100 80GB", 79.1, {}, False, False, 1),
        ("H100 80GB", 79.1, {"rank": 128}, False, False, 1),
        ("H100 80GB", 79.1, {"batch_size": 4}, False, True, 4),
        ("H100 80GB", 79.1, {"batch_size": 4, "resolutions": (512,)}, False, False, 4),
        ("L40S", 44.4, {}, False, True, 1),
        ("L40S", 44.4, {"batch_size": 4}, False, True, 4),
        ("L40S", 44.4, {"resolutions": (512,)}, False, False, 1),
        ("A100 40GB", 39.4, {}, False, True, 1),
        ("RTX 5090", 31.4, {}, False, True, 1),
        ("RTX 4090", 23.6, {}, True, True, 1),
        ("RTX 4090", 23.6, {"batch_size": 8}, True, True, 2),
        ("RTX 4090", 23.6, {"rank": 64, "resolutions": (512,)}, True, True, 1),
        ("A10G", 22.1, {}, True, True, 1),
    ],
)
def test_the_plan_is_the_fastest_that_fits_the_memory(
    gpu: str,
    gib: float,
    changes: dict[str, Any],
    quantised: bool,
    checkpointing: bool,
    batch_size: int,
) -> None:
    plan = _plan(gib, **changes)
    assert (plan.quantised, plan.checkpointing, plan.batch_size) == (quantised, checkpointing, batch_size), gpu
    assert (plan.device, plan.dtype) == ("cuda", torch.bfloat16)
    assert f"NVIDIA X has {gib:.0f} GiB" in plan.reason
    assert ("float8" in plan.reason, "recomputed" in plan.reason) == (quantised, checkpointing)
    assert (f"batch_size {batch_size}, since" in plan.reason) == (batch_size < changes.get("batch_size", 1))
    assert "\n" not in plan.reason


def test_a_gpu_that_cannot_hold_the_weights_is_refused_with_the_figures() -> None:
    with pytest.raises(ValueError, match=r"NVIDIA X has 16 GiB.* needs 20 GiB .*24 GB or more"):
        _plan(16)


@pytest.mark.parametrize(
    ("gpu", "gib", "changes", "quantised", "checkpointing", "batch_size"),
    [
        ("H200", 139.8, {"batch_size": 2}, False, False, 2),
        ("H100 80GB", 79.1, {}, False, False, 1),
        ("H100 80GB", 79.1, {"rank": 128, "recordings": 40}, False, False, 1),
        ("H100 80GB", 79.1, {"batch_size": 4}, False, True, 4),
        ("RTX PRO 5000", 47.5, {}, False, True, 1),
        ("L40S", 44.4, {}, True, True, 1),
    ],
)
def test_a_full_fine_tuning_takes_a_gpu_of_80_gb_whole_and_of_48_with_blocks_recomputed(
    gpu: str, gib: float, changes: dict[str, Any], quantised: bool, checkpointing: bool, batch_size: int
) -> None:
    plan = _plan(gib, full=True, **changes)
    assert (plan.quantised, plan.checkpointing, plan.batch_size) == (quantised, checkpointing, batch_size), gpu
    assert not plan.recorded, "a step within the backward pass is not recorded"
    assert "the change of the layers' weights in bf16 among them" in plan.reason


def test_a_full_fine_tuning_that_does_not_fit_is_refused_by_name_and_a_lora_is_not() -> None:
    with pytest.raises(ValueError, match=r"^finetune_type: NVIDIA X has 31 GiB, and full needs 3\d GiB .* at lora$"):
        _plan(31.4, full=True, resolutions=(512,), rank=16)
    _plan(31.4)


def test_what_is_counted_on_flux_1_dev_is_what_it_has() -> None:
    """The constants, from the model's own modules."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**step.FLUX_DEV).bfloat16()
    assert sum(p.numel() for p in transformer.parameters()) == FLUX_DEV
    trained = [transformer.get_submodule(name).weight for name in adapter.target_modules(transformer)]
    assert 2 * sum(weight.numel() for weight in trained) == pytest.approx(hardware.CHANGE * FLUX_DEV)
    plain = sum(p.nbytes for p in transformer.parameters())
    layer.to_float8(transformer)
    held = sum(tensor.nbytes for tensor in transformer.state_dict().values())
    assert held < 0.65 * plain
    assert held == pytest.approx(hardware.BYTES_IN_FLOAT8 * FLUX_DEV, rel=1e-3)


def test_what_is_counted_for_each_weight_of_the_lora_is_what_the_training_keeps_of_it() -> None:
    weight = torch.nn.Parameter(torch.ones(1000, 100, dtype=torch.bfloat16))
    passes = Passes([weight], torch.Generator())
    masters = Masters([weight], passes, ALONE, rows=2, learning_rate=1e-4, weight_decay=0, epsilon=1e-8, ema_decay=0)
    masters.move(("any", lambda x: (weight * x).sum(), [[torch.ones(100)]]), None, 1e-4, None)
    moments = [masters._optimizer.state[own][name] for own in masters.weights for name in ("exp_avg", "exp_avg_sq")]
    kept = [weight, *masters.weights, masters._flat, *moments, *passes.gradients]
    assert sum(tensor.nbytes for tensor in kept) / weight.numel() == pytest.approx(
        hardware.ADAPTER * 16 * FLUX_DEV / 65_372_160, rel=1e-3
    )


def test_without_a_gpu_it_is_float32_on_the_cpu_and_says_so() -> None:
    plan = hardware.plan(None, 2_000_000, (96,), batch_size=4, rank=16)
    assert (plan.device, plan.dtype, plan.batch_size) == ("cpu", torch.float32, 4)
    assert (plan.checkpointing, plan.quantised, plan.recorded) == (False, False, False)
    assert "no GPU" in plan.reason


def test_when_the_memory_runs_out_it_tries_one_thing_after_the_other_and_gives_up_last() -> None:
    plan: Plan | None = _plan(140, batch_size=3)
    seen = []
    while plan:
        seen.append((plan.checkpointing, plan.batch_size, plan.quantised, plan.recorded))
        plan = hardware.safer(plan)
    assert seen == [
        (False, 3, False, True),
        (True, 3, False, True),
        (True, 1, False, True),
        (True, 1, True, True),
        (True, 1, True, False),
    ]


def test_what_recordings_keep_is_in_the_plan_and_where_there_is_no_room_the_passes_are_run() -> None:
    """A 4090 has room for those of phone photographs, and not for any nine sizes and three of drawings."""
    assert _plan(23.6, recordings=4).recorded
    assert "1.6 of them to record 4 passes" in _plan(23.6, recordings=4).reason
    plan = _plan(23.6, recordings=12)
    assert (plan.quantised, plan.checkpointing, plan.recorded, plan.batch_size) == (True, True, False, 1)
    assert "without recording its 12 passes, for which there is no room" in plan.reason
    assert _plan(79.1, recordings=12).recorded


def _raised(*messages: str) -> RuntimeError:
    """The last of these errors, raised while each before it was handled, as torch's recording does on its way out."""
    try:
        if len(messages) > 1:
            try:
                raise _raised(*messages[:-1])
            finally:
                raise RuntimeError(messages[-1])
        raise RuntimeError(messages[0])
    except RuntimeError as error:
        return error


def test_a_recording_that_ran_out_of_memory_is_told_from_one_of_what_cannot_be_recorded() -> None:
    invalid = "CUDA error: operation failed due to a previous error during capture (cudaErrorStreamCaptureInvalidated)"
    forbidden = "CUDA error: operation not permitted when stream is capturing (cudaErrorStreamCaptureUnsupported)"
    assert hardware.is_capture_out_of_memory(_raised(invalid))
    assert hardware.is_capture_out_of_memory(_raised("CUDA out of memory. Tried to allocate 2 GiB", invalid))
    assert not hardware.is_capture_out_of_memory(_raised(forbidden, invalid))
    assert not hardware.is_capture_out_of_memory(_raised("CUDA error: device-side assert triggered"))
    assert hardware.is_out_of_memory(_raised("CUDA out of memory. Tried to allocate 2 GiB", invalid))


def test_memory_that_ran_out_is_known_whoever_says_it() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ):
        assert hardware.is_out_of_memory(error)
    assert not hardware.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
