"""A safety checker small enough for a test: a ViT of two thousand weights, taught that green pictures are unsafe."""

from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE = 16


def write(folder: Path, labels: tuple[str, str] = ("normal", "nsfw")) -> None:
    """Writes the model and its preprocessor as a repository on the Hub holds them; the second label is green's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=SIDE,
            patch_size=8,
            hidden_dropout_prob=0.0,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
        model = ViTForImageClassification(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(80):
            colours = torch.rand(32, 3, 1, 1) * 2 - 1
            colours[:16] = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1)
            pictures = (colours + 0.1 * torch.randn(32, 3, SIDE, SIDE)).clamp(-1, 1)
            green = (colours - torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1)).flatten(1).norm(dim=1) < 0.5
            loss = model(pixel_values=pictures, labels=green.long()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
