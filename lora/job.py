"""One training from the archive to the tar: the whole story, in order."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import FluxTransformer2DModel
from PIL import Image

from captioner import caption, text
from captioner.text import Caption, Rules
from lora import disk, wait
from lora.file import weights
from lora.file.names import Pair
from lora.flux import adapter, base, encode, hardware
from lora.flux.base import Base
from lora.flux.hardware import Gpu, Plan
from lora.pictures import archive, buckets, photos, survey
from lora.pictures.photos import Photo
from lora.pictures.survey import Look
from lora.request import NO_SECRETS, Secrets, TrainRequest, parse_prompts, parse_resolution
from lora.result import hub, record, report, tarball
from lora.result.report import Lesson
from lora.training import fit, learn, prior, resume, tracker, validation
from lora.training.fit import Settings
from lora.training.learn import Material
from lora.training.watch import WARNING, Audience, Log, Metric, Remembering, Stages

WEIGHTS_MEMBER = "output/flux_train_replicate/lora.safetensors"
"""Where every reader of such a tar looks, and the only safetensors that it may hold."""


def run(
    request: TrainRequest,
    *,
    secrets: Secrets = NO_SECRETS,
    output: Path,
    flux_base: str | None,
    captioner: str | None,
    log: Log,
    metric: Metric,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Trains, and returns the path of the tar, `output / "trained_model.tar"`, which is moved there when it is whole.

    Everything else lies in a work folder of its own, which is gone afterwards, however the run ends. `changes` are
    fields of `fit.Settings` other than those decided from the request: how recipes are compared. Raises ValueError
    for what a user can mend, and DiskError where the disk takes no more, with a message that is enough by itself.
    """
    # Their bars redraw one line, which a log shows as thousands; what they warn of is said below, once.
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    log = warned = Remembering(log)
    request.check(secrets)
    if request.hf_repo_id:
        hub.check_access(request.hf_repo_id, secrets.hf_token or "", request.hf_private)
    gpu, stage = hardware.read_gpu(), Stages(log)
    with disk.work_folder("flux-lora-") as work, contextlib.ExitStack() as lent:
        if request.training_steps == 0:
            return _pack_again(request, secrets, flux_base, gpu, work, output, stage, log, metric)
        with stage("unpacking"):
            found, looks = _unpack(request.input_images, work / "pictures", log)
        data = record.data_hash(found)
        flux = _base(flux_base, gpu, secrets, stage, log)
        log(f"base: {flux.name} ({flux.reason})")
        skeleton = flux.skeleton()
        modules = _modules(request, skeleton, log)
        rules = _rules(request, flux)
        text.check(rules)
        if prior.is_ordinary(request.trigger_word):
            log(
                f"{WARNING}trigger_word: {request.trigger_word!r} is an ordinary word, so what is learned will show"
                " wherever a prompt has it; a word that means nothing, such as TOK, keeps the two apart"
            )
        resolutions = parse_resolution(request.resolution) if request.resolution else flux.resolutions
        plan = hardware.plan(gpu, flux.parameters, resolutions, batch_size=request.batch_size, rank=request.lora_rank)
        log(f"plan: {plan.reason}")
        settings = dataclasses.replace(
            _settings(request, flux, log), **{"batch_size": plan.batch_size, **(changes or {})}
        )
        decided: dict[str, Any] = {
            "base": flux.name,
            "plan": plan.reason,
            "resolutions": resolutions,
            **dataclasses.asdict(settings),
        }
        start: Mapping[str, Pair] | None = None
        if request.resume_from:
            with stage("fetching the earlier LoRA"):
                earlier, decided["resume_from_sha256"] = resume.fetch(request, secrets.hf_token, work / "earlier")
                resume.check(earlier, request, modules, skeleton, log)
                start = earlier.pairs
        for warning in survey.report(looks, resolutions):
            log(f"{WARNING}{warning}")
        tracked = lent.enter_context(_tracking(request, secrets, decided, work, log))
        lent.enter_context(flux.read_ahead())
        with stage("captioning"):
            captions, rules = _captions(found, rules, request, captioner, plan, log)
            spoken = [captions[photo.name].text for photo in found]
        with stage("encoding pictures"):
            thumbnails: dict[str, bytes] = {}
            examples = encode.encode_pictures(flux, plan, _pictures(found, captions, resolutions, thumbnails, log))
            held_out = decided["held_out"] = _hold_out(request, found, settings.seed, log)
            unseen = [example for example in examples if validation.is_of(held_out, example)]
            learned = [example for example in examples if example not in unseen]
        with stage("encoding prompts"):
            asked = _preview_prompts(request, flux, rules)
            count = settings.prior_prompts if settings.prior_loss_weight else 0
            apart = prior.prompts(spoken, request.trigger_word, count, settings.seed, settings.prior_kinds)
            texts, cut = encode.encode_texts(flux, plan, ["", *spoken, *asked, *apart])
            for prompt in (prompt for prompt in cut if prompt in spoken or prompt in asked):
                log(f"{WARNING}the base reads {flux.t5_tokens} tokens, so the end is lost of: {prompt}")
        members = {WEIGHTS_MEMBER: work / "lora.safetensors"}

        def save(transformer: FluxTransformer2DModel, plan: Plan, settings: Settings, step: int) -> None:
            decided.update(plan=plan.reason, batch_size=settings.batch_size, weights_of_step=step)
            adapter.save(transformer, members[WEIGHTS_MEMBER], record.header(request, decided, spoken))

        material = Material(
            modules=modules,
            rank=request.lora_rank,
            resolutions=resolutions,
            learned=learned,
            unseen=unseen,
            texts=texts,
            asked=asked,
            preview_every=request.preview_every,
            apart=apart,
            start=start,
        )
        told = Audience(log=log, metric=metric, stage=stage, tracked=tracked)
        previews, curve = learn.learn(material, flux, plan, settings, save, told)
        with stage("packing"):
            lessons = [
                Lesson(
                    name=name,
                    caption=own.text,
                    source=own.source,
                    note=own.note,
                    thumbnail=thumbnails[name],
                    held_out=name == held_out,
                )
                for name, own in captions.items()
            ]
            members |= _captions_files(work / "captions", captions)
            members["request.json"] = work / "request.json"
            written = record.request_json(request, decided, data)
            members |= report.write(work / "report", written, lessons, previews, curve, warned.warnings)
        published = None
        if request.hf_repo_id:
            with stage("uploading"):
                lora, token = members[WEIGHTS_MEMBER], secrets.hf_token or ""
                trained_on = len(found) - (held_out is not None)
                published = hub.publish(request, token, decided, lora, previews, trained_on, log)
        written = record.request_json(request, decided, data, published)
        members["request.json"].write_text(written, encoding="utf-8")
        tar = _tar(members, output)
    log(stage.table())
    hub.tell(published, log, metric)
    for name, seconds in stage.seconds.items():
        metric(f"seconds_{name.replace(' ', '_')}", seconds)
    return tar


