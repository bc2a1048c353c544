"""A schnell for the toy base: its transformer without guidance, and a scheduler that does not shift, as schnell's."""

import json
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from lora.flux.base import TOY


def write(folder: Path) -> None:
    """Writes transformer and scheduler below `folder` in diffusers' layout."""
    full = FluxTransformer2DModel.from_pretrained(TOY, subfolder="transformer", dtype=torch.float32)
    without = FluxTransformer2DModel.from_config({**full.config, "guidance_embeds": False})
    without.load_state_dict({k: v for k, v in full.state_dict().items() if "guidance_embedder" not in k})
    without.save_pretrained(folder / "transformer")
    config = json.loads((TOY / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    (folder / "scheduler").mkdir(exist_ok=True)
    text = json.dumps({**config, "use_dynamic_shifting": False, "shift": 1.0})
    (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
