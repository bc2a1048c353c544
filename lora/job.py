"""One training from the archive to the tar: the whole story, in order."""

import contextlib
import dataclasses
import functools
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import diffusers
import transformers
from diffusers import FluxTransformer2DModel
from PIL import Image

from captioner import caption, text
from captioner.text import Caption, Rules
from lora import (
    adapter,
    archive,
    base,
    buckets,
    encode,
    fit,
    generate,
    hardware,
    photos,
    prior,
    record,
    report,
    survey,
    validation,
)
from lora.base import Base
from lora.encode import Text
from lora.fit import Settings
from lora.hardware import Plan
from lora.photos import Photo
from lora.report import Lesson
from lora.request import TrainRequest, parse_prompts, parse_resolution
from lora.watch import WARNING, Log, Metric, Remembering, Stages, Watch, follow

WEIGHTS_MEMBER = "output/flux_train_replicate/lora.safetensors"
"""Where every reader of such a tar looks, and the only safetensors that it may hold."""
PRIOR_PROMPTS = 96
PREVIEW_SIDE = 768
"""Pixels: as much as a preview shows, in half the time of 1024."""


def run(
    request: TrainRequest, *, output: Path, flux_base: str | None, captioner: str | None, log: Log, metric: Metric
) -> Path:
    """Trains, and returns the path of the tar, `output / "trained_model.tar"`, which is moved there when it is whole.

    Everything else lies in a work folder of its own, which is gone afterwards, however the run ends. Raises ValueError
    for what a user can mend, with a message that is enough by itself.
    """
    # Their bars redraw one line, which a log shows as thousands; what they warn of is said below, once.
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    log = warned = Remembering(log)
    gpu = hardware.read_gpu()
    flux = base.find(flux_base, gpu)
    log(f"base: {flux.name} ({flux.reason})")
    request.check()
    rules = _rules(request, flux)
    text.check(rules)
    resolutions = parse_resolution(request.resolution) if request.resolution else flux.resolutions
    plan = hardware.plan(gpu, request, flux.parameters, resolutions)
    log(f"plan: {plan.reason}")
    settings = _settings(request, flux, log)
    decided = {"base": flux.name, "plan": plan.reason, "resolutions": resolutions, **dataclasses.asdict(settings)}

    stage = Stages(log)
    with tempfile.TemporaryDirectory(prefix="flux-lora-") as folder, contextlib.ExitStack() as lent:
        work = Path(folder)
        with stage("unpacking"):
            found = _unpack(request.input_images, work / "pictures", resolutions, log)
            data = record.data_hash(found)
        with stage("captioning"):
            captions, rules = _captions(found, rules, request, captioner, plan, log)
            spoken = [captions[photo.name].text for photo in found]
        with stage("encoding pictures"):
            thumbnails: dict[str, bytes] = {}
            examples = encode.encode_pictures(flux, plan, _pictures(found, captions, resolutions, thumbnails, log))
            held_out = _hold_out(request, found, settings.seed, log)
            unseen = [example for example in examples if validation.is_of(held_out, example)]
            learned = [example for example in examples if example not in unseen]
        with stage("encoding prompts"):
            asked = _preview_prompts(request, flux, rules)
            apart = prior.prompts(
                spoken, request.trigger_word, PRIOR_PROMPTS if request.prior_loss_weight else 0, settings.seed
            )
            texts, cut = encode.encode_texts(flux, plan, ["", *spoken, *asked, *apart])
            for prompt in (prompt for prompt in cut if prompt in spoken):
                log(f"{WARNING}the base reads {flux.t5_tokens} tokens, so the end is lost of: {prompt}")
        with stage("loading the transformer"):
            transformer = lent.enter_context(flux.transformer(plan))
            if plan.checkpointing:
                transformer.enable_gradient_checkpointing()
        with stage("drawing what the base draws"):
            priors = prior.draw(transformer, texts, apart, _square(min(resolutions)), flux.scheduler, settings.seed)
        side = min(max(resolutions), PREVIEW_SIDE)
        sketch = _sketcher(flux, plan, transformer, texts, asked, (side, side), settings.seed)
        with stage("training"):
            parameters = adapter.attach(transformer, request.lora_rank, settings.seed)
            log(f"{sum(p.numel() for p in parameters):,} weights to train, on {len(learned)} examples")
            reports = fit.fit(transformer, parameters, learned, priors, texts, settings)
            looked_at = validation.smallest(unseen or learned)
            check = functools.partial(validation.loss, transformer, looked_at, texts, settings.seed)
            turn = validation.Turn(parameters) if unseen else None
            watch = Watch(settings.steps, check, turn, sketch, request.preview_every, log, metric)
            curve = watch.curve(follow(reports, settings.steps, watch, log, metric))
        with stage("previews"):
            drawn = {**watch.drawn, watch.best or len(curve.losses): sketch()}
            transformer.disable_adapters()
            previews = report.pair_up(asked, sketch(), drawn)
            transformer.enable_adapters()
        with stage("packing"):
            members = {WEIGHTS_MEMBER: work / "lora.safetensors"}
            adapter.save(transformer, members[WEIGHTS_MEMBER], record.header(request, decided, spoken))
            lessons = [
                Lesson(name=name, caption=told.text, source=told.source, note=told.note, thumbnail=thumbnails[name])
                for name, told in captions.items()
            ]
            members |= _captions_files(work / "captions", captions)
            members["request.json"] = work / "request.json"
            written = record.request_json(request, decided, data)
            members["request.json"].write_text(written, encoding="utf-8")
            members |= report.write(work / "report", written, lessons, previews, curve, warned.warnings)
            output.mkdir(parents=True, exist_ok=True)
            tar = output / "trained_model.tar"
            archive.pack(members, tar)
    log(stage.table())
    for name, seconds in stage.seconds.items():
        metric(f"seconds_{name.replace(' ', '_')}", seconds)
    return tar


