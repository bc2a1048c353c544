"""A cell's training, by the project's own job: from drawn pictures to the LoRA's file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.lab.cell import LOOKS, TRIGGER, Cell, the_base
from bench.lab.recipes import RECIPES
from lora import job, presets
from lora.file import source, weights
from lora.flux import adapter
from lora.flux.base import Base
from lora.request import TrainRequest
from lora.training import recipe as rows
from script import signature
from toyflux import examples
from toyflux.world import Style

ROOT = Path(__file__).resolve().parents[2]


def default_request(archive: Path, **inputs: Any) -> TrainRequest:
    """The request of `train.py`'s defaults and these inputs."""
    defaults = signature.read(ROOT / "train.py", "train").inputs
    values = {name: defaults[name].default for name in TrainRequest.__dataclass_fields__ if name in defaults}
    values |= dict.fromkeys(("autocaption_prefix", "autocaption_suffix", "preservation", "preview_prompts"), "")
    values |= {"captioning": presets.CAPTIONING[0], "lora_rank": presets.LORA_RANK}
    return TrainRequest(**{**values, "input_images": archive, **inputs})


def request_for(cell: Cell, archive: Path, width: int) -> TrainRequest:
    """The request of a cell: the defaults that stand in `train.py`, the recipe's inputs, and next to no previews."""
    inputs: dict[str, Any] = {
        "trigger_word": TRIGGER,
        "lora_type": cell.kind,
        "captioning": "disabled",
        "training_steps": cell.steps,
        "seed": cell.seed,
        "preview_prompts": "a red circle",
    }
    inputs |= RECIPES[cell.recipe].inputs
    if inputs.get("learning_rate"):
        inputs["learning_rate"] = rows.at_width(inputs["learning_rate"], width)
    else:
        row, _ = rows.choose(the_base().native, cell.kind)
        ours, _ = rows.learning_rate_for(row, width, inputs.get("lora_rank", presets.LORA_RANK))
        if inputs.get("finetune_type") == "full":
            ours, _, _ = rows.of_full(row, width)
        inputs["learning_rate"] = ours * RECIPES[cell.recipe].rate
    return default_request(archive, **inputs)


def gaussian_start(path: Path, flux: Base, request: TrainRequest) -> None:
    """Writes the LoRA that a training goes on from where its recipe starts otherwise than this project's."""
    skeleton = flux.skeleton()
    modules, shapes = adapter.target_modules(skeleton), adapter.shapes(skeleton)
    if request.layers_to_optimize_regex:
        modules = [module for part in adapter.choose(modules, request.layers_to_optimize_regex) for module in part]
    generator, rank = torch.Generator().manual_seed(request.seed or 0), request.lora_rank
    pairs = {
        module: (torch.randn(rank, inputs, generator=generator) / rank, torch.zeros(outputs, rank))
        for module, (outputs, inputs) in shapes.items()
        if module in modules
    }
    weights.write(path, pairs, {})


def train(cell: Cell, folder: Path) -> Path:
    """The safetensors of a cell's training."""
    recipe, look = RECIPES[cell.recipe], replace(LOOKS[cell.look], name=TRIGGER)
    archive = folder / "pictures.zip"
    draw = examples.style_set if isinstance(look, Style) else examples.subject_set
    pictures = draw(look, cell.pictures, cell.seed)  # type: ignore[arg-type]
    if recipe.short_captions:
        short = f"in the style of {TRIGGER}" if isinstance(look, Style) else f"a {TRIGGER}"
        pictures = [(picture, short) for picture, _ in pictures]
    examples.write_zip(archive, pictures)
    flux = the_base()
    request = request_for(cell, archive, flux.width)
    if recipe.gaussian_start:
        start = folder / "start.safetensors"
        gaussian_start(start, flux, request)
        request = replace(request, resume_from=str(start))
    tar = job.run(
        request,
        output=folder,
        flux_base=str(flux.folder),
        captioner=None,
        log=lambda line: None,
        metric=lambda name, value: None,
        changes=recipe.settings,
    )
    return source.fetch(str(tar), folder, "the tar")
