"""The safety checker: an image classifier looks at every drawing before it is handed out.

Any model of transformers' image classification does whose labels say which of them is meant. The usual one,
Falconsai/nsfw_image_detection, has the labels `normal` and `nsfw`, and is what Replicate's FLUX models look with.
"""

import re
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lora import wait

USUAL = "Falconsai/nsfw_image_detection"
UNSAFE = re.compile(r"nsfw|unsafe|porn|hentai|sex|nud|explicit|gore", re.IGNORECASE)
"""Labels that withhold a picture: those of the checkers on the Hugging Face Hub."""
SAFE = re.compile(r"\b(not|non|no|un)[\s_-]?(nsfw|porn|sex|nud|explicit|gore)|\bsfw\b", re.IGNORECASE)
LIMIT = 0.5
"""Of the probability of all unsafe labels together; above it a picture is withheld."""


class Checker:
    """A classifier, loaded."""

    def __init__(self, name: str, local_only: bool = False, device: str = "cpu") -> None:
        """Loads the model `name`, a folder or an id on the Hugging Face Hub; with `local_only` nothing is downloaded.

        Raises OSError or ValueError as transformers does where there is none, and ValueError where none of its labels
        is an unsafe one.
        """
        self.name = name
        self._processor = AutoImageProcessor.from_pretrained(name, local_files_only=local_only)
        model = AutoModelForImageClassification.from_pretrained(
            name, local_files_only=local_only, use_safetensors=True, dtype=torch.float32
        )
        labels = model.config.id2label
        self._unsafe = [int(i) for i, label in labels.items() if UNSAFE.search(label) and not SAFE.search(label)]
        if not self._unsafe or len(self._unsafe) == len(labels):
            raise ValueError(f"its labels ({', '.join(list(labels.values())[:5])}) do not tell safe from unsafe")
        self._model = model.to(device).eval()

    @torch.no_grad()
    def score(self, picture: Image.Image) -> float:
        """How likely the picture is unsafe, 0 to 1."""
        pixels = self._processor(images=[picture.convert("RGB")], return_tensors="pt")["pixel_values"]
        logits = self._model(pixel_values=pixels.to(self._model.device)).logits
        return float(logits.float().softmax(dim=-1)[0, self._unsafe].sum())

    def withholds(self, picture: Image.Image) -> bool:
        return self.score(picture) > LIMIT


def find(name: str | None, device: str = "cpu") -> tuple[Checker | None, str]:
    """The checker that the variable SAFETY names, and a line for the log.

    Where it is not set, the usual one, if it was downloaded before. Where it is "none" or empty, no one. Raises
    ValueError where it names one that cannot be loaded: pictures are never left unchecked for that reason.
    """
    if name is not None and name.strip().lower() in ("", "none"):
        return None, "safety checker: off, as SAFETY says; pictures are not checked"
    try:
        checker = wait.interruptibly(lambda: Checker(name or USUAL, local_only=name is None, device=device))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, HFValidationError) as error:
        if name is None:
            return None, (
                f"safety checker: none is here; pictures are not checked (SAFETY={USUAL} downloads one, or name a"
                " folder)"
            )
        told = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"SAFETY: {Path(name).name!r} cannot be loaded as an image classifier ({told}); name a folder or an id of"
            f" the Hugging Face Hub, such as {USUAL}, or SAFETY=none to check no pictures"
        ) from error
    return checker, f"safety checker: {checker.name}"
