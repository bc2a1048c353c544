"""FLUX.1-schnell beside the base: its transformer and its scheduler, on the base's own autoencoder and text encoders.

Those are the same files in FLUX.1-dev and FLUX.1-schnell, so that a third of the memory is needed once.
"""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from lora import wait

STEPS = 4
TOKENS = 256
"""Of T5 (black-forest-labs/FLUX.1-schnell's model card)."""
WEIGHTS = "black-forest-labs/FLUX.1-schnell"


def called(name: str) -> str:
    """What to call the weights `name`: the id on the Hub, or the folder's name without the way to it."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def open_beside(base: FluxPipeline, name: str | None, device: str | None) -> FluxPipeline:
    """A pipeline of the transformer and scheduler below `name`, a folder or an id on the Hub, and all else of `base`.

    The transformer goes to `device`; None leaves it on the CPU. Raises ValueError that names SCHNELL where there are
    no such weights, and where they do not fit the base's text encoders and autoencoder.
    """
    if not name:
        raise ValueError(
            "model: the weights of schnell are not here; set the variable SCHNELL to a folder in diffusers' layout or"
            f" to {WEIGHTS}, or draw with model dev"
        )

    def load() -> tuple[FluxTransformer2DModel, FlowMatchEulerDiscreteScheduler]:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(name, subfolder="scheduler")
        transformer = FluxTransformer2DModel.from_pretrained(
            name, subfolder="transformer", dtype=base.transformer.dtype, use_safetensors=True
        )
        return transformer, scheduler

    try:
        transformer, scheduler = wait.interruptibly(load)
    except (OSError, ValueError, RuntimeError, SafetensorError, HFValidationError) as error:
        told = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"model: the weights of schnell, {called(name)[:100]!r} in SCHNELL, cannot be loaded ({told}); name a"
            f" folder with transformer/ and scheduler/ in diffusers' layout, or {WEIGHTS}"
        ) from error
    for size in ("in_channels", "joint_attention_dim", "pooled_projection_dim"):
        theirs, ours = transformer.config[size], base.transformer.config[size]
        if theirs != ours:
            raise ValueError(
                f"model: the weights in SCHNELL are for another base than this one ({size} {theirs}, here {ours})"
            )
    transformer.eval().requires_grad_(False)
    parts = {**base.components, "scheduler": scheduler}
    parts["transformer"] = transformer if device is None else transformer.to(torch.device(device))
    pipeline = FluxPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
