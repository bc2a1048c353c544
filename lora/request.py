"""One training request as plain data, and the rules that no single input can check for itself.

The ranges of single inputs stand in `train.py`, where Cog enforces them; what is checked here needs two inputs or a
parsed one. Nothing here touches the file's content, a model or the network.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from lora import trigger
from lora.presets import CAPTIONING, LORA_TYPES, MODES, PRIORITIES

FIRMNESS = {"": 1.0, "off": 0.0, "light": 0.5, "firm": 2.0}
"""What `preservation` means, times what suits the type."""
CHECKPOINTS = ("best", "all")
FINETUNE_TYPES = ("lora", "full")
RESOLUTION_RANGE = (64, 2048)
"""Pixels. Below 64 a FLUX picture has 4 x 4 tokens; above 2048 FLUX.1-dev does not draw soundly."""
MAX_PREVIEW_PROMPTS = 8
MAX_PREVIEWS = 60
"""In one training: they stay in memory, and go into the report."""
_PART = r"\w(?:[\w.-]{0,94}\w)?"
HUB_ID = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}", re.ASCII)
"""`owner/name`, as the Hugging Face Hub allows it."""
PATCH = 16
"""Pixels a token stands for, each way: 8 by the autoencoder, 2 by packing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Secrets:
    """What must not be written anywhere: it goes beside the request, and does not show itself."""

    hf_token: str | None = dataclasses.field(default=None, repr=False)
    wandb_api_key: str | None = dataclasses.field(default=None, repr=False)


