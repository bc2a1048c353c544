"""Prompt to picture, by diffusers' own FluxPipeline."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image

from lora.encode import Text

STEPS = 28
GUIDANCE = 3.5
"""What FLUX.1-dev is drawn with: the defaults of Replicate's flux-dev-lora."""


def pipeline_of(transformer: FluxTransformer2DModel, vae: AutoencoderKL, scheduler: dict) -> FluxPipeline:
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


@torch.no_grad()
def draw(
    pipeline: FluxPipeline,
    text: Text,
    size: tuple[int, int],
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Image.Image:
    """One picture of `size` (width, height) in pixels. The noise is drawn on the CPU: a seed means the same anywhere."""
    return pipeline(
        prompt_embeds=text["prompt_embeds"][None],
        pooled_prompt_embeds=text["pooled"][None],
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
