"""What a version of diffusers makes of a LoRA's file: run by the Python of that version's environment.

load_lora.py TRANSFORMER LORA OUTPUT writes one prediction of the transformer without the LoRA, and one with it.
"""

import sys

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

BATCHED_IDS = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 31)


def main(folder: str, lora: str, output: str) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(folder).eval()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 8, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator),
        "pooled_projections": torch.randn(1, 12, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.arange(24.0).reshape(8, 3),
    }
    if BATCHED_IDS:
        inputs |= {key: inputs[key][None] for key in ("txt_ids", "img_ids")}
    with torch.no_grad():
        without = transformer(**inputs, return_dict=False)[0]
        pipeline.load_lora_weights(lora)
        with_it = transformer(**inputs, return_dict=False)[0]
    torch.save({"version": diffusers.__version__, "without": without, "with": with_it}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
