"""The second Cog model, built with `cog build -f cog.generate.yaml`: it draws with the weights of a training.

The inputs are called as in Replicate's flux-dev-lora. Cog reads the signature without running it: defaults, choices and
descriptions must be plain literals.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import List, Optional  # noqa: UP035

import diffusers
import torch
import transformers
from cog import BasePredictor, Input, Path
from PIL import Image

from lora.file import source
from lora.flux import base, generate, hardware
from lora.flux.generate import Lora
from lora.pictures import buckets

OFFLOAD_BELOW = 40 * hardware.GIB
"""Bytes of GPU memory: FLUX.1-dev with its text encoders needs 34 GiB in bf16."""


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Loads the base, and the weights that COG_WEIGHTS names: a tar or safetensors, by path or address."""
        # Their bars redraw one line, which a log shows as thousands.
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
            library.utils.logging.set_verbosity_error()
        gpu = hardware.read_gpu()
        self.base = base.find(os.environ.get("FLUX_BASE"), gpu)
        print(f"base: {self.base.name} ({self.base.reason})")
        _, self.count_tokens = self.base.token_counters()
        self.pipeline = generate.open_pipeline(
            self.base.folder,
            device="cpu" if gpu is None else "cuda",
            dtype=torch.float32 if gpu is None else torch.bfloat16,
            offload=gpu is not None and gpu.memory < OFFLOAD_BELOW,
        )
        self.folder = tempfile.TemporaryDirectory(prefix="flux-lora-generate-")
        self.files: dict[str, FilePath] = {}
        self.folders: dict[str, FilePath] = {}
        self.loras: Optional[list[Lora]] = []
        """What is on the pipeline; None where a failure left that unknown."""
        self.more: list[tuple[str, str, float]] = []
        """LoRAs beyond those that the inputs can name, as `put_on` takes them; script/generate's."""
        self.trained = str(weights) if weights else None
        if self.trained is not None:
            self.put_on([("COG_WEIGHTS", self.trained, 1.0)])

    def predict(
        self,
        prompt: str = Input(
            description="What to draw. Write the trigger word of the training to call up what was learned.",
        ),
        image: Optional[Path] = Input(
            default=None,
            description="A picture to start from. The drawing has its aspect ratio, and aspect_ratio, width and height are ignored.",
        ),
        prompt_strength: float = Input(
            default=0.8,
            description="How far to go from the picture: 1 leaves nothing of it.",
            ge=0,
            le=1,
        ),
        aspect_ratio: str = Input(
            default="1:1",
            description="Width to height, at the size that the base draws best.",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"],
        ),
        width: Optional[int] = Input(
            default=None,
            description="Width in pixels, rounded to a multiple of 16. Give it together with height, in place of aspect_ratio.",
            ge=64,
            le=2048,
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height in pixels, rounded to a multiple of 16. Give it together with width.",
            ge=64,
            le=2048,
        ),
        num_outputs: int = Input(
            default=1,
            description="Number of pictures, each with the seed after the one before.",
            ge=1,
            le=4,
        ),
        num_inference_steps: int = Input(
            default=28,
            description="Steps of the drawing: more show more detail and take longer.",
            ge=1,
            le=50,
        ),
        guidance_scale: float = Input(
            default=3.5,
            description="How closely to follow the prompt. 2 to 3.5 look more natural.",
            ge=0,
            le=10,
        ),
        seed: Optional[int] = Input(
            default=None,
            description="The same seed and inputs give the same picture. Leave it empty for a random one, which the log tells.",
            ge=0,
            le=4294967295,
        ),
        output_format: str = Input(
            default="webp",
            description="Format of the pictures.",
            choices=["webp", "jpg", "png"],
        ),
        output_quality: int = Input(
            default=80,
            description="Quality of webp and jpg, 100 is the best.",
            ge=0,
            le=100,
        ),
        lora_weights: Optional[str] = Input(
            default=None,
            description="The LoRA to draw with, in place of this model's own: the address or path of a trainer's tar or of a safetensors, or a Hugging Face id (owner/name).",
        ),
        lora_scale: float = Input(
            default=1.0,
            description="How strongly to apply it. 0 leaves it out.",
            ge=-1,
            le=3,
        ),
        extra_lora: Optional[str] = Input(
            default=None,
            description="A second LoRA beside the first, named in the same ways.",
        ),
        extra_lora_scale: float = Input(
            default=1.0,
            description="How strongly to apply the second.",
            ge=-1,
            le=3,
        ),
    ) -> List[Path]:  # noqa: UP006
        """Draws pictures of the prompt with the LoRA, or several."""
        own = lora_weights or self.trained
        wanted = [("lora_weights" if lora_weights else "COG_WEIGHTS", own, lora_scale)] if own else []
        wanted += [("extra_lora", extra_lora, extra_lora_scale)] if extra_lora else []
        wanted += self.more
        if not wanted:
            print("no LoRA: the base draws alone")
        self.put_on(wanted)
        tokens = self.count_tokens(prompt)
        if tokens > self.base.t5_tokens:
            print(f"warning: the prompt has {tokens} tokens and the base reads {self.base.t5_tokens}: its end is lost")
        size, start = self.place(image, aspect_ratio, width, height)
        first = random.SystemRandom().randrange(2**32) if seed is None else int(seed)
        folder = FilePath(self.folder.name) / "pictures"
        shutil.rmtree(folder, ignore_errors=True)  # the pictures before have been fetched by now
        folder.mkdir()
        paths = []
        for number in range(int(num_outputs)):
            now = (first + number) % 2**32
            print(f"drawing {number + 1} of {int(num_outputs)}: {size[0]}x{size[1]}, seed {now}")
            picture = generate.draw(
                self.pipeline,
                prompt,
                size,
                now,
                steps=int(num_inference_steps),
                guidance=guidance_scale,
                tokens=self.base.t5_tokens,
                start=start,
                strength=prompt_strength,
            )
            paths.append(Path(folder / f"{number}.{output_format}"))
            generate.save(picture, paths[-1], int(output_quality))
        return paths

    def put_on(self, wanted: Sequence[tuple[str, str, float]]) -> None:
        """Draws from now on with these LoRAs: the input that named it, the source, the scale of each."""
        loras = []
        for called, origin, scale in wanted:
            if origin not in self.files:
                folder = FilePath(tempfile.mkdtemp(dir=self.folder.name))
                try:
                    self.files[origin] = source.fetch(origin, folder, called)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                self.folders[origin] = folder
            elif origin != self.trained:
                print(f"{called}: as it was fetched before, for the last drawing")
            loras.append(Lora(name=called, file=self.files[origin], scale=scale))
        if loras != self.loras:
            self.loras = None
            generate.put_on(self.pipeline, loras, print)
            self.loras = loras
        for origin in set(self.files) - {self.trained, *(origin for _, origin, _ in wanted)}:
            shutil.rmtree(self.folders.pop(origin))
            del self.files[origin]

    def place(
        self, image: Optional[FilePath], aspect_ratio: str, width: Optional[int], height: Optional[int]
    ) -> tuple[tuple[int, int], Optional[Image.Image]]:
        """The size to draw at, and the picture to start from, cut to it. Raises ValueError for half a size."""
        if image is not None:
            try:
                picture = buckets.read_picture(FilePath(str(image)))
            except ValueError as error:
                raise ValueError(f"image: {error}") from error
            size = buckets.choose_bucket(picture.width, picture.height, self.base.native)
            return size, buckets.fit_to(picture, size)
        if width is None and height is None:
            return generate.size_for(aspect_ratio, self.base.native), None
        if width is None or height is None:
            raise ValueError("width and height: one of them is missing; give both, or neither and aspect_ratio")
        return (round(width / 16) * 16, round(height / 16) * 16), None
