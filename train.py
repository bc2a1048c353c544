"""The trainer as Cog and `script/train` call it: inputs, their ranges and defaults, and a call of `lora.job.run`.

Defaults stand here and nowhere else. Cog reads this signature without running it, so defaults, choices and
descriptions must be plain literals (`script/signature.py` refuses others). After a change run
`script/python -m script.docs`, which writes the tables in README.md and docs/ anew.
"""

import logging
import os
import shutil
from pathlib import Path as FilePath
from typing import Optional

from cog import BaseModel, CancelationException, Input, Path, Secret, current_scope

from lora import cancel, disk, job, presets
from lora.request import Secrets, TrainRequest


class TrainingOutput(BaseModel):
    weights: Path


def train(
    input_images: Path = Input(
        description="A zip, tar or tar.gz with the pictures to learn from: 10 to 20 of a subject, 20 of a style. A text file of the same name (dog.jpg, dog.txt) is that picture's caption. [trigger] in a caption stands for the trigger word; a caption without it gets it in front.",
    ),
    trigger_word: Optional[str] = Input(
        default=None,
        description="The word that will call up the subject or style in prompts. Choose one that means nothing yet. Empty: TOK. To teach several subjects, give several words, such as ANNA, BOB, and put the pictures of each into a folder named after its word.",
        min_length=1,
        max_length=60,
    ),
    lora_type: Optional[str] = Input(
        default=None,
        description="Whether the pictures share a subject (a person, an animal, a thing) or a style. Empty: what mode implies, otherwise subject.",
        choices=["subject", "style"],
    ),
    mode: Optional[str] = Input(
        default=None,
        description="What captions describe and which previews are drawn. character: a person. product: a thing that is sold. style: a style. general: captions describe the whole picture. Empty: what suits lora_type.",
        choices=["general", "character", "style", "product"],
    ),
    priority: str = Input(
        default="quality",
        description="Decides resolution, training_steps and preview_prompts where you leave them empty. quality: all of the base's resolutions. speed: the smallest one, half of the steps, fewer previews. high_res_only: the largest one. The log shows the values.",
        choices=["quality", "speed", "high_res_only"],
    ),
    training_steps: Optional[int] = Input(
        default=None,
        description="Number of training steps. Empty: by the number of pictures, 50 for each of a subject, 100 for each of a style, 27 for each with mode character; at least 500 (character: 300), at most 2000. 0 trains nothing: the LoRA of resume_from is packed as a tar, and input_images is not opened.",
        ge=0,
        le=6000,
    ),
    captioning: Optional[str] = Input(
        default=None,
        description="automatic: a vision-language model writes a caption for each picture that has none. disabled: such a picture gets a template with the trigger word. all: the model writes new captions for all pictures, and the report shows yours beside them. Empty: automatic.",
        choices=["automatic", "disabled", "all"],
    ),
    subject_crop: bool = Input(
        default=True,
        description="Where the subject is small in a picture, also train a close-up of it, with the same caption and the word close-up. The vision-language model finds the subject, so this works only where that model writes captions. Never for a style. Close-ups are not enlarged.",
    ),
    autocaption_prefix: Optional[str] = Input(
        default=None,
        description="Text to put at the start of every caption that is written for you, word for word.",
        max_length=300,
    ),
    autocaption_suffix: Optional[str] = Input(
        default=None,
        description="Text to put at the end of every caption that is written for you, word for word.",
        max_length=300,
    ),
    preview_prompts: Optional[str] = Input(
        default=None,
        description="Prompts of the previews, one a line, at most 8. [trigger] stands for the trigger word. Empty: prompts that suit lora_type and mode.",
        max_length=4000,
    ),
    seed: Optional[int] = Input(
        default=None,
        description="The same seed and inputs give the same LoRA on the same machine (on a GPU up to rounding). Empty: a random seed, which is recorded.",
        ge=0,
        le=4294967295,
    ),
    resume_from: Optional[str] = Input(
        default=None,
        description="A FLUX LoRA to continue training, of rank lora_rank or lower: an https URL of a tar or safetensors file, or an id on the Hugging Face Hub (hf_token opens a private one).",
        max_length=2000,
    ),
    hf_repo_id: Optional[str] = Input(
        default=None,
        description="Upload the LoRA to this repository on the Hugging Face Hub, such as your-name/your-lora. It is created if it does not exist. Your pictures and captions are not uploaded.",
        max_length=200,
    ),
    hf_token: Optional[Secret] = Input(
        default=None,
        description="A Hugging Face token: to download a gated base such as FLUX.1-dev where the container has none, to open a private resume_from, and to upload to hf_repo_id.",
    ),
    hf_private: bool = Input(
        default=True,
        description="Create the repository of hf_repo_id as private. If it exists and is public, the request is refused unless this is false.",
    ),
    finetune_type: str = Input(
        default="lora",
        description="lora: trains a LoRA. full: trains the weights of the layers themselves and makes a LoRA of lora_rank from their change; the report tells how much of the change it holds. With full an empty training_steps is 300 and an empty learning_rate 1e-5. It needs a GPU with 48 GB or more, and uses one GPU.",
        choices=["lora", "full"],
    ),
    learning_rate: Optional[float] = Input(
        default=None,
        description="Peak learning rate. Empty: what suits lora_type and lora_rank (for FLUX.1-dev at rank 16: 4e-4; with finetune_type full: 1e-5).",
        ge=1e-7,
        le=1e-2,
    ),
    lora_rank: Optional[int] = Input(
        default=None,
        description="Rank of the LoRA. A higher rank holds more detail, makes a larger file and overfits sooner. Empty: 16.",
        ge=1,
        le=128,
    ),
    resolution: Optional[str] = Input(
        default=None,
        description="Sides in pixels to train at, separated by commas. Empty: the base's own, which are 512,768,1024 for FLUX.1-dev.",
    ),
    batch_size: int = Input(
        default=1,
        description="Number of pictures in a step.",
        ge=1,
        le=8,
    ),
    caption_dropout_rate: float = Input(
        default=0.05,
        description="How often a picture trains with an empty caption, from 0 (never) to 1 (always).",
        ge=0,
        le=1,
    ),
    preservation: Optional[str] = Input(
        default=None,
        description="Prior preservation: how firmly prompts without the trigger word are held to what the base draws for them. off, light, firm, or a number: the norm of its gradient relative to that of the pictures (0.5 suits a subject, 1.5 a style). Empty: what suits lora_type. off is faster, but the LoRA then changes other prompts too.",
        max_length=20,
    ),
    checkpoints: str = Input(
        default="best",
        description="Weights are kept at 50, 60, … 100 % of the steps, and the best of them are returned. all: the others are uploaded to hf_repo_id too, and script/train writes them beside the tar. The tar holds the best alone.",
        choices=["best", "all"],
    ),
    preview_every: int = Input(
        default=0,
        description="Also draw previews every so many steps, at most 60 times. 0: only at the end.",
        ge=0,
        le=6000,
    ),
    layers_to_optimize_regex: Optional[str] = Input(
        default=None,
        description="Train only the layers whose name contains a match of this regular expression, such as transformer.single_transformer_blocks.(7|12|16|20).proj_out. Layers that must be trained together are added, so that the LoRA loads everywhere. Empty: all layers of attention and MLP.",
        max_length=1000,
    ),
    wandb_api_key: Optional[Secret] = Input(
        default=None,
        description="Log losses, learning rate and previews to Weights & Biases.",
    ),
    wandb_project: Optional[str] = Input(
        default=None,
        description="Project at Weights & Biases. Empty: flux-lora. It needs wandb_api_key.",
        max_length=128,
    ),
    wandb_run: Optional[str] = Input(
        default=None,
        description="Name of the run at Weights & Biases. Empty: the trigger word.",
        max_length=128,
    ),
    wandb_entity: Optional[str] = Input(
        default=None,
        description="Team or user at Weights & Biases. Empty: that of the key.",
        max_length=128,
    ),
    trigger_phrase: Optional[str] = Input(
        default=None,
        description="Another name of trigger_word.",
        min_length=1,
        max_length=60,
        deprecated=True,
    ),
    is_style: Optional[bool] = Input(
        default=None,
        description="Another name of lora_type: true is style, false is subject.",
        deprecated=True,
    ),
    autocaption: Optional[bool] = Input(
        default=None,
        description="Another name of captioning: true is automatic, false is disabled.",
        deprecated=True,
    ),
    caption_prefix: Optional[str] = Input(
        default=None,
        description="Another name of autocaption_prefix.",
        max_length=300,
        deprecated=True,
    ),
    caption_suffix: Optional[str] = Input(
        default=None,
        description="Another name of autocaption_suffix.",
        max_length=300,
        deprecated=True,
    ),
    steps: Optional[int] = Input(
        default=None,
        description="Another name of training_steps.",
        ge=0,
        le=6000,
        deprecated=True,
    ),
    iterations: Optional[int] = Input(
        default=None,
        description="Another name of training_steps.",
        ge=0,
        le=6000,
        deprecated=True,
    ),
    rank: Optional[int] = Input(
        default=None,
        description="Another name of lora_rank.",
        ge=1,
        le=128,
        deprecated=True,
    ),
) -> TrainingOutput:
    """Trains a FLUX LoRA on the pictures and returns it as a tar, as Replicate publishes it."""
    settled = presets.settle(
        presets.Asked(
            trigger_word=trigger_word,
            lora_type=lora_type,
            mode=mode,
            captioning=captioning,
            autocaption_prefix=autocaption_prefix,
            autocaption_suffix=autocaption_suffix,
            training_steps=_whole(training_steps),
            lora_rank=_whole(lora_rank),
            trigger_phrase=trigger_phrase,
            is_style=is_style,
            autocaption=autocaption,
            caption_prefix=caption_prefix,
            caption_suffix=caption_suffix,
            steps=_whole(steps),
            iterations=_whole(iterations),
            rank=_whole(rank),
        )
    )
    request = TrainRequest(
        input_images=FilePath(str(input_images)),
        trigger_word=settled.trigger_word,
        lora_type=settled.lora_type,
        mode=mode or None,
        priority=priority,
        captioning=settled.captioning,
        subject_crop=subject_crop,
        autocaption_prefix=settled.autocaption_prefix,
        autocaption_suffix=settled.autocaption_suffix,
        training_steps=settled.training_steps,
        finetune_type=finetune_type,
        learning_rate=None if learning_rate is None else float(learning_rate),
        lora_rank=settled.lora_rank,
        resolution=(resolution or "").strip() or None,
        batch_size=int(batch_size),
        caption_dropout_rate=float(caption_dropout_rate),
        preservation=(preservation or "").strip().lower(),
        seed=_whole(seed),
        checkpoints=checkpoints,
        preview_every=int(preview_every),
        preview_prompts=preview_prompts or "",
        layers_to_optimize_regex=layers_to_optimize_regex or None,
        resume_from=(resume_from or "").strip() or None,
        hf_repo_id=(hf_repo_id or "").strip() or None,
        hf_private=hf_private,
        wandb_project=wandb_project or None,
        wandb_run=wandb_run or None,
        wandb_entity=wandb_entity or None,
        notes=settled.notes,
        faults=settled.faults,
    )
    secrets = Secrets(
        hf_token=hf_token.get_secret_value().strip() or None if hf_token else None,
        wandb_api_key=wandb_api_key.get_secret_value().strip() or None if wandb_api_key else None,
    )
    shutil.rmtree(_output_folder(), ignore_errors=True)
    try:
        with cancel.heard(CancelationException):
            weights = job.run(
                request,
                secrets=secrets,
                output=_output_folder(),
                flux_base=os.environ.get("FLUX_BASE"),
                captioner=os.environ.get("CAPTIONER"),
                eye=os.environ.get("EYE"),
                log=lambda line: print(line, flush=True),
                metric=current_scope().record_metric,
                gpus=os.environ.get("GPUS"),
                states=os.environ.get("CHECKPOINTS"),
            )
    except Exception as error:
        # Cog passes on the message alone, which is enough for what a user can mend; of other faults the log has the way
        # there. script/train tells failures in its own way.
        if not isinstance(error, (ValueError, OSError)):
            logging.getLogger("train").exception("the training failed")
        raise
    return TrainingOutput(weights=Path(weights))


def _whole(number: Optional[int]) -> Optional[int]:
    """Cog lets 5.0 pass for a whole number, and hands over a float."""
    return None if number is None else int(number)


def _output_folder() -> FilePath:
    """Where this process leaves its tar; the training before has been fetched by the time the next one begins."""
    return disk.temporary() / f"flux-lora-trainer-{os.getpid()}"