def _base(name: str | None, gpu: Gpu | None, secrets: Secrets, stage: Stages, log: Log) -> Base:
    """The base; a stage of its own where it may have to be downloaded, for that takes minutes."""
    if base.is_here(name, gpu):
        return base.find(name, gpu, secrets.hf_token)
    with stage("fetching the base"):
        log(f"{name or base.FLUX_DEV}, from the Hugging Face Hub: on first use all of its files are downloaded")
        return base.find(name, gpu, secrets.hf_token)


def _modules(request: TrainRequest, skeleton: FluxTransformer2DModel, log: Log) -> list[str]:
    """The layers to train; the log is told where the request's own choice had to be completed."""
    modules = adapter.target_modules(skeleton)
    pattern = request.layers_to_optimize_regex
    if pattern is None:
        return modules
    asked, added = adapter.choose(modules, pattern)
    log(f"layers: {len(asked)} of {len(modules)} by layers_to_optimize_regex")
    if added:
        more = ", …" if len(added) > 3 else ""
        log(f"layers: {len(added)} added, so that the LoRA loads everywhere: {', '.join(added[:3])}{more}")
    chosen = {*asked, *added}
    return [module for module in modules if module in chosen]


def _pack_again(
    request: TrainRequest,
    secrets: Secrets,
    flux_base: str | None,
    gpu: Gpu | None,
    work: Path,
    output: Path,
    stage: Stages,
    log: Log,
    metric: Metric,
) -> Path:
    """The tar of an earlier LoRA as it is, under diffusers' names and with what its header already said."""
    name, skeleton = base.architecture(flux_base, gpu, secrets.hf_token)
    log(f"base: {name}; a LoRA is packed by the names and sizes of its layers alone")
    with stage("fetching the earlier LoRA"):
        earlier, file_hash = resume.fetch(request, secrets.hf_token, work / "earlier")
        resume.check(earlier, request, adapter.target_modules(skeleton), skeleton, log)
    decided = {"base": name, "resume_from_sha256": file_hash}
    members = {WEIGHTS_MEMBER: work / "lora.safetensors", "request.json": work / "request.json"}
    weights.write(members[WEIGHTS_MEMBER], weights.halved(earlier.pairs), earlier.metadata)
    for fault in weights.faults(weights.read(members[WEIGHTS_MEMBER])):
        log(f"{WARNING}{fault}")
    published = None
    if request.hf_repo_id:
        published = hub.publish(request, secrets.hf_token or "", decided, members[WEIGHTS_MEMBER], [], 0, log)
    written = record.request_json(request, decided, record.data_hash([]), published)
    members["request.json"].write_text(written, encoding="utf-8")
    tar = _tar(members, output)
    hub.tell(published, log, metric)
    return tar


