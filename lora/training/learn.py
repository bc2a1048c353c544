"""The training itself: from the bare transformer to the LoRA's weights, the previews and the loss curve."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from diffusers import FluxTransformer2DModel
from PIL import Image

from lora.file.names import Pair
from lora.flux import adapter, attention, base, forward, generate, hardware, schnell
from lora.flux.base import Base
from lora.flux.encode import Example, Text
from lora.flux.hardware import Plan
from lora.result import preview
from lora.result.curve import Curve
from lora.result.preview import Preview
from lora.result.verdict import Measured
from lora.training import examine, fit, graphs, prior
from lora.training.checkpoints import Checkpoints
from lora.training.examine import Examination, Questions
from lora.training.fit import Settings, StepReport
from lora.training.prompts import Asked
from lora.training.watch import WARNING, Audience, BrokeDown, Watch, follow

PREVIEW_STEPS = 20
"""Of a drawing: enough to see what was learned; the 28 that people draw with take two fifths more time."""
PREVIEW_SIDE = 768
"""Pixels: as much as a preview shows, in half the time of 1024."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What is trained, and on what, encoded once: it stays as it is when the training has to begin again."""

    modules: Sequence[str]
    rank: int
    resolutions: Sequence[int]
    learned: Sequence[Example]
    unseen: Sequence[Example]
    """Of the pictures that are held out of the first part of the training."""
    questions: Questions
    """What the verdict asks."""
    texts: Mapping[str, Text]
    asked: Sequence[str]
    """The previews' prompts."""
    preview_every: int
    """Steps; 0: previews at the end alone."""
    apart: Sequence[Asked]
    """The preservation prompts."""
    start: Mapping[str, Pair] | None
    """The LoRA to go on from."""
    all_checkpoints: bool = False
    """Whether the kept checkpoints that are not returned are handed out too."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What a training leaves."""

    pairs: Mapping[str, Pair]
    """The LoRA by layer, in bf16 on the CPU; every weight is finite."""
    step: int
    """Whose weights they are."""
    plan: Plan
    """How it was trained in the end."""
    settings: Settings
    previews: Sequence[Preview]
    curve: Curve
    measured: Measured
    others: Mapping[int, Mapping[str, Pair]]
    """The LoRA at other kept steps, where they are asked for."""


def learn(material: Material, flux: Base, plan: Plan, settings: Settings, told: Audience) -> Learned:
    """Trains, and draws the previews.

    Where the GPU's memory runs out it begins again, once, with a safer plan; and where its steps cannot be recorded,
    without that. Raises ValueError where that is not enough either, or the loss is no longer a number.
    """
    ran_out = False
    while True:
        try:
            return _attempt(material, flux, plan, settings, told)
        except graphs.CannotRecord as error:
            again = dataclasses.replace(plan, recorded=False)
            why = f"the steps cannot be recorded on this GPU and are run as they are, which is slower ({error})"
            safer = None if ran_out else hardware.safer(plan)
            if isinstance(error, graphs.NoRoomToRecord) and safer:
                ran_out, again, why = True, safer, f"the GPU's memory ran out in recording: {safer.reason}"
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
            safer = None if ran_out else hardware.safer(plan)
            if safer is None:
                raise ValueError(
                    f"the GPU's memory ran out ({plan.reason}; batch_size {settings.batch_size}, resolution"
                    f" {','.join(map(str, material.resolutions))}, {len(material.learned)} examples): set a lower"
                    " resolution, batch_size or lora_rank, send fewer pictures, or take a GPU with more memory"
                ) from error
            ran_out, again, why = True, safer, f"the GPU's memory ran out: {safer.reason}"
        finally:
            # Behind the except, whose traceback holds the failed attempt's tensors.
            base.free(anywhere=True)
        plan, settings = again, dataclasses.replace(settings, batch_size=again.batch_size)
        told.log(f"{WARNING}{why}; once more from the start of the training")


