"""How like the user's pictures the previews look: an image model beside the flow loss, which only sees itself.

The measure is DreamBooth's subject fidelity (Ruiz et al. 2022, arXiv:2208.12242): the cosine between the embeddings of
what is drawn and of the user's pictures, by DINO. As a bare number it says little, so it is told between what the base
alone reaches and what the user's pictures reach among each other.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError, HTTPError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from lora import wait
from lora.result.preview import Preview

USUAL = "facebook/dinov2-base"
"""Apache-2.0, 346 MB."""
AT_ONCE = 16
"""Pictures in a batch."""
LEAST_APART = 0.05
"""Between the user's pictures among each other and the base's: with less the eye does not tell them apart, and its
number would be noise. A choice, not measured."""


class Eye:
    """A model of transformers that embeds a picture in its first token, such as DINOv2; loaded."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Loads the model `name`, a folder or an id on the Hugging Face Hub; raises as transformers does where there is
        none."""
        self.name = name
        self._processor = AutoImageProcessor.from_pretrained(name)
        self._model = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32).to(device).eval()

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D) of length 1 each, on the CPU."""
        found = []
        for start in range(0, len(pictures), AT_ONCE):
            batch = [picture.convert("RGB") for picture in pictures[start : start + AT_ONCE]]
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            found.append(self._model(pixel_values=pixels.to(self._model.device)).last_hidden_state[:, 0].cpu())
        return F.normalize(torch.cat(found), dim=-1)


def find(name: str | None, device: str) -> tuple[Eye | None, str]:
    """The eye that the variable EYE names, and a line for the log.

    Where it is not set, the usual one on a GPU, none on a CPU; where it is "none" or empty, none. One that cannot be
    loaded is none either: a training has ended by then, and is worth more.
    """
    if name is not None and name.strip().lower() in ("", "none"):
        return None, "likeness: left out, as EYE says"
    if name is None and device == "cpu":
        return None, f"likeness: not measured without a GPU, unless EYE names a folder with a model such as {USUAL}"
    try:
        eye = wait.interruptibly(lambda: Eye(name or USUAL, device))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, HFValidationError, HTTPError) as error:
        told = str(error).strip().partition("\n")[0][:200]
        shown = name if name and not Path(name).is_dir() else Path(name or USUAL).name
        return None, f"likeness: left out, for EYE, {shown[:100]!r}, cannot be loaded ({told})"
    return eye, f"likeness: {eye.name if name is None else Path(eye.name).name}"


def likeness(own: Tensor, base: Tensor, drawn: Tensor) -> float | None:
    """How like the user's pictures `own` what was `drawn` looks, from embeddings (N, D) of length 1: 0 as like as what
    the `base` drew for the same prompts, 1 as like as the user's pictures are each other; below and above are possible.

    None where there are fewer than two pictures, nothing drawn, or less than LEAST_APART between the two ends.
    """
    if len(own) < 2 or not len(drawn):
        return None
    among = own @ own.T
    most = (among.sum() - among.trace()) / (len(own) * (len(own) - 1))
    least, reached = (base @ own.T).mean(), (drawn @ own.T).mean()
    if most - least < LEAST_APART:
        return None
    return float((reached - least) / (most - least))


def look(
    name: str | None, device: str, own: Sequence[Image.Image], previews: Sequence[Preview]
) -> tuple[float | None, str]:
    """The `likeness` of previews to the user's `own` pictures, by the eye that `find` finds, and a line for the log."""
    eye, line = find(name, device)
    if eye is None:
        return None, line
    own_at, base_at, drawn_at = (
        eye.embed(pictures) for pictures in (own, [p.without for p in previews], [p.after for p in previews])
    )
    found = likeness(own_at, base_at, drawn_at)
    if found is None:
        return None, f"{line} does not tell your pictures from what the base draws, or there are too few; left out"
    return found, f"{line}: {found:.2f} over {len(previews)} previews"