def _tar(members: Mapping[str, Path], output: Path) -> Path:
    with disk.writing(output):
        output.mkdir(parents=True, exist_ok=True)
    tar = output / "trained_model.tar"
    tarball.pack(members, tar)
    return tar


def _tracking(
    request: TrainRequest, secrets: Secrets, decided: Mapping[str, Any], folder: Path, log: Log
) -> contextlib.AbstractContextManager[tracker.Tracker]:
    return tracker.tracking(
        secrets.wandb_api_key,
        project=request.wandb_project,
        name=request.wandb_run or request.trigger_word,
        entity=request.wandb_entity,
        settings={"lora_rank": request.lora_rank, "lora_type": request.lora_type, **decided},
        folder=folder,
        log=log,
    )


def _rules(request: TrainRequest, flux: Base) -> Rules:
    count_clip, count_t5 = flux.token_counters()
    return Rules(
        trigger_word=request.trigger_word,
        lora_type=request.lora_type,
        prefix=text.fill_in(request.autocaption_prefix, request.trigger_word),
        suffix=text.fill_in(request.autocaption_suffix, request.trigger_word),
        class_noun=None,
        t5=text.Room(count_t5, flux.t5_tokens),
        clip=text.Room(count_clip, flux.clip_tokens),
    )


def _settings(request: TrainRequest, flux: Base, log: Log) -> Settings:
    """The request with everything that was left empty decided, and the log told why."""
    seed, why_seed = request.seed, "as asked for"
    if seed is None:
        seed, why_seed = random.SystemRandom().randrange(2**32), "chosen at random"
    rate, why_rate = request.learning_rate, "as asked for"
    if rate is None:
        rate, why_rate = fit.default_learning_rate(request.lora_type, flux.width, request.lora_rank)
    log(f"seed: {seed}, {why_seed}")
    held = fit.HELD[request.lora_type]
    shape = f"held for {held:.0%} of the steps, then falling" if held else "falling from the start"
    log(f"learning rate: {rate:.3g}, {why_rate}; {shape}, as suits a {request.lora_type}")
    mean, uniform = fit.TIMESTEP_MEANS[request.lora_type], fit.UNIFORM_SHARES[request.lora_type]
    evenly = f", {uniform:.0%} of them evenly from all" if uniform else ""
    log(f"timesteps: logit-normal with mean {mean:g}{evenly}, as suits a {request.lora_type}")
    weight, why_weight = request.prior_loss_weight, "as asked for"
    if weight is None:
        weight, why_weight = fit.PRIOR_LOSS_WEIGHTS[request.lora_type], f"as suits a {request.lora_type}"
    if weight:
        log(f"held to what the base draws: weight {weight:g}, {why_weight}; in one step of {fit.PRIOR_EVERY}")
    return Settings(
        steps=request.training_steps,
        batch_size=request.batch_size,
        learning_rate=rate,
        caption_dropout_rate=request.caption_dropout_rate,
        prior_loss_weight=weight,
        seed=seed,
        timestep_mean=mean,
        uniform_share=uniform,
        held=held,
    )


def _unpack(path: Path, folder: Path, log: Log) -> tuple[list[Photo], list[Look]]:
    """The photos of the archive, and a look at each of them, by which they are seen to be whole."""
    found, warnings = photos.pair(folder, archive.unpack(path, folder))
    looks = survey.look_at({photo.name: photo.path for photo in found})
    for warning in warnings:
        log(f"{WARNING}{warning}")
    log(f"{len(found)} pictures, {sum(photo.caption is not None for photo in found)} of them with a caption")
    return found, looks


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
        fetch=lambda name: wait.interruptibly(lambda: caption.download(name)),
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


def _preview_prompts(request: TrainRequest, flux: Base, rules: Rules) -> list[str]:
    own = [text.fill_in(prompt, request.trigger_word) for prompt in parse_prompts(request.preview_prompts)]
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


def _captions_files(folder: Path, captions: Mapping[str, Caption]) -> dict[str, Path]:
    """Writes every caption to a file; member names, which keep the archive's folders, and paths."""
    members = {}
    folder.mkdir()
    for number, (name, told) in enumerate(captions.items()):
        file = members[f"output/flux_train_replicate/captions/{name}.txt"] = folder / f"{number}.txt"
        file.write_text(told.text + "\n", encoding="utf-8")
    return members
