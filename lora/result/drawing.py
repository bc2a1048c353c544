"""A drawing as a file, and what it says of itself: the text that A1111's web UI writes and most tools read.

Prompt and LoRAs stand in the first line (`<lora:NAME:SCALE>`), the settings in the last. In a PNG it is the text chunk
`parameters`, in JPEG and WebP the Exif UserComment, as AUTOMATIC1111/stable-diffusion-webui writes them
(`modules/infotext_utils.py`, `modules/images.py`); Forge's names are used for what only FLUX has.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

FORMATS = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}
LONGEST_PROMPT = 10_000
"""Characters of it that are written: a JPEG has room for 32,000 in all, and no base reads more than 512 tokens."""
_UNICODE = b"UNICODE\0"
"""The name of the encoding at the start of a UserComment (Exif 2.3, 4.6.5)."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """How a picture was drawn."""

    prompt: str
    steps: int
    guidance: float | None
    """None where the model has none (schnell)."""
    seed: int
    size: tuple[int, int]
    """(width, height) in pixels."""
    model: str
    """The base's name."""
    loras: Sequence[tuple[str, float, str]]
    """Name, scale and SHA-256 of each; see `lora.file.cache.Fetched`."""
    strength: float | None = None
    """Of the prompt over the picture that the drawing started from; None where there was none."""


def parameters(drawn: Drawn) -> str:
    """The text for other tools: a line of prompt and LoRAs, a line of settings."""
    tags = "".join(f" <lora:{name}:{scale:g}>" for name, scale, _ in drawn.loras)
    settings: dict[str, object] = {
        "Steps": drawn.steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": 1,
        **({} if drawn.guidance is None else {"Distilled CFG Scale": f"{drawn.guidance:g}"}),
        "Seed": drawn.seed,
        "Size": f"{drawn.size[0]}x{drawn.size[1]}",
        "Model": drawn.model,
        **({} if drawn.strength is None else {"Denoising strength": f"{drawn.strength:g}"}),
    }
    if drawn.loras:
        settings["Lora hashes"] = ", ".join(f"{name}: {digest[:12]}" for name, _, digest in drawn.loras)
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())
    return f"{drawn.prompt[:LONGEST_PROMPT].strip()}{tags}\n{line}"


def _quoted(value: str) -> str:
    """A value that holds a separator is written as a JSON string, as A1111 quotes it."""
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ',:"\n') else value


def save(picture: Image.Image, path: Path, quality: int, text: str | None = None) -> None:
    """Writes the picture in the format of the path's suffix, a key of FORMATS, with `text` as its metadata.

    `quality` is 0 to 100; a PNG knows none.
    """
    kind = FORMATS[path.suffix.removeprefix(".")]
    more: dict[str, object] = {} if kind == "PNG" else {"quality": quality}
    if text is not None:
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a character has no encoding
        if kind == "PNG":
            more["pnginfo"] = chunk = PngInfo()
            chunk.add_text("parameters", text)
        else:
            more["exif"] = exif = Image.Exif()
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be")
    picture.save(path, kind, **more)
