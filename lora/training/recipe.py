"""The recipe: every number that depends on the base, on what is learned and on the rank, with where it comes from.

There is a row for FLUX.1-dev and one for the toy base, each for a subject and for a style. The toy base is a thousandth
of FLUX.1-dev's size and draws 96 pixels: it shows that a mechanism works, and hundredths found on it say nothing about
FLUX.1-dev. So a number in FLUX.1-dev's row comes from the field or from a paper wherever there is one, and says so.

To change a recipe, change a row here; `docs/development.md` says how to measure the change.
"""

import dataclasses
import math
from typing import Any

FLUX_WIDTH = 3072
"""Of FLUX.1-dev's hidden state."""
RANK = 16
"""The rank that the learning rates are for."""
SMALLEST_REAL_BASE = 256
"""Pixels of a base's native side; below it the toy's row is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row. The comment beside each number of a row names its source: field, paper or toy."""

    base: str
    """Which base it is for, in words."""
    learning_rate: float
    """The peak, for AdamW at RANK and FLUX.1-dev's width (`learning_rate_for` adapts it to others)."""
    held: float
    """Share of the steps for which the rate stays at its peak before it falls, 0 to 1."""
    timestep_mean: float
    """Of the logit-normal from which a picture's timestep is drawn; higher means more noise."""
    uniform_share: float
    """Share of the timesteps that are drawn evenly from 0 to 1 instead."""
    prior_ratio: float
    """Norm of the preservation's gradient over that of the pictures', in a step that looks at both (`balance`)."""
    prior_every: int
    """Every how many steps the preservation prompts are looked at."""
    prior_prompts: int
    """How many preservation prompts there are."""
    prior_kinds: tuple[str, ...]
    """What they ask for, in turn (`prompts.apart`)."""
    prior_of_pictures: bool
    """Whether the states of prompts that come from captions are the pictures with noise (`prior.noised`), instead of
    the base's drawings (`prior.draw`)."""
    prior_guidance: float
    """The guidance that drawings go by."""
    full_learning_rate: float
    """The peak where the weights themselves are trained (`lora.training.full`), for FLUX.1-dev's width."""
    full_steps: int
    """How many steps then, whatever the number of pictures."""
    stop_overfitted: bool
    """Whether a training whose gain on held-out pictures falls is stopped (`checkpoints.TURNED_BY`); else it is warned
    of."""


_TOY_PRIOR: dict[str, Any] = {
    "prior_kinds": ("captions", "near", "things"),
    "prior_prompts": 96,
    "prior_of_pictures": False,
    "prior_guidance": 1.0,
    "full_learning_rate": 1e-4,
    "full_steps": 300,
    "stop_overfitted": True,
}
"""Found on the toy: half of the other words near the trigger word cost the subject nothing and halved what shows under
them; with 32 drawings a style showed under another word three times as often as with 96. Of five rates for whole
weights 1e-4 showed the subject most; 1000 steps no more than 300 (docs/experiments.md)."""
_SUBJECT_KINDS = ("captions", "near", "noun", "natural")
_STYLE_KINDS = ("captions", "near", "natural", "natural")

FLUX_DEV = {
    "subject": Recipe(
        base="FLUX.1-dev",
        learning_rate=4e-4,  # field: ostris/flux-dev-lora-trainer on Replicate; Astria's portraits take 5e-4
        held=0.5,  # toy: learns faster than falling from the start, nothing else suffers
        timestep_mean=0.0,  # paper: arXiv:2403.03206, 3.1; field: ai-toolkit, kohya, SimpleTuner
        uniform_share=0.0,  # field: the same
        prior_ratio=0.5,  # toy: what a weight of 0.4 in every second step was, from the first step to the last
        prior_every=2,  # toy: more and lighter looks keep as much and teach more
        prior_prompts=64,  # estimated: as many passes as 96 drawings of the smallest size took
        prior_of_pictures=True,  # field: ai-toolkit's diff_output_preservation, OneTrainer#505
        prior_guidance=3.5,  # field: what people draw with; at 1 FLUX.1-dev's pictures are pale
        prior_kinds=_SUBJECT_KINDS,  # toy: near words cost the subject nothing; people: the class noun bleeds first
        full_learning_rate=1e-5,  # field: Black Forest Labs' finetuning API (docs.bfl.ai), finetune_type full
        full_steps=300,  # field: the same, `iterations`
        stop_overfitted=False,  # toy: the bound is of its plain pictures, of whose loss a LoRA takes most away
    ),
    "style": Recipe(
        base="FLUX.1-dev",
        learning_rate=4e-4,  # field: ostris' trainer; 8e-4 would be the hottest of all trainers'
        held=0.0,  # toy: a style at a high rate needs the long decay
        timestep_mean=3.0,  # paper: log-SNR N(-6, 2) of Style-Friendly, arXiv:2411.14793, on FLUX.1-dev
        uniform_share=0.25,  # toy: strokes are decided at little noise
        prior_ratio=1.5,  # toy: what a weight of 0.6 was (1 at the start, 2 at the end)
        prior_every=2,  # toy
        prior_prompts=64,  # as for a subject; twice the drawings make it two fifths more passes, estimated
        prior_of_pictures=True,  # field: as for a subject
        prior_guidance=3.5,  # field: as for a subject
        prior_kinds=_STYLE_KINDS,  # as for a subject, but a style has no class noun
        full_learning_rate=1e-5,  # field: as for a subject
        full_steps=300,  # field: as for a subject
        stop_overfitted=False,  # as for a subject
    ),
}
TOY = {
    "subject": dataclasses.replace(FLUX_DEV["subject"], base="the toy base", **_TOY_PRIOR),
    "style": dataclasses.replace(
        FLUX_DEV["style"],
        base="the toy base",
        learning_rate=8e-4,  # toy: 4e-4 learns less
        **{**_TOY_PRIOR, "prior_kinds": ("captions", "near", "things", "things")},  # toy: a style spreads further
    ),
}


