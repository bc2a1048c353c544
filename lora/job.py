"""One training from the archive to the tar, in six steps: check, gather, caption, encode, learn, pack."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import transformers
from PIL import Image

from captioner import caption, text
from captioner import model as captioner_model
from captioner.text import Rules
from lora import disk, repack, trigger, wait
from lora.desk import Captioned, Desk, Encoded, Gathered
from lora.file import weights
from lora.file.names import Pair
from lora.flux import base, encode, extract, hardware
from lora.flux import eye as eyes
from lora.flux.base import Base
from lora.pictures import archive, background, buckets, photos, subjects, survey, views
from lora.pictures.photos import Photo
from lora.presets import PRIORITIES
from lora.request import NO_SECRETS, Secrets, TrainRequest, parse_prompts
from lora.result import hub, preview, record, report, tarball, verdict
from lora.result.report import Lesson
from lora.result.tarball import WEIGHTS_MEMBER
from lora.result.verdict import Verdict
from lora.training import checkpoints, decide, examine, learn, prompts, ranks, resume, seen, state, tracker, words
from lora.training.decide import Decided
from lora.training.learn import Learned
from lora.training.recipe import is_toy
from lora.training.watch import WARNING, Audience, Log, Metric, Remembering, Stages
from lora.training.work import Material
from lora.trigger import Subject


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
    eye: str | None = None,
    gpus: str | None = None,
    states: str | None = None,
) -> Path:
    """Trains, and returns the path of the tar, `output / "trained_model.tar"`, which is moved there when it is whole.

    Everything else lies in a work folder of its own, which is gone afterwards, however the run ends. `changes` are
    fields of `fit.Settings` other than those decided from the request: how recipes are compared. `gpus` says how many
    of the machine's GPUs train (`ranks.how_many`); `states` names the folder where the state of an unfinished training
    is kept (`state.keeper`). Raises ValueError for what a user can mend, and DiskError where the disk takes no more,
    with a message that is enough by itself.
    """
    log = Remembering(log)
    check(request, secrets, log)
    gpu = hardware.read_gpu()
    alone = "finetune_type full trains on one GPU" if request.finetune_type == "full" else ""
    together = ranks.how_many(gpus, gpu, log, alone)
    with disk.work_folder("flux-lora-") as work, contextlib.ExitStack() as lent:
        desk = Desk(
            request=request,
            secrets=secrets,
            flux_base=flux_base,
            captioner=captioner,
            states=states,
            eye=eye,
            gpu=gpu,
            ranks=together,
            work=work,
            log=log,
            metric=metric,
            stage=Stages(log),
        )
        if request.training_steps == 0:
            return repack.repack(desk, output)
        gathered = gather(desk, changes or {})
        decided = gathered.decided
        others = lent.enter_context(ranks.started(together, decided.plan.device, work, log))
        tracked = lent.enter_context(_tracking(desk, decided))
        asked = None if gathered.keeper.found else _captioner(desk, gathered.found)
        lent.enter_context(gathered.flux.read_ahead(captioner_model.weights_at_hand(asked) if asked else ()))
        captioned = caption_all(desk, gathered)
        gathered.keeper.remember(seed=decided.settings.seed, captioned=captioned.record())
        encoded = encode_all(desk, gathered, captioned)
        told = Audience(log=log, metric=metric, stage=desk.stage, tracked=tracked)
        learned = learn.learn(
            encoded.material, gathered.flux, decided.plan, decided.settings, told, others, gathered.keeper
        )
        measured = dataclasses.replace(
            learned.measured,
            likeness=by_eye(desk, captioned, encoded, learned),
            repeated=len(gathered.copies) / len(gathered.found),
        )
        called, ratio = " or ".join(captioned.subjects), learned.settings.prior_ratio
        found = verdict.of(measured, called, request.lora_type, ratio, is_toy(gathered.flux.native))
        tracked.numbers(learned.step, found.metrics())
        tar = pack(desk, gathered, captioned, encoded, learned, found, output)
        gathered.keeper.done()
        return tar


def check(request: TrainRequest, secrets: Secrets, log: Log) -> None:
    """Raises ValueError for everything that can be seen before a picture is opened, the Hub's refusal included; tells
    what was made of the inputs."""
    # The libraries' bars redraw one line, which a log shows as thousands; what they warn of is said elsewhere, once.
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    request.check(secrets)
    for note in request.notes:
        log(note)
    for warning in request.warnings(secrets):
        log(f"{WARNING}{warning}")
    if request.hf_repo_id:
        hub.check_access(request.hf_repo_id, secrets.hf_token or "", request.hf_private)


def gather(desk: Desk, changes: Mapping[str, Any]) -> Gathered:
    """Unpacks the pictures, finds the base, decides the settings, fetches an earlier LoRA; warns of what it sees."""
    request, log = desk.request, desk.log
    with desk.stage("unpacking"):
        folder = desk.work / "pictures"
        found, warnings = photos.pair(folder, archive.unpack(request.input_images, folder))
        found, told = subjects.share_out(found, trigger.words(request.trigger_word))
        looks = survey.look_at({photo.name: photo.path for photo in found})
        for warning in [*warnings, *views.check_masks(found)]:
            log(f"{WARNING}{warning}")
        count = sum(photo.caption is not None for photo in found)
        log("; ".join([f"pictures: {len(found)}, {count} of them with a caption", *told]))
    flux = _base(desk, found)
    log(f"base: {flux.name} ({flux.reason})")
    if flux.warning:
        log(f"{WARNING}{flux.warning}")
    skeleton = flux.skeleton()
    modules = decide.modules(request.layers_to_optimize_regex, skeleton, log)
    rules = _rules(request, flux, found)
    for warning in words.of_ordinary(rules):
        log(f"{WARNING}{warning}")
    data = record.data_hash(found)
    keeper = state.keeper(desk.states, request, data, flux, log)
    sizes = [(look.width, look.height) for look in looks]
    drawn = keeper.found.get("seed")
    decided = decide.decide(request, sizes, flux, desk.gpu, changes, log, desk.ranks, drawn)
    start: Mapping[str, Pair] | None = None
    if request.resume_from:
        with desk.stage("fetching the earlier LoRA"):
            earlier, file_hash = resume.fetch(request, desk.secrets.hf_token, desk.work / "earlier")
            start = resume.start(earlier, request.lora_rank, decided.settings.seed, modules, skeleton, log)
            decided, modules = dataclasses.replace(decided, resume_from_sha256=file_hash), list(start)
    alike = None if request.lora_type == "style" else background.warning(looks)
    for warning in [*survey.report(looks, decided.resolutions, decided.merged), *filter(None, [alike])]:
        log(f"{WARNING}{warning}")
    return Gathered(
        found=found,
        sizes={look.name: (look.width, look.height) for look in looks},
        copies=survey.copies(looks),
        data=data,
        flux=flux,
        modules=modules,
        rules=rules,
        decided=decided,
        keeper=keeper,
        start=start,
    )


def caption_all(desk: Desk, gathered: Gathered) -> Captioned:
    """A caption for every picture: the user's, the captioning model's, or a template's."""
    found, plan = gathered.found, gathered.decided.plan
    with desk.stage("captioning"):
        if before := gathered.keeper.found.get("captioned"):
            desk.log("captions: those of the interrupted training")
            for warning in before["warnings"]:
                desk.log(f"{WARNING}{warning}")
            return Captioned.of(before)
        warned = len(desk.log.warnings)
        captions, nouns, boxes = caption.caption_all(
            {photo.name: photo.path for photo in found},
            {photo.name: photo.caption for photo in found if photo.caption is not None},
            {photo.name: gathered.rules[photo.word or ""] for photo in found},
            captioning=desk.request.captioning,
            model=desk.captioner,
            device=plan.device,
            dtype=plan.dtype,
            read=buckets.read_picture,
            fetch=lambda name: wait.interruptibly(lambda: captioner_model.download(name)),
            log=desk.log,
            locating=desk.request.subject_crop and desk.request.lora_type == "subject",
        )
    called = {word: Subject(word, noun) for word, noun in nouns.items()}
    return Captioned(captions=captions, subjects=called, boxes=boxes, warnings=desk.log.warnings[warned:])


