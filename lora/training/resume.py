"""The LoRA that a training goes on from (`resume_from`): fetched, and held against the base and the request."""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers import FluxTransformer2DModel

from lora.file import source, weights
from lora.file.weights import Weights
from lora.flux import adapter
from lora.request import TrainRequest
from lora.result import record


def fetch(request: TrainRequest, token: str | None, folder: Path) -> tuple[Weights, str]:
    """The LoRA of `resume_from`, and the hash of its file; raises ValueError that names the input."""
    assert request.resume_from is not None
    folder.mkdir()
    file = source.fetch(request.resume_from, folder, "resume_from", token)
    try:
        return weights.read(file), record.file_hash(file)
    except ValueError as error:
        raise ValueError(f"resume_from: {error}") from error


def check(
    earlier: Weights,
    request: TrainRequest,
    modules: Sequence[str],
    skeleton: FluxTransformer2DModel,
    log: Callable[[str], None],
) -> None:
    """Raises ValueError where the earlier LoRA does not belong on this base, or a training cannot go on from it."""
    faults = weights.misfits(earlier, adapter.shapes(skeleton))
    if request.training_steps != 0:
        faults += adapter.differences(earlier.pairs, modules, request.lora_rank)
    if faults:
        raise ValueError("\n  ".join(["resume_from: this LoRA does not fit:", *faults]))
    log(f"the earlier LoRA: {len(earlier.pairs)} layers of rank {', '.join(map(str, earlier.ranks))}")
