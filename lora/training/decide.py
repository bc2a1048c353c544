"""What is decided for a training before it begins, each decision with its reason."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import FluxTransformer2DModel

from lora import presets
from lora.flux import adapter, flow, hardware
from lora.flux.base import Base
from lora.flux.hardware import Gpu, Plan
from lora.pictures import buckets
from lora.pictures.buckets import Merged
from lora.request import FIRMNESS, MAX_PREVIEWS, TrainRequest, parse_preservation, parse_resolution
from lora.training import recipe
from lora.training.fit import Settings

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decided:
    """Everything that was decided for one training. It stands in `request.json`, on the model card and in W&B."""

    base: str
    guidance_embeds: bool
    """Whether the base has a guidance input (`Base.guided`)."""
    licence: Mapping[str, str]
    """The base's own, as its files tell (`Base.licence`)."""
    plan: Plan
    resolutions: tuple[int, ...]
    settings: Settings
    preview_every: int
    """Steps between previews, 0 where they are drawn at the end alone."""
    merged: Merged = dataclasses.field(default_factory=dict)
    """Buckets that are given up for others."""
    text_tokens: int | None = None
    """What every text is padded to; None before the texts are known."""
    held_out: tuple[str, ...] = ()
    """The pictures that are kept out of the first part of the training."""
    resume_from_sha256: str | None = None
    suggested_steps: int | None = None
    """The training_steps that were decided here for a subject; None where they were asked for, and for a style, whose
    gains do not tell what its drawings show."""
    ranks: int = 1
    """GPUs that train together, each `settings.batch_size` pictures in a step."""
    weights_of_step: int | None = None
    """The step whose weights are returned; None before the training."""
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Why, by the name of a field of this record or of `settings`."""

    def record(self) -> dict[str, Any]:
        """As plain values, without what does not apply to this training."""
        told = {
            "base": self.base,
            "guidance_embeds": self.guidance_embeds,
            "licence": dict(self.licence),
            "plan": self.plan.reason,
            "resolutions": self.resolutions,
            "preview_every": self.preview_every,
            **dataclasses.asdict(self.settings),
            "text_tokens": self.text_tokens,
            "held_out": self.held_out,
            "reasons": dict(self.reasons),
        }
        later: dict[str, Any] = {"resume_from_sha256": self.resume_from_sha256, "weights_of_step": self.weights_of_step}
        later |= {"gpus": self.ranks if self.ranks > 1 else None}
        return told | {name: value for name, value in later.items() if value is not None}


def decide(
    request: TrainRequest,
    pictures: Sequence[tuple[int, int]],
    flux: Base,
    gpu: Gpu | None,
    changes: Mapping[str, Any],
    log: Log,
    ranks: int = 1,
    drawn: int | None = None,
) -> Decided:
    """Decides what the request left empty for pictures of these sizes, and tells each decision with its reason.

    `changes` are fields of `fit.Settings` other than those decided here: how the lab compares recipes. `ranks` counts
    the GPUs that train together: batch_size is shared out among them, and each has one picture at least. `drawn` is a
    seed that was chosen at random before, for a training that goes on. Raises ValueError where the GPU's memory is too
    small for any plan.
    """
    own = parse_resolution(request.resolution) if request.resolution else None
    resolutions, why_resolutions = presets.sides(request.priority, own, flux.resolutions)
    log(f"resolution: {', '.join(map(str, resolutions))}, {why_resolutions}")
    merged = buckets.merge(pictures, resolutions)
    sizes = {bucket for size in pictures for bucket in buckets.buckets_for(*size, resolutions, merged=merged)}
    nearest = f", after merging {len(merged)} into the nearest" if merged else ""
    over = (
        f"; merging to {buckets.MOST_SIZES} would crop some by over a quarter"
        if len(sizes) > buckets.MOST_SIZES
        else ""
    )
    log(f"picture sizes: {len(sizes)}{nearest}{over}")
    settings, reasons = _settings(request, len(pictures), flux, drawn, log)
    told = request.training_steps is None and request.lora_type == "subject"
    suggested = settings.steps if told else None
    half, why_half = half_above(request.lora_type, resolutions)
    if half:
        log(f"the largest resolution trains half as often as the others: {why_half}")
        settings = dataclasses.replace(settings, half_above=half)
    plan = hardware.plan(
        gpu,
        flux.parameters,
        resolutions,
        batch_size=max(1, request.batch_size // ranks),
        rank=request.lora_rank,
        # Preservation has states at the pictures' own sizes, at each of them at the most.
        recordings=len(sizes) * (2 if settings.prior_ratio else 1),
        full=settings.full,
    )
    log(f"plan: {plan.reason}")
    every = request.preview_every
    if (times := plan.batch_size * ranks / request.batch_size) > 1:
        settings, every, why = _together(settings, every, times)
        log(f"{plan.batch_size * ranks} pictures in a step, {plan.batch_size} a GPU: {why}")
        reasons |= {"gpus": why}
    return Decided(
        base=flux.name,
        guidance_embeds=flux.guided,
        licence=flux.licence,
        plan=plan,
        ranks=ranks,
        suggested_steps=suggested,
        resolutions=resolutions,
        merged=merged,
        settings=dataclasses.replace(settings, batch_size=plan.batch_size, **changes),
        preview_every=_preview_every(every, settings.steps, log),
        reasons=reasons | {"base": flux.reason, "plan": plan.reason, "resolutions": why_resolutions},
    )


def modules(pattern: str | None, skeleton: FluxTransformer2DModel, log: Log) -> list[str]:
    """The layers to train: those that `pattern` (layers_to_optimize_regex) finds, or all; the log is told where that
    choice had to be completed."""
    every = adapter.target_modules(skeleton)
    if pattern is None:
        return every
    asked, added = adapter.choose(every, pattern)
    log(f"layers: {len(asked)} of {len(every)} by layers_to_optimize_regex")
    if added:
        more = ", …" if len(added) > 3 else ""
        log(f"layers: {len(added)} added, so that the LoRA loads everywhere: {', '.join(added[:3])}{more}")
    chosen = {*asked, *added}
    return [module for module in every if module in chosen]


def half_above(lora_type: str, resolutions: Sequence[int]) -> tuple[int, str]:
    """Image tokens above which an example trains half as often, and why; 0 where all train equally often.

    The bound is the geometric mean of the two largest resolutions' areas, in tokens of 16 x 16 pixels.
    """
    sides = sorted(set(resolutions))
    if len(sides) < 2:
        return 0, "there is one resolution"
    if lora_type != "subject":
        return 0, "a style lost by it on the toy base, with one seed of two (docs/experiments.md)"
    return sides[-2] * sides[-1] // 256, "it takes most of the time; on the toy base a subject lost nothing measurable"


def _preview_every(asked: int, steps: int, log: Log) -> int:
    """What was asked for, or more where the number of steps was decided here and would make too many previews."""
    fewest = -(-steps // MAX_PREVIEWS)
    if not 0 < asked < fewest:
        return asked
    log(f"preview_every: {fewest} in place of {asked}: no more than {MAX_PREVIEWS} times in {steps} steps")
    return fewest


def _together(settings: Settings, preview_every: int, times: float) -> tuple[Settings, int, str]:
    """The settings for `times` as many pictures in a step, steps between previews likewise, and why."""
    steps, rate, why = recipe.for_larger_batch(settings.steps, settings.learning_rate, times)
    every = max(1, round(preview_every * steps / settings.steps)) if preview_every else 0
    return dataclasses.replace(settings, steps=steps, learning_rate=rate), every, why


def _settings(
    request: TrainRequest, pictures: int, flux: Base, drawn: int | None, log: Log
) -> tuple[Settings, dict[str, str]]:
    row, why_row = recipe.choose(flux.native, request.lora_type)
    asked = "as asked for"
    seed, why_seed = request.seed, asked
    if seed is None:
        seed = random.SystemRandom().randrange(2**32) if drawn is None else drawn
        why_seed = "chosen at random"
    full = request.finetune_type == "full"
    kind = "character" if request.mode == "character" else request.lora_type
    suited, least = recipe.steps_for(request.lora_type, request.mode, pictures), recipe.LEAST_STEPS[kind]
    suited_rate, why_suited = recipe.learning_rate_for(row, flux.width, request.lora_rank)
    if full:
        suited_rate, suited, why_suited = recipe.of_full(row, flux.width)
        least = recipe.LEAST_FULL_STEPS
    rate, why_rate = request.learning_rate, asked
    if rate is None:
        rate, why_rate = suited_rate, why_suited
    firmness = parse_preservation(request.preservation)
    ratio = firmness if isinstance(firmness, float) else FIRMNESS[firmness] * row.prior_ratio
    why_ratio = asked if request.preservation else f"as suits a {request.lora_type}"
    steps, why_steps = presets.steps(request.priority, request.training_steps, suited, least)
    log(f"seed: {seed}, {why_seed}")
    log(f"training steps: {steps}, {why_steps}")
    log(f"recipe: {why_row}")
    shape = f"held for {row.held:.0%} of the steps, then falling" if row.held else "falling from the start"
    log(f"learning rate: {rate:.3g}, {why_rate}; {shape}")
    evenly = f", {row.uniform_share:.0%} of them evenly from all" if row.uniform_share else ""
    log(f"timesteps: logit-normal with mean {row.timestep_mean:g}{evenly}")
    if ratio:
        log(
            f"prior preservation: in one step of {row.prior_every}, its gradient norm {ratio:g} times that of the"
            f" pictures, {why_ratio}"
        )
    else:
        log("prior preservation: off, as asked for; the LoRA will show in prompts without the trigger word")
    settings = Settings(
        steps=steps,
        batch_size=request.batch_size,
        learning_rate=rate,
        caption_dropout_rate=request.caption_dropout_rate,
        prior_ratio=ratio,
        seed=seed,
        timestep_mean=row.timestep_mean,
        uniform_share=row.uniform_share,
        held=row.held,
        prior_kinds=row.prior_kinds,
        prior_prompts=row.prior_prompts,
        prior_every=row.prior_every,
        stop_overfitted=row.stop_overfitted,
        prior_of_pictures=row.prior_of_pictures,
        prior_guidance=row.prior_guidance if flux.guided else flow.TRAINING_GUIDANCE,
        full=full,
    )
    why = {
        "seed": why_seed,
        "steps": why_steps,
        "learning_rate": why_rate,
        "prior_ratio": why_ratio,
        "recipe": why_row,
    }
    return settings, why