def encode_all(desk: Desk, gathered: Gathered, captioned: Captioned) -> Encoded:
    """Pictures become latents, prompts become embeddings, once each."""
    request, decided, flux, log = desk.request, gathered.decided, gathered.flux, desk.log
    settings, said = decided.settings, {name: own.text for name, own in captioned.captions.items()}
    of = {photo.name: captioned.subjects[photo.word or ""] for photo in gathered.found}
    with desk.stage("encoding pictures"):
        thumbnails: dict[str, bytes] = {}
        parts = seen.close_ups(captioned.boxes, gathered.sizes, decided, log)
        spoken = {said[name]: subject for name, subject in of.items()}
        spoken |= {seen.caption_of(said[name]): of[name] for name in parts}
        pictures = seen.pictures(gathered.found, said, parts, decided, thumbnails, log)
        examples = encode.encode_pictures(flux, decided.plan, pictures)
        held_out = examine.hold_out([photo.name for photo in gathered.found], gathered.copies, settings.seed)
        often = photos.weights(gathered.found)
        repeated = [example for example in examples for _ in range(often[examine.photo_of(example)])]
        unseen = [example for example in repeated if examine.photo_of(example) in held_out]
        learned = [example for example in repeated if example not in unseen]
        if held_out:
            until = f"{settings.late_from:.0%} of the steps"
            log(f"held out until {until} are over, to see how it does on new pictures: {', '.join(held_out)}")
    with desk.stage("encoding prompts"):
        together = " and ".join(captioned.subjects)
        own = [text.fill_in(prompt, together) for prompt in parse_prompts(request.preview_prompts)]
        asked = preview.prompts(
            list(captioned.subjects.values()),
            request.mode or request.lora_type,
            flux.native,
            own,
            most=PRIORITIES[request.priority].previews,
        )
        count = settings.prior_prompts if settings.prior_ratio else 0
        apart = prompts.apart(spoken, count, settings.seed, settings.prior_kinds)
        questions = examine.questions(spoken, settings.prior_kinds, settings.seed)
        questioned = questions.prompts(learned, unseen)
        every = dict.fromkeys(["", *spoken, *asked, *(one.prompt for one in apart), *questioned])
        counted = {prompt: next(iter(gathered.rules.values())).t5.count(prompt) for prompt in every}
        tokens, why_tokens = encode.text_length(counted.values(), flux.t5_tokens)
        log(f"text: {tokens} tokens, {why_tokens}")
        for prompt in (prompt for prompt in counted if counted[prompt] > tokens and prompt in {*spoken, *asked}):
            log(f"{WARNING}the base reads {tokens} tokens, so the end of this prompt is lost: {prompt}")
        texts = encode.encode_texts(flux, decided.plan, counted, tokens)
        if alike := examine.confusable(questions, texts):
            log(
                f"{WARNING}trigger_word: the base hardly tells {request.trigger_word} from words such as"
                f" {', '.join(alike)}; prompts with them may show the {request.lora_type} too"
            )
    material = Material(
        modules=gathered.modules,
        rank=request.lora_rank,
        resolutions=decided.resolutions,
        learned=learned,
        unseen=unseen,
        questions=questions,
        texts=texts,
        asked=asked,
        preview_every=decided.preview_every,
        apart=apart,
        start=gathered.start,
        suggested_steps=decided.suggested_steps,
        all_checkpoints=request.checkpoints == "all",
    )
    decided = dataclasses.replace(
        decided, held_out=tuple(held_out), text_tokens=tokens, reasons={**decided.reasons, "text_tokens": why_tokens}
    )
    return Encoded(material=material, thumbnails=thumbnails, decided=decided)