def is_toy(native: int) -> bool:
    """Whether a base that draws `native` pixels a side is the toy base or one like it."""
    return native < SMALLEST_REAL_BASE


def choose(native: int, lora_type: str) -> tuple[Recipe, str]:
    """The row for a base that draws `native` pixels a side and for "subject" or "style"; and why, in words."""
    rows = TOY if is_toy(native) else FLUX_DEV
    row = rows[lora_type]
    return row, f"{row.base}'s for a {lora_type}, since the base draws {native} pixels a side"


def at_width(rate: float, width: int) -> float:
    """A learning rate for FLUX.1-dev's width, brought to a base of another.

    Adam's steps have the same size for every weight, so a layer of n inputs moves its output by n times as much where
    they all pull together (muP, arXiv:2203.03466), by sqrt(n) times where they do not. The power is between the two:
    on the toy base ten times the rate learned no less than five times and more than twenty times.
    """
    return rate * (FLUX_WIDTH / width) ** 0.75


def learning_rate_for(row: Recipe, width: int, rank: int) -> tuple[float, str]:
    """The peak learning rate of a row on a base of this width at this rank, and why.

    With alpha = rank every rank adds its part to the product, so above RANK the rate falls as the scale does in rsLoRA
    (arXiv:2312.03732). A lower rank has the rate of RANK.
    """
    rate = at_width(row.learning_rate, width)
    reason = f"{row.learning_rate:.2g} at FLUX.1-dev's width"
    if width != FLUX_WIDTH:
        reason += f" {FLUX_WIDTH}, times ({FLUX_WIDTH}/{width})^0.75"
    if rank > RANK:
        rate *= (RANK / rank) ** 0.5
        reason += f", times ({RANK}/{rank})^0.5 for the rank"
    return rate, reason


STEPS_A_PICTURE = {"character": 27, "subject": 50, "style": 100}
"""Field: Astria's preset for portraits takes 27 a picture and its preset for styles 100; for other subjects Astria
advises 50 to 70 where the pictures to come are like those given."""
LEAST_STEPS = {"character": 300, "subject": 500, "style": 500}
"""Field: Astria's least is 300; diffusers' example for FLUX.1-dev trains 500 steps on five pictures of a dog."""
MOST_STEPS = 2000
"""Field: the most that Krea takes, and Civitai's default for FLUX.1; ostris' trainer has 1000 for any number."""


def steps_for(lora_type: str, mode: str | None, pictures: int) -> tuple[int, str]:
    """The number of steps that suits so many pictures of a subject, a style or (mode "character") a person; and why."""
    kind = "character" if mode == "character" else lora_type
    count = STEPS_A_PICTURE[kind] * pictures
    reason = f"{STEPS_A_PICTURE[kind]} for each of {pictures} pictures of a {kind}"
    if count < LEAST_STEPS[kind]:
        return LEAST_STEPS[kind], f"{reason}, but at least {LEAST_STEPS[kind]}"
    if count > MOST_STEPS:
        return MOST_STEPS, f"{reason}, but at most {MOST_STEPS}"
    return count, reason


LEAST_FULL_STEPS = 100
"""Field: the fewest that Black Forest Labs' API takes, for "fast exploration"."""


def of_full(row: Recipe, width: int) -> tuple[float, tuple[int, str], str]:
    """The peak learning rate where the weights themselves are trained on a base of this width; the number of steps and
    why; and why that rate. The rank has no say: a LoRA is made of the change when it is over."""
    rate, steps = row.full_learning_rate, row.full_steps
    why = f"{rate:.2g} for finetune_type full at FLUX.1-dev's width"
    if width != FLUX_WIDTH:
        why += f" {FLUX_WIDTH}, times ({FLUX_WIDTH}/{width})^0.75"
    return at_width(rate, width), (steps, "what finetune_type full takes for any number of pictures"), why


MOST_HEAT = 2**0.5
"""How many times the rate a larger batch may have. Toy: with eight pictures in a step twice the rate learned as much in
an eighth of the steps and cost its own word and the base more; 1.4 times did not (docs/experiments.md). Field:
FLUX.1-dev's rate is then 5.7e-4, near Astria's 5e-4; a public two-minute recipe on eight H100s, a picture on each,
takes 2e-4."""


def for_larger_batch(steps: int, rate: float, times: float) -> tuple[int, float, str]:
    """Steps and peak rate for `times` (above 1) as many pictures in a step as `steps` and `rate` are for, and why.

    As many pictures are seen in all. Adam's rate grows by the square root of the batch (Malladi et al. 2022,
    arXiv:2205.10287), up to MOST_HEAT.
    """
    fewer, heat = math.ceil(steps / times), min(MOST_HEAT, times**0.5)
    why = (
        f"{fewer} steps in place of {steps}, so as many pictures are seen; {heat:.3g} times the rate, {rate * heat:.3g}"
    )
    return fewer, rate * heat, why
