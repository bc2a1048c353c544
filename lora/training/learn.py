"""The training itself: from the bare transformer to the LoRA's weights, the previews and the loss curve."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from lora.file.names import Pair
from lora.flux import adapter, attention, base, encode, forward, hardware
from lora.flux.base import Base
from lora.flux.extract import Held
from lora.flux.hardware import Plan
from lora.result import preview
from lora.result.curve import Curve
from lora.result.preview import Preview
from lora.result.verdict import Measured
from lora.training import examine, fit, full, graphs, prior
from lora.training.checkpoints import Checkpoints, due
from lora.training.examine import Examination
from lora.training.fit import Settings, StepReport
from lora.training.full import Change
from lora.training.ranks import ALONE, Ranks, World
from lora.training.sketch import Sketcher
from lora.training.state import Keeper
from lora.training.watch import WARNING, Audience, BrokeDown, Log, Watch, all_of, follow, preview_due
from lora.training.work import Material, Work


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
    held: Mapping[str, Held] | None
    """Where the weights themselves were trained, how much of each layer's change the LoRA holds."""


def learn(
    material: Material,
    flux: Base,
    plan: Plan,
    settings: Settings,
    told: Audience,
    ranks: Ranks | None = None,
    keeper: Keeper | None = None,
) -> Learned:
    """Trains, on every GPU that `ranks` has, and draws the previews. `keeper` saves the training's state now and then,
    and has the one to go on from.

    Where the GPU's memory runs out it begins again, once, with a safer plan; and where its steps cannot be recorded,
    without that. Raises ValueError where that is not enough either, or the loss is no longer a number.
    """
    ran_out = False
    while True:
        try:
            return _attempt(material, flux, plan, settings, told, ranks, keeper or Keeper())
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


def assist(work: Work, join: Callable[[], World]) -> None:
    """What a rank other than 0 does: its share of the drawings and previews, and its rows of every batch.

    `join` is called when the transformer is loaded, and waits for the others.
    """
    torch.set_num_threads(work.threads)
    if work.plan.device == "cuda":
        work = dataclasses.replace(work, material=_pinned(work.material))
    with contextlib.ExitStack() as lent:
        transformer = _loaded(work.flux, work.plan, lent)
        world = join()
        priors = _drawn(transformer, work.material, work.flux, work.settings, world)
        parameters = _adapted(transformer, work.material, work.settings)
        sketcher = _sketcher(work, transformer, _untold)
        for at in _steps(transformer, parameters, priors, work, world, lent, _untold):
            if preview_due(at.step, work.settings.steps, work.material.preview_every):
                sketcher.draw([True], world)
        sketcher.at_the_end(parameters, world)


def _untold(line: str) -> None:
    """The log of a rank other than 0."""


def _attempt(
    material: Material,
    flux: Base,
    plan: Plan,
    settings: Settings,
    told: Audience,
    ranks: Ranks | None,
    keeper: Keeper,
) -> Learned:
    asked, stage = material.asked, told.stage
    made_of = material.made_of(settings, ranks.size if ranks else 1)
    before = keeper.training(made_of) or {}
    with contextlib.ExitStack() as lent:
        work = Work(
            material=material,
            flux=flux,
            plan=plan,
            settings=settings,
            threads=torch.get_num_threads(),
            keeps=keeper.keeps,
            saved=before.get("fit"),
        )
        with stage("loading the transformer"):
            join = lent.enter_context(ranks.together(work)) if ranks else World
            transformer = _loaded(flux, plan, lent)
            world = join()
        with stage("drawing for prior preservation"):
            priors = _drawn(transformer, material, flux, settings, world)
            examination = _examination(transformer, material, flux, settings)
        sketcher = _sketcher(work, transformer, told.log)
        with stage("training"):
            parameters = _adapted(transformer, material, settings)
            change = Change(transformer, settings.seed) if settings.full else None
            count = sum(weight.numel() for weight in (change.weights.values() if change else parameters))
            told.log(f"weights to train: {count:,}; pictures, each size counted: {len(material.learned)}")
            reports = _steps(transformer, parameters, priors, work, world, lent, told.log, change)
            checkpoints = Checkpoints(parameters, settings.steps, settings.stop_overfitted)
            watch = Watch(
                settings.steps,
                settings.late_from,
                examination,
                checkpoints,
                lambda: sketcher.draw([True], world)[0],
                material,
                told,
            )
            if before:
                checkpoints.go_on(before["checkpoints"])
                watch.go_on(before["watch"])
            done = before.get("losses", ())
            between = _keeping(keeper, made_of, watch, checkpoints, done, alone=world.size == 1)
            with keeper.listening():
                look = full.looking(change, watch, examination, settings.steps, told.log) if change else watch
                losses = _followed(reports, settings.steps, look, checkpoints, told, done, between)
            del reports  # and with it the optimizer
            if change:
                change.remove()
            best, why = checkpoints.best()
            told.log(f"checkpoint: step {best.step} of {len(losses)} is returned: {why}")
            others = checkpoints.all_but(best, transformer) if material.all_checkpoints else {}
            checkpoints.put_back(best)
            measured = dataclasses.replace(examination.measure(), enough=watch.enough)
            pairs = adapter.trained(transformer)
        with stage("previews"):
            # Where the training ended early, the others wait for the next step and cannot help.
            after, without = sketcher.at_the_end(parameters, world if len(losses) == settings.steps else ALONE)
            told.tracked.pictures(asked, len(losses), after)
            previews = preview.pair_up(asked, without, {**watch.drawn_before(best.step), best.step: after})
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
        held=change.held[best.step] if change else None,
    )