def by_eye(desk: Desk, captioned: Captioned, encoded: Encoded, learned: Learned) -> float | None:
    """How like the user's pictures the previews look, where an eye can be had; of a subject alone, for in a style it is
    the things that differ."""
    shown = [one for one in learned.previews if desk.request.trigger_word in one.prompt]
    if desk.request.lora_type == "style" or not shown:
        return None
    with desk.stage("looking at the previews"):
        own = [Image.open(BytesIO(encoded.thumbnails[name])) for name in captioned.captions]
        found, line = eyes.look(desk.eye, learned.plan.device, own, shown)
        desk.log(line)
    return found


def pack(
    desk: Desk,
    gathered: Gathered,
    captioned: Captioned,
    encoded: Encoded,
    learned: Learned,
    found: Verdict,
    output: Path,
) -> Path:
    """Writes weights, captions, report and record into the tar; uploads the LoRA where that was asked for."""
    request, work = desk.request, desk.work
    decided = dataclasses.replace(
        encoded.decided, plan=learned.plan, settings=learned.settings, weights_of_step=learned.step
    ).record()
    lora = work / "lora.safetensors"
    members = {WEIGHTS_MEMBER: lora, "request.json": work / "request.json"}
    with desk.stage("packing"):
        header = record.header(request, decided, [own.text for own in captioned.captions.values()])
        weights.write(lora, learned.pairs, header)
        members |= tarball.captions(work / "captions", {name: own.text for name, own in captioned.captions.items()})
        others = checkpoints.write(work / "checkpoints", learned.others, header)
        lessons = [
            Lesson(
                name=name,
                caption=own.text,
                source=own.source,
                note=own.note,
                own=own.own,
                thumbnail=encoded.thumbnails[name],
                held_out=name in encoded.decided.held_out,
            )
            for name, own in captioned.captions.items()
        ]
        lessons += [
            dataclasses.replace(
                lesson, caption=seen.caption_of(lesson.caption), note="", own=None, thumbnail=thumbnail, close_up=True
            )
            for lesson in lessons
            if (thumbnail := encoded.thumbnails.get(lesson.name + examine.CLOSE_UP))
        ]
        held = extract.record(learned.held) if learned.held else None
        written = record.request_json(request, decided, gathered.data, None, found.record(), held)
        members |= report.write(
            work / "report", written, lessons, learned.previews, learned.curve, found, desk.log.warnings
        )
    published = None
    if request.hf_repo_id:
        with desk.stage("uploading"):
            token, pictures = desk.secrets.hf_token or "", len(gathered.found)
            told = found.lines()
            published = hub.publish(request, token, decided, lora, learned.previews, pictures, desk.log, told, others)
    written = record.request_json(request, decided, gathered.data, published, found.record(), held)
    members["request.json"].write_text(written, encoding="utf-8")
    tar = tarball.finish(members, output, others)
    desk.log(desk.stage.table())
    hub.tell(published, desk.log, desk.metric)
    for name, seconds in desk.stage.seconds.items():
        desk.metric(f"seconds_{name.replace(' ', '_')}", seconds)
    for name, value in found.metrics().items():
        desk.metric(name, value)
    for line in found.lines():
        desk.log(line)
    return tar