def _rules(request: TrainRequest, flux: Base) -> Rules:
    return Rules(
        trigger_word=request.trigger_word,
        lora_type=request.lora_type,
        prefix=request.autocaption_prefix,
        suffix=request.autocaption_suffix,
        class_noun=None,
        t5=text.Room(text.estimate_tokens, flux.t5_tokens),
        clip=text.Room(text.estimate_tokens, flux.clip_tokens),
    )


def _settings(request: TrainRequest, flux: Base, log: Log) -> Settings:
    """The request with everything that was left empty decided, and the log told why."""
    seed, why_seed = request.seed, "as asked for"
    if seed is None:
        seed, why_seed = random.SystemRandom().randrange(2**32), "chosen at random"
    rate, why_rate = request.learning_rate, "as asked for"
    if rate is None:
        rate, why_rate = fit.default_learning_rate(request.lora_type, flux.width)
    log(f"seed: {seed}, {why_seed}")
    log(f"learning rate: {rate:.3g}, {why_rate}")
    return Settings(
        steps=request.training_steps,
        batch_size=request.batch_size,
        learning_rate=rate,
        caption_dropout_rate=request.caption_dropout_rate,
        prior_loss_weight=request.prior_loss_weight,
        seed=seed,
    )


def _unpack(path: Path, folder: Path, resolutions: Sequence[int], log: Log) -> list[Photo]:
    """The photos of the archive, every one of them seen to be whole; the log is told what will train badly."""
    found, warnings = photos.pair(folder, archive.unpack(path, folder))
    looks = survey.look_at({photo.name: photo.path for photo in found})
    for warning in (*warnings, *survey.report(looks, resolutions)):
        log(f"{WARNING}{warning}")
    log(f"{len(found)} pictures, {sum(photo.caption is not None for photo in found)} of them with a caption")
    return found


def _captions(
    found: Sequence[Photo], rules: Rules, request: TrainRequest, captioner: str | None, plan: Plan, log: Log
) -> tuple[dict[str, Caption], Rules]:
    """A caption for every photo, by its name, and the rules with the class noun where one was found."""
    captions, class_noun = caption.caption_all(
        {photo.name: photo.path for photo in found},
        {photo.name: photo.caption for photo in found if photo.caption is not None},
        rules,
        autocaption=request.autocaption,
        model=captioner,
        device=plan.device,
        dtype=plan.dtype,
        read=buckets.read_picture,
        log=log,
    )
    return captions, dataclasses.replace(rules, class_noun=class_noun)


def _pictures(
    found: Sequence[Photo],
    captions: Mapping[str, Caption],
    resolutions: Sequence[int],
    thumbnails: dict[str, bytes],
    log: Log,
) -> Iterator[tuple[str, str, Image.Image]]:
    """Every photo in each of its buckets: name, caption, picture. Leaves a thumbnail of each in `thumbnails`."""
    for photo, fitted in zip(found, buckets.prepared([p.path for p in found], resolutions), strict=True):
        log(f"{photo.name}: {', '.join(f'{picture.width}x{picture.height}' for picture in fitted)}")
        thumbnails[photo.name] = report.thumbnail(fitted[-1])
        for picture in fitted:
            yield photo.name, captions[photo.name].text, picture


def _square(side: int) -> tuple[int, int]:
    """Pixels to latent cells, eight pixels each."""
    return side // 8, side // 8


def _preview_prompts(request: TrainRequest, flux: Base, rules: Rules) -> list[str]:
    own = parse_prompts(request.preview_prompts, request.trigger_word)
    return report.preview_prompts(request.trigger_word, request.lora_type, rules.class_noun, flux.native, own)


def _hold_out(request: TrainRequest, found: Sequence[Photo], seed: int, log: Log) -> str | None:
    """The picture that is kept out of the training: one, where it is to be stopped early, and there are enough.

    Otherwise every picture trains: one in ten is much to give up for a curve that nothing acts upon.
    """
    if not request.stop_early:
        return None
    name = validation.hold_out([photo.name for photo in found], seed)
    if name is None:
        least = validation.FEWEST_TO_HOLD_OUT
        log(f"{WARNING}stop_early needs {least} pictures or more, of {len(found)} none can be spared: it is left out")
    else:
        log(f"{name}: kept out of the training, to see when it turns")
    return name


def _sketcher(
    flux: Base,
    plan: Plan,
    transformer: FluxTransformer2DModel,
    texts: Mapping[str, Text],
    asked: Sequence[str],
    size: tuple[int, int],
    seed: int,
) -> Callable[[], list[Image.Image]]:
    """A function that draws a picture for each prompt with the transformer as it is then, always from the same noise.

    The autoencoder is on the device only while it draws.
    """

    def sketch() -> list[Image.Image]:
        with flux.vae(plan) as vae:
            pipeline = generate.pipeline_of(transformer, vae, flux.scheduler)
            return [generate.draw(pipeline, texts[prompt], size, seed + i) for i, prompt in enumerate(asked)]

    return sketch


def _captions_files(folder: Path, captions: Mapping[str, Caption]) -> dict[str, Path]:
    """Writes every caption to a file; member names and paths."""
    members = {}
    folder.mkdir()
    for name, told in captions.items():
        file = folder / f"{name.replace('/', '_')}.txt"
        file.write_text(told.text + "\n", encoding="utf-8")
        members[f"output/flux_train_replicate/captions/{file.name}"] = file
    return members
