"""A DINOv2 small enough for a test, with random weights, in the files of the real one on the Hub."""

from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

SIDE = 28


def write(folder: Path) -> Path:
    """Writes the model and its preprocessor (resize, centre crop, ImageNet's mean and deviation); the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=SIDE, patch_size=14
        )
        model = Dinov2Model(config)
        for parameter in model.parameters():  # of a size that makes the embedding depend on the picture
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(folder)
    return folder