def _pinned(material: Material) -> Material:
    """Where a process has read it from a file, as the one that encoded it has it."""
    own = {id(example): encode.pinned(example) for example in (*material.learned, *material.unseen)}
    return dataclasses.replace(
        material,
        learned=[own[id(example)] for example in material.learned],
        unseen=[own[id(example)] for example in material.unseen],
        texts={prompt: {key: t.pin_memory() for key, t in text.items()} for prompt, text in material.texts.items()},
    )


def _loaded(flux: Base, plan: Plan, lent: contextlib.ExitStack) -> FluxTransformer2DModel:
    transformer = lent.enter_context(flux.transformer(plan))
    lent.enter_context(forward.for_training(transformer))
    if plan.checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def _drawn(
    transformer: FluxTransformer2DModel, material: Material, flux: Base, settings: Settings, world: World
) -> list[prior.Prior]:
    """What the base draws for the preservation prompts, before the LoRA is there; each rank draws a part of it."""
    of_pictures = [one for one in material.apart if settings.prior_of_pictures and one.caption is not None]
    drawn = [one.prompt for one in material.apart if one not in of_pictures]
    sizes = prior.shared_out([example.size for example in material.learned], len(drawn))
    share = {"rank": world.rank, "ranks": world.size}
    priors = prior.draw(
        transformer,
        material.texts,
        drawn,
        sizes,
        scheduler=flux.scheduler,
        seed=settings.seed,
        guidance=settings.guidance,
        drawing_guidance=settings.prior_guidance,
        **share,
    )
    pictures = [*material.learned, *material.unseen]
    priors += prior.noised(
        transformer, material.texts, of_pictures, pictures, settings.seed, settings.guidance, **share
    )
    if world.size == 1:
        return priors
    every = world.gather(priors)
    return [encode.pinned(one) for one in every] if transformer.device.type == "cuda" else every


def _examination(
    transformer: FluxTransformer2DModel, material: Material, flux: Base, settings: Settings
) -> Examination:
    """The base's losses for the verdict: before the LoRA is there."""
    unseen = material.questions.apart
    smallest = prior.shared_out([example.size for example in material.learned], 1) * len(unseen)
    drawn = prior.draw(
        transformer,
        material.texts,
        unseen,
        smallest,
        scheduler=flux.scheduler,
        seed=settings.seed + 1,
        guidance=settings.guidance,
        drawing_guidance=settings.prior_guidance,
    )
    return Examination(
        transformer,
        material.learned,
        material.unseen,
        material.questions,
        examine.thinned(drawn),
        material.texts,
        settings.seed,
    )


def _adapted(transformer: FluxTransformer2DModel, material: Material, settings: Settings) -> list[torch.nn.Parameter]:
    return adapter.attach(transformer, material.rank, settings.seed, material.modules, material.start)


def _steps(
    transformer: FluxTransformer2DModel,
    parameters: Sequence[torch.nn.Parameter],
    priors: Sequence[prior.Prior],
    work: Work,
    world: World,
    lent: contextlib.ExitStack,
    log: Callable[[str], None],
    change: Change | None = None,
) -> Iterator[StepReport]:
    material, plan, settings = work.material, work.plan, work.settings
    if plan.device == "cuda":
        shapes = _attended(transformer, material, priors, settings.batch_size)
        lent.enter_context(attention.checked(shapes, parameters[0].device, plan.dtype, log))
    if plan.recorded:
        pictures = {example.size for example in (*material.learned, *material.unseen)}
        count = len(pictures) + len({one.size for one in priors})
        log(f"recording {count} passes first, one for each size of pictures and of preservation, about a second each")
    return fit.fit(
        transformer,
        parameters,
        material.learned,
        priors,
        material.texts,
        settings,
        plan.recorded,
        material.unseen,
        world,
        work.saved,
        due(settings.steps) if work.keeps else (),
        change,
    )


def _keeping(
    keeper: Keeper, made_of: str, watch: Watch, checkpoints: Checkpoints, done: Sequence[float], alone: bool
) -> Callable[[StepReport, Sequence[Tensor]], None]:
    """What to do between two steps: saves the training's state where that is due; `done` are the losses of the steps
    that it went on from."""

    def between(report: StepReport, losses: Sequence[Tensor]) -> None:
        if keeper.due(looked=report.step in checkpoints.due, alone=alone):
            seen = {"checkpoints": checkpoints.state(), "watch": watch.state(), "losses": all_of(done, losses)}
            keeper.save(report.step, made_of, {"fit": report.state(), **seen})
        keeper.leave_if_asked()

    return between


def _followed(
    reports: Iterator[StepReport],
    steps: int,
    watch: Callable[[int], bool],
    checkpoints: Checkpoints,
    told: Audience,
    before: Sequence[float],
    between: Callable[[StepReport, Sequence[Tensor]], None],
) -> list[float]:
    """The loss of every step. Where the training breaks down past half, the last sound checkpoint is as good as its
    end; before that, BrokeDown."""
    try:
        losses = follow(reports, steps, watch, told, before, between)
        if not checkpoints.kept:
            raise ValueError("the training broke down: its loss is not a number at the end; lower learning_rate")
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
    pictures = {len(example.mean) for example in (*material.learned, *material.unseen)}
    pictures |= {len(prior.noisy) for prior in priors}
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    return [(batch_size, text + picture, heads, width) for picture in sorted(pictures)]


def _sketcher(work: Work, transformer: FluxTransformer2DModel, log: Log) -> Sketcher:
    material, seed = work.material, work.settings.seed
    largest = max(material.resolutions)
    return Sketcher(transformer, work.flux, work.plan, material.texts, material.asked, largest, seed, log)