def _attempt(material: Material, flux: Base, plan: Plan, settings: Settings, told: Audience) -> Learned:
    texts, asked, stage = material.texts, material.asked, told.stage
    with contextlib.ExitStack() as lent:
        with stage("loading the transformer"):
            transformer = lent.enter_context(flux.transformer(plan))
            lent.enter_context(forward.for_training(transformer))
            if plan.checkpointing:
                transformer.enable_gradient_checkpointing()
        with stage("drawing what the base draws"):
            priors, examination = _of_the_base(transformer, material, flux, settings)
        sketch = _sketcher(material, flux, plan, transformer, settings.seed, told)
        with stage("training"):
            parameters = adapter.attach(transformer, material.rank, settings.seed, material.modules, material.start)
            told.log(f"{sum(p.numel() for p in parameters):,} weights to train, on {len(material.learned)} examples")
            if plan.device == "cuda":
                shapes = _attended(transformer, material, priors, settings.batch_size)
                lent.enter_context(attention.checked(shapes, parameters[0].device, plan.dtype, told.log))
            if plan.recorded:
                recorded = {example.size for example in (*material.learned, *material.unseen)}
                told.log(f"recording the passes of {len(recorded)} sizes of pictures first, about a second each")
            reports = fit.fit(
                transformer, parameters, material.learned, priors, texts, settings, plan.recorded, material.unseen
            )
            checkpoints = Checkpoints(parameters, settings.steps)
            watch = Watch(
                settings.steps,
                settings.late_from,
                examination,
                checkpoints,
                sketch,
                asked,
                material.preview_every,
                told,
            )
            losses = _followed(reports, settings.steps, watch, checkpoints, told)
            del reports  # and with it the optimizer
            best, why = checkpoints.overfitted(), "held-out pictures were explained best there"
            if best is None:
                best, why = checkpoints.choose()
            told.log(f"checkpoint: step {best.step} of {len(losses)} is returned: {why}")
            others = {}
            for kept in checkpoints.kept if material.all_checkpoints else ():
                if kept is not best:
                    checkpoints.put_back(kept)
                    others[kept.step] = adapter.trained(transformer)
            checkpoints.put_back(best)
            measured = examination.measure()
            pairs = adapter.trained(transformer)
        with stage("previews"):
            after = sketch()
            told.tracked.pictures(asked, len(losses), after)
            transformer.disable_adapters()
            previews = preview.pair_up(asked, sketch(), {**watch.drawn_before(best.step), best.step: after})
    curve = Curve(losses=losses, checks=watch.checks, best=best.step if best.step < len(losses) else None)
    return Learned(
        pairs=pairs,
        step=best.step,
        plan=plan,
        settings=settings,
        previews=previews,
        curve=curve,
        measured=measured,
        others=others,
    )


def _of_the_base(
    transformer: FluxTransformer2DModel, material: Material, flux: Base, settings: Settings
) -> tuple[list[prior.Prior], Examination]:
    """What the base draws for the preservation prompts, and its losses for the verdict: before the LoRA is there."""
    of_pictures = [one for one in material.apart if settings.prior_of_pictures and one.caption is not None]
    drawn = [one.prompt for one in material.apart if one not in of_pictures]
    sizes = [example.size for example in material.learned]
    draw = functools.partial(
        prior.draw,
        transformer,
        material.texts,
        scheduler=flux.scheduler,
        guidance=settings.guidance,
        drawing_guidance=settings.prior_guidance,
    )
    priors = draw(drawn, prior.shared_out(sizes, len(drawn)), seed=settings.seed)
    pictures = [*material.learned, *material.unseen]
    priors += prior.noised(transformer, material.texts, of_pictures, pictures, settings.seed, settings.guidance)
    unseen = material.questions.apart
    smallest = prior.shared_out(sizes, 1) * len(unseen)
    states = examine.thinned(draw(unseen, smallest, seed=settings.seed + 1))
    examination = Examination(
        transformer, material.learned, material.unseen, material.questions, states, material.texts, settings.seed
    )
    return priors, examination


def _followed(
    reports: Iterator[StepReport], steps: int, watch: Watch, checkpoints: Checkpoints, told: Audience
) -> list[float]:
    """The loss of every step. Where the training breaks down past half, the last sound checkpoint is as good as its
    end; before that, BrokeDown."""
    try:
        losses = follow(reports, steps, watch, told)
        if not checkpoints.kept:
            raise ValueError("the training broke down: its loss is no number at the end; lower learning_rate")
        return losses
    except BrokeDown as error:
        if not checkpoints.kept:
            raise
        last = checkpoints.kept[-1].step
        told.log(f"{WARNING}{error}; the weights of step {last}, the last sound ones, are returned")
        return error.losses[:last]


def _attended(
    transformer: FluxTransformer2DModel, material: Material, priors: Sequence[prior.Prior], batch_size: int
) -> list[attention.Shape]:
    """The shapes that the training's attention has: text and picture of every size."""
    text = len(next(iter(material.texts.values()))["prompt_embeds"])
    pictures = {len(example.mean) for example in material.learned} | {len(prior.noisy) for prior in priors}
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    return [(batch_size, text + picture, heads, width) for picture in sorted(pictures)]


def _sketcher(
    material: Material, flux: Base, plan: Plan, transformer: FluxTransformer2DModel, seed: int, told: Audience
) -> Callable[[], list[Image.Image]]:
    """A function that draws a picture for each preview's prompt with the transformer as it is then, always from the
    same noise. The autoencoder is on the device only while it draws.

    Where drawing fails, whatever it is, there are no pictures and a warning says why: none is worth the training.
    """
    side = min(max(material.resolutions), PREVIEW_SIDE)
    steps = PREVIEW_STEPS if flux.guided else schnell.STEPS

    def sketch() -> list[Image.Image]:
        try:
            with flux.vae(plan) as vae:
                pipeline = generate.pipeline_of(transformer, vae, flux.scheduler)
                asked = [material.texts[prompt] for prompt in material.asked]
                seeds = [seed + i for i in range(len(asked))]
                with forward.of_diffusers(transformer):
                    return generate.draw_all(pipeline, asked, (side, side), seeds, steps)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            told.log(f"{WARNING}previews could not be drawn and are left out; the training is not touched ({reason})")
            return []

    return sketch
