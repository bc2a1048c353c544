"""One training from the archive to the tar: the whole story, in order."""

import contextlib
import dataclasses
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import FluxTransformer2DModel
from PIL import Image

from captioner import text
from captioner.text import Caption, Rules
from lora import adapter, archive, base, buckets, encode, fit, generate, hardware, photos, prior, record, report
from lora.base import Base
from lora.encode import Text
from lora.fit import Settings, StepReport
from lora.hardware import Plan
from lora.photos import Photo
from lora.request import TrainRequest, parse_resolution

Log = Callable[[str], None]
Metric = Callable[[str, float], None]

WEIGHTS_MEMBER = "output/flux_train_replicate/lora.safetensors"
"""Where every reader of such a tar looks, and the only safetensors that it may hold."""
PRIOR_PROMPTS = 96
SECONDS_BETWEEN_LINES = 3.0


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
            found = _unpack(request.input_images, work / "pictures", log)
            data = record.data_hash(found)
        with stage("captioning"):
            captions = _captions(found, rules, log)
            spoken = [captions[photo.name].text for photo in found]
        with stage("encoding pictures"):
            examples = encode.encode_pictures(flux, plan, _pictures(found, captions, resolutions, log))
        with stage("encoding prompts"):
            asked = report.preview_prompts(request.trigger_word, request.lora_type, rules.class_noun)
            apart = prior.prompts(
                spoken, request.trigger_word, PRIOR_PROMPTS if request.prior_loss_weight else 0, settings.seed
            )
            texts, cut = encode.encode_texts(flux, plan, ["", *spoken, *asked, *apart])
            for prompt in set(cut).intersection(spoken):
                log(f"warning: the base reads {flux.t5_tokens} tokens, so the end is lost of: {prompt}")
        with stage("loading the transformer"):
            transformer = lent.enter_context(flux.transformer(plan))
            if plan.checkpointing:
                transformer.enable_gradient_checkpointing()
        with stage("drawing what the base draws"):
            priors = prior.draw(transformer, texts, apart, _square(min(resolutions)), flux.scheduler, settings.seed)
        with stage("training"):
            parameters = adapter.attach(transformer, request.lora_rank, settings.seed)
            log(f"{sum(p.numel() for p in parameters):,} weights to train, on {len(examples)} examples")
            _train(fit.fit(transformer, parameters, examples, priors, texts, settings), settings.steps, log, metric)
        with stage("previews"):
            side = (max(resolutions), max(resolutions))
            sheet = _previews(flux, plan, transformer, texts, asked, side, settings.seed)
        with stage("packing"):
            members = {WEIGHTS_MEMBER: work / "lora.safetensors"}
            adapter.save(transformer, members[WEIGHTS_MEMBER], record.header(request, decided, spoken))
            members |= _beside_the_weights(work, request, decided, data, captions, sheet)
            output.mkdir(parents=True, exist_ok=True)
            tar = output / "trained_model.tar"
            archive.pack(members, tar)
    log(stage.table())
    return tar


class Stages:
    """Names each stage in the log as it begins, and remembers its seconds."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._log(f"== {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def table(self) -> str:
        parts = [f"{name} {seconds:.1f}" for name, seconds in self.seconds.items()]
        return f"seconds: {', '.join(parts)}; {sum(self.seconds.values()):.1f} in all"


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


def _unpack(path: Path, folder: Path, log: Log) -> list[Photo]:
    found, warnings = photos.pair(folder, archive.unpack(path, folder))
    for warning in warnings:
        log(f"warning: {warning}")
    log(f"{len(found)} pictures, {sum(photo.caption is not None for photo in found)} of them with a caption")
    return found


def _captions(found: Sequence[Photo], rules: Rules, log: Log) -> dict[str, Caption]:
    """A caption for every photo, by its name: the user's own, else the template."""
    captions = {}
    for photo in found:
        caption = text.from_template(rules) if photo.caption is None else text.from_user(photo.caption, rules)
        captions[photo.name] = caption
        log(f"{photo.name}: ({caption.source}) {caption.text}" + (f" [{caption.note}]" if caption.note else ""))
    return captions


def _pictures(
    found: Sequence[Photo], captions: Mapping[str, Caption], resolutions: Sequence[int], log: Log
) -> Iterator[tuple[str, str, Image.Image]]:
    """Every photo in each of its buckets: name, caption, picture."""
    for photo, fitted in zip(found, buckets.prepared([p.path for p in found], resolutions), strict=True):
        log(f"{photo.name}: {', '.join(f'{picture.width}x{picture.height}' for picture in fitted)}")
        for picture in fitted:
            yield photo.name, captions[photo.name].text, picture


def _square(side: int) -> tuple[int, int]:
    """Pixels to latent cells, eight pixels each."""
    return side // 8, side // 8


def _train(reports: Iterator[StepReport], steps: int, log: Log, metric: Metric) -> None:
    """Runs the loop, with a line every few seconds. Raises ValueError where the loss is no longer a number."""
    shown, smooth = 0.0, float("nan")
    for at in reports:
        if at.seconds - shown < SECONDS_BETWEEN_LINES and at.step not in (1, steps):
            continue
        shown, loss = at.seconds, at.loss.item()
        if not torch.isfinite(at.loss):
            raise ValueError(f"the loss at step {at.step} is {loss}: the training broke down; lower learning_rate")
        smooth = loss if smooth != smooth else 0.8 * smooth + 0.2 * loss
        rate = at.seconds / at.step
        left = rate * (steps - at.step)
        log(
            f"step {at.step}/{steps} ({at.step / steps:.0%}), loss {smooth:.4f}, prior {at.prior_loss.item():.4f},"
            f" lr {at.learning_rate:.2g}, {rate:.3f} s/it, {int(left) // 60}:{int(left) % 60:02d} left"
        )
        for name, value in (("progress", at.step / steps), ("loss", smooth), ("seconds_left", left)):
            metric(name, value)


def _previews(
    flux: Base,
    plan: Plan,
    transformer: FluxTransformer2DModel,
    texts: Mapping[str, Text],
    asked: Sequence[str],
    size: tuple[int, int],
    seed: int,
) -> Image.Image:
    with flux.vae(plan) as vae:
        pipeline = generate.pipeline_of(transformer, vae, flux.scheduler)
        pictures = [generate.draw(pipeline, texts[prompt], size, seed + i) for i, prompt in enumerate(asked)]
        transformer.disable_adapters()
        without = [generate.draw(pipeline, texts[prompt], size, seed + i) for i, prompt in enumerate(asked)]
        transformer.enable_adapters()
    return report.preview_sheet(list(zip(asked, without, pictures, strict=True)))


def _beside_the_weights(
    work: Path,
    request: TrainRequest,
    decided: Mapping[str, object],
    data: str,
    captions: Mapping[str, Caption],
    sheet: Image.Image,
) -> dict[str, Path]:
    """Writes captions, request.json and the preview; member names and paths."""
    members = {}
    folder = work / "out"
    (folder / "captions").mkdir(parents=True)
    for name, caption in captions.items():
        file = folder / "captions" / f"{name.replace('/', '_')}.txt"
        file.write_text(caption.text + "\n", encoding="utf-8")
        members[f"output/flux_train_replicate/captions/{file.name}"] = file
    members["request.json"] = folder / "request.json"
    members["request.json"].write_text(record.request_json(request, decided, data), encoding="utf-8")
    members["report/preview.webp"] = folder / "preview.webp"
    sheet.save(members["report/preview.webp"], quality=90)
    return members
