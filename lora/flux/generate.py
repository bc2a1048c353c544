"""Prompts to pictures, by diffusers' own pipelines, with one LoRA or several.

Names and defaults follow Replicate's flux-dev-lora. Every picture has a seed of its own, so that it can be drawn again
alone. Whoever asks has them drawn one at a time, and memory does not grow with their number; a training's previews are
small, and drawn a few together.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from torch import Tensor

from lora.flux import fitting

STEPS = 28
GUIDANCE = 3.5
"""What FLUX.1-dev is drawn with."""
STRENGTH = 0.8
"""Of a prompt over the picture that the drawing starts from; at 1 nothing of the picture is left."""
AT_ONCE = 4
"""Previews."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA to draw with."""

    name: str
    """What messages call it."""
    file: Path
    """A safetensors file; see `lora.file.source`."""
    scale: float


def open_pipeline(folder: Path, device: str, dtype: torch.dtype, offload: bool) -> FluxPipeline:
    """A base in diffusers' layout, whole, on `device`; where `offload`, a part is there only while it is needed."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def pipeline_of(
    transformer: FluxTransformer2DModel, vae: AutoencoderKL, scheduler: Mapping[str, object]
) -> FluxPipeline:
    """A pipeline of parts already loaded, for prompts already encoded; `scheduler` is the base's scheduler config."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def put_on(pipeline: FluxPipeline, loras: Sequence[Lora], log: Callable[[str], None]) -> None:
    """Makes the pipeline draw with exactly these LoRAs, each at its scale; with none, as the base alone.

    What the base does not have, or has in another size, is left out with a warning that names it. Raises ValueError
    where nothing of a LoRA is left, and for a file that is none.
    """
    ready = [(lora, fitting.read(pipeline, lora.name, lora.file, log)) for lora in loras]
    pipeline.unload_lora_weights()
    scales: dict[str, float] = {}
    for number, (lora, own) in enumerate(ready):
        for part, tensors in enumerate(fitting.adapters(own)):
            with warnings.catch_warnings():  # peft warns of every adapter after the first
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                pipeline.load_lora_weights(tensors, adapter_name=f"lora_{number}_{part}")
            scales[f"lora_{number}_{part}"] = lora.scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))
    for lora, own in ready:
        text = f" and {len(own.text)} of the CLIP text encoder" if own.text else ""
        log(f"{lora.name}: {len(own.pairs)} layers{text} at scale {lora.scale:g}")


def rescale(pipeline: FluxPipeline, scales: Sequence[float]) -> None:
    """Gives the LoRAs that `put_on` put on other scales, in their order; nothing is loaded."""
    called = sorted({name for names in pipeline.get_list_adapters().values() for name in names})
    pipeline.set_adapters(called, [scales[int(name.split("_")[1])] for name in called])


@torch.no_grad()
def draw(
    pipeline: FluxPipeline,
    prompt: str | Mapping[str, Tensor],
    size: tuple[int, int],
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    tokens: int = 512,
    start: Image.Image | None = None,
    strength: float = STRENGTH,
    mask: Image.Image | None = None,
) -> Image.Image:
    """One picture of `size` (width, height) in pixels. The noise is drawn on the CPU: a seed means the same anywhere.

    `prompt` is text, of which T5 reads `tokens`, or the embeddings `prompt_embeds` (T, D) and `pooled` (P,) of one.
    Where there is a picture to `start` from, it must have this size, and a `mask` with it too: then only its white is
    drawn anew, in the latents (`lora.flux.canvas` keeps the rest in pixels). Raises ValueError where at this strength
    nothing would be drawn.
    """
    if isinstance(prompt, str):
        asked: dict[str, object] = {"prompt": prompt, "max_sequence_length": tokens}
    else:
        asked = {
            "prompt_embeds": prompt["prompt_embeds"][None].to(pipeline.transformer.device),
            "pooled_prompt_embeds": prompt["pooled"][None].to(pipeline.transformer.device),
        }
    if start is not None:
        if int(steps - steps * strength) == steps:  # as the pipeline counts
            raise ValueError(f"prompt_strength: at {strength:g} nothing is left to draw; give more than 0")
        kind = FluxImg2ImgPipeline if mask is None else FluxInpaintPipeline
        # Without a dtype it would turn the shared models into float32, for good (huggingface/diffusers#12754).
        pipeline = kind.from_pipe(pipeline, dtype=pipeline.transformer.dtype)
        pipeline.set_progress_bar_config(disable=True)
        asked |= {"image": start, "strength": strength} | ({} if mask is None else {"mask_image": mask})
    return pipeline(
        **asked,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


@torch.no_grad()
def draw_all(
    pipeline: FluxPipeline,
    texts: Sequence[Mapping[str, Tensor]],
    size: tuple[int, int],
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> list[Image.Image]:
    """What `draw` draws of each of these embeddings with its seed, AT_ONCE together: a GPU is far from busy with one."""
    pipeline.vae.enable_slicing()  # what is decoded needs more memory than what is drawn
    device = pipeline.transformer.device
    pictures = []
    for start in range(0, len(texts), AT_ONCE):
        batch = texts[start : start + AT_ONCE]
        pictures += pipeline(
            prompt_embeds=torch.stack([text["prompt_embeds"] for text in batch]).to(device),
            pooled_prompt_embeds=torch.stack([text["pooled"] for text in batch]).to(device),
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + AT_ONCE]],
        ).images
    return pictures