NO_SECRETS = Secrets()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What a user asked for. Every field is one input of `train()`; no defaults here, and no secrets."""

    input_images: Path
    """A zip, tar or tar.gz of pictures, each with an optional `.txt` caption beside it."""
    trigger_word: str
    """1 to 60 characters, any script."""
    lora_type: str
    """One of LORA_TYPES."""
    mode: str | None
    """One of `presets.MODES`: how captions are written and which previews are drawn; None: as suits the type."""
    priority: str
    """One of `presets.PRIORITIES`, which decides what is left empty below."""
    captioning: str
    """One of `presets.CAPTIONING`: which pictures the captioning model writes for (the rest: a template)."""
    subject_crop: bool
    """Whether close-ups of small subjects are trained beside their pictures, where the captioning model is asked."""
    autocaption_prefix: str
    autocaption_suffix: str
    training_steps: int | None
    """Optimizer steps, 0 to 6000; 0, with `resume_from`, only packs that LoRA; None: chosen from the number of pictures
    and the type (`lora.training.recipe.steps_for`)."""
    finetune_type: str
    """One of FINETUNE_TYPES: whether the LoRA is trained, or the layers' weights, of whose change a LoRA of `lora_rank`
    is made (`lora.training.full`)."""
    learning_rate: float | None
    """1e-7 to 1e-2; None: chosen from the type, the rank and the base (`lora.training.recipe`)."""
    lora_rank: int
    """1 to 128."""
    resolution: str | None
    """Comma-separated sides in pixels; None: the base's own."""
    batch_size: int
    """Pictures a step, 1 to 8."""
    caption_dropout_rate: float
    """How often a picture trains with the empty caption, 0 to 1."""
    preservation: str
    """How firmly prompts without the trigger word are held to the base: empty (as suits the type), one of FIRMNESS, or
    a number, the ratio of gradient norms (`lora.training.balance`)."""
    seed: int | None
    """0 to 2**32 - 1; None: chosen at random and recorded."""
    checkpoints: str
    """One of CHECKPOINTS: whether the checkpoints that are not returned are kept beside the tar and uploaded."""
    preview_every: int
    """Steps between previews, 0 to 6000; 0 draws them at the end alone, where they are drawn in any case."""
    preview_prompts: str
    """What to draw, one prompt a line; empty: chosen by the type (`lora.result.preview.prompts`)."""
    layers_to_optimize_regex: str | None
    """Searched for in `transformer.<layer>`; None: every layer that can be adapted (`lora.flux.adapter.choose`)."""
    resume_from: str | None
    """An earlier LoRA to go on from: a file, an https URL, or `owner/name` or `owner/name/file` on the Hub."""
    hf_repo_id: str | None
    """`owner/name` on the Hugging Face Hub, to upload to."""
    hf_private: bool
    """Whether that repository is private, where it is made."""
    wandb_project: str | None
    wandb_run: str | None
    wandb_entity: str | None
    notes: tuple[str, ...] = ()
    """What the log tells of inputs that were given under another name or tidied (`presets.Settled`)."""
    faults: tuple[str, ...] = ()
    """Inputs that contradict each other (`presets.Settled`); `check` tells them with the others."""

    def warnings(self, secrets: Secrets = NO_SECRETS) -> list[str]:
        """What has no effect, a line each."""
        names = ("wandb_project", "wandb_run", "wandb_entity")
        given = [name for name in names if getattr(self, name)]
        if given and not secrets.wandb_api_key:
            return [f"{', '.join(given)}: without wandb_api_key nothing is shown at Weights & Biases; give that too"]
        return []

    def check(self, secrets: Secrets = NO_SECRETS) -> None:
        """Raises ValueError with every fault of the request in one message, one a line."""
        faults = [*self.faults]
        if not self.input_images.is_file():
            faults.append(f"input_images: {self._what_came()}; give a zip, tar or tar.gz of pictures")
        if why := trigger.fault(self.trigger_word):
            faults.append(f"trigger_word: {why}")
        for name in ("autocaption_prefix", "autocaption_suffix"):
            value = getattr(self, name)
            if trigger.breaks_the_line(value):
                faults.append(f"{name}: it holds a line break or a control character; give one line of text")
        for name, allowed in (
            ("lora_type", LORA_TYPES),
            ("priority", PRIORITIES),
            ("captioning", CAPTIONING),
            ("checkpoints", CHECKPOINTS),
            ("finetune_type", FINETUNE_TYPES),
        ):
            if getattr(self, name) not in allowed:
                faults.append(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.mode is not None and self.mode not in MODES:
            faults.append(f"mode: {self.mode!r} is not one of {', '.join(MODES)}")
        if self.preview_every and self.training_steps and self.training_steps / self.preview_every > MAX_PREVIEWS:
            faults.append(
                f"preview_every: {self.preview_every} of {self.training_steps} steps are more than {MAX_PREVIEWS}"
                f" previews, and each takes time; give {-(-self.training_steps // MAX_PREVIEWS)} or more, or 0"
            )
        faults += faults_of({name: getattr(self, name) or "" for name in PARSED})
        faults += self._faults_of_resuming() + self._faults_of_publishing(secrets)
        if faults:
            raise ValueError("\n".join(faults))

    def _what_came(self) -> str:
        """What is there in place of the archive."""
        given = re.sub(r"^(\w+:)/+", r"\1//", str(self.input_images))  # a Path has one slash of an address' two
        shown = without_secrets(given)[:80]
        if "://" in shown:
            return f"{shown!r} is an address that could not be fetched"
        return f"{self.input_images.name[:80]!r} is a folder" if self.input_images.is_dir() else f"no file {shown!r}"

    def _faults_of_resuming(self) -> list[str]:
        faults = []
        if self.training_steps == 0 and not self.resume_from:
            faults.append("training_steps: 0 only packs the LoRA of resume_from, which is empty; give 1 step or more")
        if self.resume_from and self.finetune_type == "full":
            faults.append(
                "finetune_type: full starts from the base and cannot continue the LoRA of resume_from; give one of the"
                " two alone"
            )
        if self.resume_from:
            source = self.resume_from
            hub = HUB_ID.fullmatch("/".join(source.split("/")[:2]))
            # Path.is_file raises where a name is too long, before Python 3.14
            address = source[:8].lower() == "https://" or source[:5].lower() == "data:"
            if not (address or hub or os.path.isfile(source)):
                shown = without_secrets(source[:200])
                faults.append(
                    f"resume_from: {shown!r} is no file here, no https URL, and no owner/name of the Hugging Face Hub"
                )
        if self.layers_to_optimize_regex is not None:
            try:
                re.compile(self.layers_to_optimize_regex)
            except (re.error, OverflowError, RecursionError) as error:
                faults.append(
                    f"layers_to_optimize_regex: {self.layers_to_optimize_regex!r} is no regular expression ({error});"
                    " an example is transformer.single_transformer_blocks.(7|12|16|20).proj_out"
                )
        return faults

    def _faults_of_publishing(self, secrets: Secrets) -> list[str]:
        faults = []
        if self.hf_repo_id and not HUB_ID.fullmatch(self.hf_repo_id):
            faults.append(
                f"hf_repo_id: {self.hf_repo_id!r} is not owner/name: letters, digits, '-', '_' and '.', 96 at most each"
            )
        if self.hf_repo_id and not secrets.hf_token:
            faults.append(
                "hf_token: it is needed to upload to hf_repo_id; give a token that may write, or leave both empty"
            )
        for name, secret in dataclasses.asdict(secrets).items():
            if secret and not (secret.isascii() and secret.isprintable() and " " not in secret):
                faults.append(f"{name}: it holds a space or a character that no token has; copy it once more")
        return faults


def without_secrets(address: str) -> str:
    """An address without its user, query and fragment, in which presigned ones carry their keys, or a `data:`
    address without its content."""
    if address[:5].lower() == "data:":
        return f"{address.partition(',')[0][:60]},..."
    scheme, found, rest = re.split(r"[?#]", address, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"


def parse_resolution(text: str) -> tuple[int, ...]:
    """ "512, 768,1024" -> (512, 768, 1024), sorted and without repeats; raises ValueError naming the input."""
    low, high = RESOLUTION_RANGE
    sides = set()
    for part in text.split(","):
        side = int(part) if part.strip().isascii() and part.strip().isdigit() else -1
        if not low <= side <= high or side % PATCH:
            which = repr(text) if part == text else f"{part.strip()!r} in {text!r}"
            raise ValueError(
                f"resolution: {which} is not a multiple of {PATCH} from {low} to {high};"
                ' give one or several, separated by commas, such as "512,768,1024"'
            )
        sides.add(side)
    return tuple(sorted(sides))


def parse_preservation(text: str) -> str | float:
    """One of FIRMNESS, or a ratio from 0 to 100; raises ValueError naming the input."""
    word = text.strip().lower()
    if word in FIRMNESS:
        return word
    try:
        ratio = float(word)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 100:
        raise ValueError(
            f"preservation: {text[:40]!r} is neither off, light nor firm, nor a number from 0 to 100 (the"
            " norm of its gradient relative to that of the pictures); leave it empty for what suits the type"
        )
    return ratio


def parse_prompts(text: str) -> list[str]:
    """The prompts of `preview_prompts`, one a line; raises ValueError naming the input."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > MAX_PREVIEW_PROMPTS:
        raise ValueError(
            f"preview_prompts: {len(lines)} prompts are more than {MAX_PREVIEW_PROMPTS}; give fewer, one a line"
        )
    return lines


PARSED: Mapping[str, Callable[[str], object]] = {
    "resolution": parse_resolution,
    "preservation": parse_preservation,
    "preview_prompts": parse_prompts,
}
"""Inputs of text that has a form, with what reads it."""


def faults_of(texts: Mapping[str, str]) -> list[str]:
    """What is wrong with these inputs of PARSED, a line each; an empty one is right."""
    faults = []
    for name, text in texts.items():
        try:
            if text:
                PARSED[name](text)
        except ValueError as error:
            faults.append(str(error))
    return faults
