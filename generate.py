"""The second Cog model, built with `cog build -f cog.generate.yaml`: it draws with the weights of a training.

The inputs are called as in Replicate's flux-dev-lora and in the models that its trainers make; docs/generator.md says
what each does. Cog reads the signature without running it: defaults, choices and descriptions must be plain literals.
"""

import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import List, Optional  # noqa: UP035

import diffusers
import torch
import transformers
from cog import BasePredictor, CancelationException, Input, Path, Secret
from diffusers import FluxPipeline
from PIL import Image

from lora import cancel
from lora.file import cache, source
from lora.file.cache import Cache, Fetched
from lora.flux import base, canvas, generate, hardware, safety, schnell
from lora.flux.canvas import Canvas
from lora.flux.generate import Lora
from lora.pictures import buckets
from lora.result import drawing
from lora.result.drawing import Drawn

OFFLOAD_BELOW, SCHNELL_MORE = 40 * hardware.GIB, 24 * hardware.GIB
"""Bytes of GPU memory: FLUX.1-dev with its text encoders needs 34 GiB in bf16, schnell's transformer 23 more."""
OWN = "COG_WEIGHTS"


class Predictor(BasePredictor):
    def setup(self, weights: Optional[Path] = None) -> None:
        """Loads the base, and the weights that COG_WEIGHTS names: a tar or safetensors, by path or address."""
        # Their bars redraw one line, which a log shows as thousands.
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
            library.utils.logging.set_verbosity_error()
        gpu = hardware.read_gpu()
        self.device = "cpu" if gpu is None else "cuda"
        self.base = base.find(os.environ.get("FLUX_BASE"), gpu)
        print(f"base: {self.base.name} ({self.base.reason})")
        _, self.count_tokens = self.base.token_counters()
        self.schnell = os.environ.get("SCHNELL", "").strip()
        needed = OFFLOAD_BELOW + (SCHNELL_MORE if self.schnell else 0)
        self.offload = gpu is not None and gpu.memory < needed
        self.pipeline = generate.open_pipeline(
            self.base.folder,
            device=self.device,
            dtype=torch.float32 if gpu is None else torch.bfloat16,
            offload=self.offload,
        )
        self.pipelines = {"dev": self.pipeline}
        self.model = "dev"
        if self.schnell:
            self.pipeline_of("schnell")
        self.checker, line = safety.find(os.environ.get("SAFETY"), self.device)
        print(line)
        self.folder = tempfile.TemporaryDirectory(prefix="flux-lora-generate-")
        self.cache = Cache(FilePath(self.folder.name))
        self.on: dict[str, Optional[list[tuple[str, float]]]] = {}
        """The hash and scale of each LoRA that is on a model's pipeline; None where that is not known."""
        self.more: list[tuple[str, str, float]] = []
        """LoRAs beyond those that the inputs can name, as `put_on` takes them; script/generate's."""
        self.own: Optional[Fetched] = None
        if weights:
            self.own = cache.about(source.fetch(str(weights), FilePath(tempfile.mkdtemp(dir=self.folder.name)), OWN))
            self.put_on([(OWN, str(weights), 1.0)])

    def predict(
        self,
        prompt: str = Input(
            description="What to draw. Write the trigger word of the LoRA exactly as in its training.",
        ),
        image: Optional[Path] = Input(
            default=None,
            description="A picture to start from, or, with mask, a picture to redraw a part of. The result has its aspect ratio; aspect_ratio, width and height are ignored.",
        ),
        mask: Optional[Path] = Input(
            default=None,
            description="A picture of the same shape as image: what is white is redrawn, what is black stays exactly as it is in image.",
        ),
        prompt_strength: float = Input(
            default=0.8,
            description="How far the result may move away from image. 1: nothing of image is left.",
            ge=0,
            le=1,
        ),
        aspect_ratio: str = Input(
            default="1:1",
            description="Width to height. custom: width and height are used.",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"],
        ),
        width: Optional[int] = Input(
            default=None,
            description="Width in pixels, rounded to a multiple of 16. Used only with aspect_ratio custom.",
            ge=64,
            le=2048,
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height in pixels, rounded to a multiple of 16. Used only with aspect_ratio custom.",
            ge=64,
            le=2048,
        ),
        megapixels: str = Input(
            default="1",
            description="Size of the picture. 1: what the base draws best (a megapixel with FLUX.1). 0.25: a quarter of its pixels, several times faster.",
            choices=["1", "0.25"],
        ),
        model: str = Input(
            default="dev",
            description="dev draws in 28 steps. schnell draws in 4, where its weights are installed. num_inference_steps overrides the number.",
            choices=["dev", "schnell"],
        ),
        num_outputs: int = Input(
            default=1,
            description="Number of pictures. Each has the seed after the one before.",
            ge=1,
            le=4,
        ),
        num_inference_steps: Optional[int] = Input(
            default=None,
            description="Number of drawing steps. More steps show more detail and take longer. Empty: 28 with dev, 4 with schnell.",
            ge=1,
            le=50,
        ),
        guidance_scale: float = Input(
            default=3.0,
            description="How closely to follow the prompt. 2 to 3.5 look natural. schnell ignores it.",
            ge=0,
            le=10,
        ),
        guidance: Optional[float] = Input(
            default=None,
            description="Another name of guidance_scale, as in flux-dev-lora. If given, it wins.",
            ge=0,
            le=10,
        ),
        seed: Optional[int] = Input(
            default=None,
            description="The same seed and inputs give the same picture. Empty or -1: a random seed, which the log shows.",
            ge=-1,
            le=4294967295,
        ),
        output_format: str = Input(
            default="webp",
            description="Format of the pictures.",
            choices=["webp", "jpg", "png"],
        ),
        output_quality: int = Input(
            default=80,
            description="Quality of webp and jpg, from 0 to 100 (the best).",
            ge=0,
            le=100,
        ),
        include_metadata: bool = Input(
            default=True,
            description="Write prompt, seed, settings and the names, scales and hashes of the LoRAs into the pictures, where other tools read them.",
        ),
        go_fast: bool = Input(
            default=False,
            description="Accepted for compatibility. No faster way to draw is offered, so the picture is the same.",
        ),
        disable_safety_checker: bool = Input(
            default=False,
            description="Return pictures without checking them.",
        ),
        lora_weights: Optional[str] = Input(
            default=None,
            description="The LoRA to draw with, instead of this model's own: the address or path of a trainer's tar or of a safetensors file, or a Hugging Face id (owner/name, owner/name/file.safetensors).",
        ),
        lora_scale: float = Input(
            default=1.0,
            description="How strongly to apply the LoRA. 0 leaves it out.",
            ge=-1,
            le=3,
        ),
        extra_lora: Optional[str] = Input(
            default=None,
            description="A second LoRA beside the first, named in the same ways.",
        ),
        extra_lora_scale: float = Input(
            default=1.0,
            description="How strongly to apply the second LoRA.",
            ge=-1,
            le=3,
        ),
        replicate_weights: Optional[str] = Input(
            default=None,
            description="An older name of lora_weights.",
        ),
        finetune_id: Optional[str] = Input(
            default=None,
            description="Another name of lora_weights, as Black Forest Labs call it.",
        ),
        finetune_strength: Optional[float] = Input(
            default=None,
            description="Another name of lora_scale, as Black Forest Labs call it. If given, it wins.",
            ge=-1,
            le=3,
        ),
        hf_api_token: Optional[Secret] = Input(
            default=None,
            description="A token for private LoRAs on the Hugging Face Hub.",
        ),
        civitai_api_token: Optional[Secret] = Input(
            default=None,
            description="A token for LoRAs at Civitai that ask for a login.",
        ),
    ) -> List[Path]:  # noqa: UP006
        """Draws pictures of the prompt with the LoRA, or several."""
        with cancel.heard(CancelationException):
            pipeline = self.pipeline_of(model)
            place = self.place(image, mask, aspect_ratio, width, height, megapixels)
            names = {"lora_weights": lora_weights, "replicate_weights": replicate_weights, "finetune_id": finetune_id}
            wanted = self.wanted(names, lora_scale if finetune_strength is None else finetune_strength)
            wanted += [("extra_lora", extra_lora, extra_lora_scale)] if extra_lora and extra_lora.strip() else []
            wanted += self.more
            loras = self.put_on(wanted, model, _text(hf_api_token), _text(civitai_api_token))
            tokens = min(self.base.t5_tokens, schnell.TOKENS) if model == "schnell" else self.base.t5_tokens
            self.warn(prompt, tokens, wanted, loras)
            if go_fast:
                print("go_fast changes nothing: no faster way to draw is offered")
            usual = schnell.STEPS if model == "schnell" else generate.STEPS
            steps = usual if num_inference_steps is None else int(num_inference_steps)
            scale = guidance_scale if guidance is None else guidance
            first = random.SystemRandom().randrange(2**32) if seed is None or seed < 0 else int(seed)
            folder = FilePath(self.folder.name) / "pictures"
            shutil.rmtree(folder, ignore_errors=True)  # the pictures before have been fetched by now
            folder.mkdir()
            seeds = [(first + number) % 2**32 for number in range(int(num_outputs))]
            paths: list[Path] = []
            for number, now in enumerate(seeds):
                print(
                    f"drawing {number + 1} of {len(seeds)}: {place.size[0]}x{place.size[1]}, {steps} steps, seed {now}"
                )
                drawn = generate.draw(
                    pipeline,
                    prompt,
                    place.size,
                    now,
                    steps=steps,
                    guidance=scale,
                    tokens=tokens,
                    start=place.start,
                    strength=prompt_strength,
                    mask=place.mask,
                    told=generate.progress(print, number, len(seeds)),
                )
                picture = place.finish(drawn)
                if self.checker and not disable_safety_checker and self.checker.withholds(picture):
                    print(f"seed {now}: the safety checker withholds this picture")
                    continue
                about = Drawn(
                    prompt=prompt,
                    steps=steps,
                    guidance=scale if pipeline.transformer.config.guidance_embeds else None,
                    seed=now,
                    size=picture.size,
                    model=self.base.name if model == "dev" else schnell.called(self.schnell),
                    loras=[
                        (lora.name, weight, lora.sha256) for lora, (_, _, weight) in zip(loras, wanted, strict=True)
                    ],
                    strength=None if place.start is None else prompt_strength,
                )
                paths.append(Path(folder / f"{number}.{output_format}"))
                text = drawing.parameters(about) if include_metadata else None
                drawing.save(picture, paths[-1], int(output_quality), text)
            if not paths:
                raise ValueError(
                    f"the safety checker withholds every picture of this call (seed {', '.join(map(str, seeds))}): take"
                    " another prompt or seed, or set disable_safety_checker"
                )
            return paths

    def pipeline_of(self, model: str) -> FluxPipeline:
        """The pipeline of dev or schnell. Raises ValueError where schnell's weights are not here."""
        if model not in self.pipelines:
            device = None if self.offload else self.device
            self.pipelines[model] = schnell.open_beside(self.pipeline, self.schnell, device)
        if self.offload and model != self.model:
            self.pipelines[model].enable_model_cpu_offload()  # the parts that both have follow the one that draws
        self.model = model
        return self.pipelines[model]

    def wanted(self, names: dict[str, Optional[str]], scale: float) -> list[tuple[str, str, float]]:
        """The LoRA that the first of these inputs names, or this model's own: none or one, as `put_on` takes it."""
        given = {name: origin.strip() for name, origin in names.items() if origin and origin.strip()}
        if not given:
            return [(OWN, OWN, scale)] if self.own else []
        called, *others = given
        for name in others:
            if given[name] != given[called]:
                print(f"warning: {name} is ignored, because {called} is given too")
        return [(called, given[called], scale)]

    def put_on(
        self,
        wanted: Sequence[tuple[str, str, float]],
        model: str = "dev",
        hf_token: Optional[str] = None,
        civitai_token: Optional[str] = None,
    ) -> list[Fetched]:
        """Draws from now on with these LoRAs: the input that named it, the source, the scale of each."""
        if not wanted:
            print("no LoRA: the base draws alone")
        pipeline, fetched = self.pipelines[model], []
        try:
            for called, origin, _ in wanted:
                if called == OWN and self.own:
                    fetched.append(self.own)
                    continue
                lora, here = self.cache.get(origin, called, hf_token, civitai_token)
                if here:
                    print(f"{called}: as it was fetched before")
                fetched.append(lora)
        finally:
            self.cache.forget(in_use=len(wanted))
        scales = [scale for _, _, scale in wanted]
        on = [(lora.sha256, scale) for lora, scale in zip(fetched, scales, strict=True)]
        before = self.on.get(model, [])
        if on == before:
            return fetched
        self.on = dict.fromkeys(self.pipelines)  # the text encoder, which a LoRA may change too, is every model's
        if before is not None and [digest for digest, _ in on] == [digest for digest, _ in before]:
            generate.rescale(pipeline, scales)
            print(f"the same LoRAs at scale {', '.join(f'{scale:g}' for scale in scales)}")
        else:
            named = zip(wanted, fetched, strict=True)
            loras = [Lora(name=called, file=lora.file, scale=scale) for (called, _, scale), lora in named]
            generate.put_on(pipeline, loras, print)
        self.on[model] = on
        return fetched

    def warn(
        self, prompt: str, tokens: int, wanted: Sequence[tuple[str, str, float]], loras: Sequence[Fetched]
    ) -> None:
        """Prints what makes a drawing show less than was asked for."""
        count = self.count_tokens(prompt)
        if count > tokens:
            print(f"warning: the prompt has {count} tokens and the base reads {tokens}: its end is lost")
        for (called, _, scale), lora in zip(wanted, loras, strict=True):
            words = [word.strip() for word in lora.trigger.split(",") if word.strip()]
            if scale and words and not any(word in prompt for word in words):
                print(
                    f"warning: {called}: the prompt lacks its trigger word, {lora.trigger[:100]!r}: most LoRAs do little"
                    " without it"
                )

    def place(
        self,
        image: Optional[FilePath],
        mask: Optional[FilePath],
        aspect_ratio: str,
        width: Optional[int],
        height: Optional[int],
        megapixels: str,
    ) -> Canvas:
        """What to draw on. Raises ValueError for half a size, and for a picture that cannot be used."""
        side = round(self.base.native * math.sqrt(float(megapixels)))
        picture = _read("image", image, buckets.read_picture)
        white = _read("mask", mask, canvas.read_mask)
        if picture is None and white is not None:
            raise ValueError("mask: there is no image that it belongs to; give image too, or leave mask empty")
        if picture is not None and white is not None:
            if max(picture.size) > canvas.LARGEST:
                print(
                    f"image: its {picture.width}x{picture.height} pixels are made smaller, to {canvas.LARGEST} a side"
                )
            return canvas.within(picture, white, side)
        if picture is not None:
            return canvas.over(picture, side)
        if aspect_ratio != "custom" and (width is not None or height is not None):
            print(
                f"width and height are not used with aspect_ratio {aspect_ratio}; give aspect_ratio=custom to use them"
            )
        return canvas.blank(aspect_ratio, width, height, side)


def _text(secret: Optional[Secret]) -> Optional[str]:
    """What a secret holds; None where it is empty."""
    return secret.get_secret_value().strip() or None if secret else None


def _read(called: str, path: Optional[FilePath], read: Callable[[FilePath], Image.Image]) -> Optional[Image.Image]:
    """The picture of an input; None where it is left empty, which some clients send as ""."""
    if path is None or str(path) in ("", "."):
        return None
    try:
        return read(FilePath(str(path)))
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from error
