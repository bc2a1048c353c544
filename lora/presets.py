"""What a request means: other trainers' names, and the presets `mode` and `priority`. Values and reasons, no models.

`settle` is called once, by `train.py`, with the inputs as they came; what then still depends on the pictures or the
base (`training_steps` left empty, `priority`) is decided by `lora.training.decide` with the rest of this file.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

from lora import trigger

T = TypeVar("T", int, str)

LORA_TYPES = ("subject", "style")
MODES: Mapping[str, str | None] = {"general": None, "character": "subject", "style": "style", "product": "subject"}
"""Each mode and the lora_type that it implies. Black Forest Labs' finetuning API has the same four: they decide how
captions are written, and "general" describes the whole picture."""
CAPTIONING = ("automatic", "disabled", "all")
"""What is captioned by the model: pictures without a caption; none; all, also those that have the user's own."""

TRIGGER_WORD, LORA_TYPE, LORA_RANK = "TOK", "subject", 16
"""What counts where the input is left empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The inputs of `train` that have a second name or follow from another, as they came; None: not given."""

    trigger_word: str | None = None
    lora_type: str | None = None
    mode: str | None = None
    captioning: str | None = None
    autocaption_prefix: str | None = None
    autocaption_suffix: str | None = None
    training_steps: int | None = None
    lora_rank: int | None = None
    trigger_phrase: str | None = None
    """fal's name of trigger_word."""
    is_style: bool | None = None
    """fal's lora_type."""
    autocaption: bool | None = None
    """ostris' captioning."""
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    """Of flux-pro-trainer."""
    steps: int | None = None
    """Of ostris' and fal's trainers."""
    iterations: int | None = None
    """Of Black Forest Labs' API."""
    rank: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Those among the inputs of `train`, by their names."""
        return cls(**{field.name: values.get(field.name) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled:
    """What they mean, and what a user should be told of it."""

    trigger_word: str
    lora_type: str
    captioning: str
    autocaption_prefix: str
    autocaption_suffix: str
    training_steps: int | None
    lora_rank: int
    notes: tuple[str, ...]
    """A line for each value that does not stand in the request as it is, with its reason."""
    faults: tuple[str, ...]
    """What contradicts itself, a line each; then the values are not to be used."""

    def all_faults(self) -> list[str]:
        """With what is wrong with the trigger word."""
        why = trigger.fault(self.trigger_word)
        return [*self.faults, *([f"trigger_word: {why}"] if why else [])]


def settle(asked: Asked) -> Settled:
    """Each input's one value from all of its names, then what `mode` implies, then what counts where all are empty."""
    notes: list[str] = []
    faults: list[str] = []

    def one(name: str, values: Mapping[str, T | None]) -> T | None:
        """The value of an input from its values by each of its names; None where none is given."""
        given = {used: value for used, value in values.items() if value is not None and value != ""}
        if not given:
            return None
        used, value = next(iter(given.items()))
        for other, also in given.items():
            if also != value:
                faults.append(
                    f"{other}: it means the same as {name}, and they differ: {_shown(used, value)},"
                    f" {_shown(other, also)}; give {name} alone"
                )
        if used != name:
            notes.append(f"{name}: {value!r}, given as {used}")
        return value

    style = None if asked.is_style is None else "style" if asked.is_style else "subject"
    captioned = None if asked.autocaption is None else "automatic" if asked.autocaption else "disabled"
    word = one("trigger_word", {"trigger_word": asked.trigger_word, "trigger_phrase": asked.trigger_phrase})
    tidied, taken = trigger.tidy(word) if word is not None else (TRIGGER_WORD, "")
    if word is not None and taken:
        notes.append(f"trigger_word: {tidied!r}; {taken} left out of {word[:80]!r}")
    kind = one("lora_type", {"lora_type": asked.lora_type, "is_style": style})
    implied = MODES.get(asked.mode or "")
    if implied and kind is None:
        notes.append(f"lora_type: {implied!r}, as mode {asked.mode!r} implies")
    elif implied and kind != implied:
        faults.append(f"mode: {asked.mode!r} is for a {implied}, and lora_type is {kind!r}; give one of the two alone")
    names = {"training_steps": asked.training_steps, "steps": asked.steps, "iterations": asked.iterations}
    prefixes = {"autocaption_prefix": asked.autocaption_prefix, "caption_prefix": asked.caption_prefix}
    suffixes = {"autocaption_suffix": asked.autocaption_suffix, "caption_suffix": asked.caption_suffix}
    return Settled(
        trigger_word=tidied,
        lora_type=kind or implied or LORA_TYPE,
        captioning=one("captioning", {"captioning": asked.captioning, "autocaption": captioned}) or CAPTIONING[0],
        autocaption_prefix=one("autocaption_prefix", prefixes) or "",
        autocaption_suffix=one("autocaption_suffix", suffixes) or "",
        training_steps=one("training_steps", names),
        lora_rank=one("lora_rank", {"lora_rank": asked.lora_rank, "rank": asked.rank}) or LORA_RANK,
        notes=tuple(notes),
        faults=tuple(faults),
    )


def _shown(name: str, value: object) -> str:
    return f"{name} is {value[:60]!r}" if isinstance(value, str) else f"{name} is {value}"


# ---------------------------------------------------------------- priority


@dataclasses.dataclass(frozen=True, kw_only=True)
class Priority:
    """What a preset of `priority` decides where the input itself is left empty."""

    sides: str
    """Which of the base's resolutions are trained at: "all", "smallest" or "largest"."""
    steps: float
    """Times the number of steps that suits the pictures."""
    previews: int | None
    """How many of the preview prompts with the trigger word are drawn; None: all."""


PRIORITIES = {
    "quality": Priority(sides="all", steps=1.0, previews=None),
    # A step at 512 pixels has 1,024 of the 2,475 tokens that a step at 512, 768 and 1024 by turns has on average, and
    # fal's krea-2-trainer calls 768 alone "~1.7x faster with near-identical style quality".
    "speed": Priority(sides="smallest", steps=0.5, previews=1),
    "high_res_only": Priority(sides="largest", steps=1.0, previews=None),
}
"""The three of Black Forest Labs' finetuning API; "quality" is what counts where none is named."""


def sides(priority: str, own: Sequence[int] | None, native: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """The resolutions in pixels to train at, and why. `own` are the user's, `native` the base's, both in order."""
    if own:
        return tuple(own), "as asked for"
    match PRIORITIES[priority].sides:
        case "smallest":
            return (min(native),), f"the smallest of the base's, as priority {priority!r} has it"
        case "largest":
            return (max(native),), f"the largest of the base's, as priority {priority!r} has it"
    return tuple(native), "the base's own"


def steps(priority: str, own: int | None, suited: tuple[int, str], least: int) -> tuple[int, str]:
    """The number of steps, and why. `own` is the user's, `suited` what suits the pictures with its reason, and `least`
    the fewest that a preset may come down to."""
    if own is not None:
        return own, "as asked for"
    count, why = suited
    share = PRIORITIES[priority].steps
    if share == 1:
        return count, why
    return max(least, round(count * share)), f"{why}; times {share:g} as priority {priority!r} has it, at least {least}"