def _base(desk: Desk, found: Sequence[Photo]) -> Base:
    """The base; a stage of its own where it may have to be downloaded, for that takes minutes. The captioning model is
    fetched beside it, where these pictures need one."""
    name, token = desk.flux_base, desk.secrets.hf_token
    if base.is_here(name, desk.gpu):
        return base.find(name, desk.gpu, token)
    asked = _captioner(desk, found)
    if asked and not captioner_model.is_at_hand(asked):
        wait.meanwhile(lambda: captioner_model.download(asked))
    with desk.stage("fetching the base"):
        desk.log(f"{name or base.FLUX_DEV}, from the Hugging Face Hub: on first use all of its files are downloaded")
        return base.find(name, desk.gpu, token)


def _captioner(desk: Desk, found: Sequence[Photo]) -> str | None:
    """The captioning model, where it will be asked about these pictures."""
    model, missing = desk.captioner or captioner_model.MODEL, sum(photo.caption is None for photo in found)
    device, captioning = "cuda" if desk.gpu else "cpu", desk.request.captioning
    asking, _ = caption.whether_to_ask(model, device, captioning=captioning, missing=missing, of=len(found))
    return model if asking else None


def _tracking(desk: Desk, decided: Decided) -> contextlib.AbstractContextManager[tracker.Tracker]:
    request = desk.request
    return tracker.tracking(
        desk.secrets.wandb_api_key,
        project=request.wandb_project,
        name=request.wandb_run or request.trigger_word,
        entity=request.wandb_entity,
        settings={"lora_rank": request.lora_rank, "lora_type": request.lora_type, **decided.record()},
        folder=desk.work,
        log=desk.log,
    )


def _rules(request: TrainRequest, flux: Base, found: Sequence[Photo]) -> dict[str, Rules]:
    """Of the captions of each trigger word's pictures."""
    count_clip, count_t5 = flux.token_counters()
    rules = Rules(
        trigger_word=request.trigger_word,
        lora_type=request.lora_type,
        mode=request.mode,
        prefix=request.autocaption_prefix,
        suffix=request.autocaption_suffix,
        class_noun=None,
        t5=text.Room(count_t5, flux.t5_tokens),
        clip=text.Room(count_clip, flux.clip_tokens),
    )
    nouns = {photo.word or "": photo.class_noun for photo in found}
    return {word: text.of_word(rules, word, noun) for word, noun in nouns.items()}
