"""Cog's `train`: the inputs with their ranges and defaults, which stand nowhere else, handed to `lora.job.run`.

Cog reads this signature without running it: defaults, choices and descriptions must be plain literals.
"""

import os
import shutil
import tempfile
import traceback
from pathlib import Path as FilePath
from typing import Optional

from cog import BaseModel, Input, Path, current_scope

from lora import job
from lora.request import TrainRequest


class TrainingOutput(BaseModel):
    weights: Path


def train(
    input_images: Path = Input(
        description="A zip, tar or tar.gz of the pictures to learn from: 10 to 20 are a good number. A caption in a text file of the same name (dog.jpg, dog.txt) is used as it is.",
    ),
    trigger_word: str = Input(
        default="TOK",
        description="The word that will call up what was learned. Take one that means nothing yet.",
        min_length=1,
        max_length=60,
    ),
    lora_type: str = Input(
        default="subject",
        description="Whether the pictures share a subject (a person, an animal, a thing) or a style.",
        choices=["subject", "style"],
    ),
    autocaption: bool = Input(
        default=True,
        description="Write a caption with a vision-language model for each picture that has none. Otherwise it gets a template with the trigger word.",
    ),
    autocaption_prefix: Optional[str] = Input(
        default=None,
        description="Text to put at the start of every written caption, word for word.",
        max_length=300,
    ),
    autocaption_suffix: Optional[str] = Input(
        default=None,
        description="Text to put at the end of every written caption, word for word.",
        max_length=300,
    ),
    training_steps: int = Input(
        default=1000,
        description="Number of training steps. 1000 suit most sets of pictures.",
        ge=1,
        le=6000,
    ),
    learning_rate: Optional[float] = Input(
        default=None,
        description="Leave it empty for the one that suits the type: 4e-4 on FLUX.1-dev.",
        ge=1e-7,
        le=1e-2,
    ),
    lora_rank: int = Input(
        default=16,
        description="Size of the LoRA: higher holds more detail, makes a larger file and overfits sooner.",
        ge=1,
        le=128,
    ),
    resolution: Optional[str] = Input(
        default=None,
        description="Sides in pixels to train at, separated by commas. Leave it empty for the base's own, which is 512,768,1024 for FLUX.1-dev.",
    ),
    batch_size: int = Input(
        default=1,
        description="Pictures in a step.",
        ge=1,
        le=8,
    ),
    caption_dropout_rate: float = Input(
        default=0.05,
        description="Share of steps that train with an empty caption.",
        ge=0,
        le=1,
    ),
    prior_loss_weight: float = Input(
        default=1.0,
        description="How firmly prompts without the trigger word are held to what the base draws for them. 0 leaves this out: faster, and the LoRA bleeds into other prompts.",
        ge=0,
        le=10,
    ),
    seed: Optional[int] = Input(
        default=None,
        description="Same seed, inputs and machine: same LoRA. Leave it empty for a random one, which is recorded.",
        ge=0,
        le=4294967295,
    ),
    preview_every: int = Input(
        default=0,
        description="Draw previews every so many steps too. 0 draws them at the end alone.",
        ge=0,
        le=6000,
    ),
    preview_prompts: Optional[str] = Input(
        default=None,
        description="What the previews show, one prompt a line, 8 at most; [trigger] stands for the trigger word. Leave it empty for prompts that suit the type.",
        max_length=4000,
    ),
    stop_early: bool = Input(
        default=False,
        description="Keep one picture out of the training (where there are 8 or more) and stop when its loss has turned, with the weights of its lowest.",
    ),
) -> TrainingOutput:
    """Trains a FLUX LoRA on the pictures and returns it as a tar, as Replicate publishes it."""
    request = TrainRequest(
        input_images=FilePath(str(input_images)),
        trigger_word=trigger_word,
        lora_type=lora_type,
        autocaption=autocaption,
        autocaption_prefix=autocaption_prefix or "",
        autocaption_suffix=autocaption_suffix or "",
        training_steps=int(training_steps),
        learning_rate=learning_rate,
        lora_rank=int(lora_rank),
        resolution=resolution,
        batch_size=int(batch_size),
        caption_dropout_rate=caption_dropout_rate,
        prior_loss_weight=prior_loss_weight,
        seed=None if seed is None else int(seed),
        preview_every=int(preview_every),
        preview_prompts=preview_prompts or "",
        stop_early=stop_early,
    )
    shutil.rmtree(_output_folder(), ignore_errors=True)
    try:
        weights = job.run(
            request,
            output=_output_folder(),
            flux_base=os.environ.get("FLUX_BASE"),
            captioner=os.environ.get("CAPTIONER"),
            log=lambda line: print(line, flush=True),
            metric=current_scope().record_metric,
        )
    except Exception:
        # Cog passes on the message alone; the way there is for the log.
        traceback.print_exc()
        raise
    return TrainingOutput(weights=Path(weights))


def _output_folder() -> FilePath:
    """Where this process leaves its tar; the training before has been fetched by the time the next one begins."""
    return FilePath(tempfile.gettempdir()) / f"flux-lora-trainer-{os.getpid()}"
