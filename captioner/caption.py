"""Captions by the captioning model: asked about the pictures in batches, its answers checked and tried again.

Not covered: the model itself (model.py) and what makes a sound caption (text.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from captioner import ground, look, questions, text
from captioner.model import (
    BATCH_SIZE,
    CPU_BATCH_SIZE,
    MAX_NEW_TOKENS,
    MAX_PIXELS,
    MODEL,
    NOUN_PICTURES,
    NOUN_TOKENS,
    Captioner,
    Fetch,
    Log,
    Read,
    download,
    fit_to_model,
    is_at_hand,
    load,
)
from captioner.text import Caption, Rejected, Rules


def caption_all(
    pictures: Mapping[str, Path],
    given: Mapping[str, str],
    rules: Mapping[str, Rules],
    *,
    captioning: str,
    model: str | None,
    device: str,
    dtype: torch.dtype,
    read: Read,
    log: Log,
    fetch: Fetch = download,
    locating: bool = False,
) -> tuple[dict[str, Caption], dict[str, str | None], dict[str, ground.Box]]:
    """A caption for every picture, in their order; the class noun of each trigger word: that of its rules, or else the
    model's where it was asked for one; and, with `locating`, the subject's box in each picture where the model is asked
    and gives one.

    `rules` holds those of each picture by the same names: pictures of one subject have the same. `given` holds the
    users' own captions. They win, unless `captioning` is "all" and the model can be asked: then it writes for every
    picture, and they are kept beside its captions. "disabled" asks it for none, "automatic" for those that are missing.
    `model` is a folder or Hub id, None means MODEL. `read` decodes one file to an upright RGB picture, in threads.
    ValueError where the rules cannot be kept, or the model is needed and cannot be loaded.
    """
    for one in dict.fromkeys(rules.values()):
        text.check(one)
    model = model or MODEL
    missing = {name: path for name, path in pictures.items() if name not in given}
    wanted = pictures if captioning == "all" else missing
    captions = {name: text.from_user(given[name], rules[name]) for name in pictures if name in given}
    nouns, boxes = {one.trigger_word: one.class_noun for one in rules.values()}, dict[str, ground.Box]()
    asking, reason = whether_to_ask(model, device, captioning=captioning, missing=len(missing), of=len(pictures))
    log(f"captions: {reason}")
    if asking:
        start = time.perf_counter()
        with load(model, device, dtype, fetch) as captioner:
            log(f"captions: loaded in {time.perf_counter() - start:.1f} s")
            batch_size = CPU_BATCH_SIZE if device == "cpu" else BATCH_SIZE
            for one in dict.fromkeys(rules.values()):
                mine = {name: path for name, path in pictures.items() if rules[name] == one}
                asked = {name: path for name, path in mine.items() if name in wanted}
                written, noun = caption_pictures(captioner, asked, one, read=read, batch_size=batch_size, log=log)
                nouns[one.trigger_word] = noun
                captions |= {
                    name: text.beside(made, captions.get(name), given.get(name)) for name, made in written.items()
                }
                for warning in look_at(captioner, mine, one.kind, noun, read=read, batch_size=batch_size, log=log):
                    log(f"warning: {warning}")
                if locating:
                    boxes |= locate(captioner, mine, noun, read=read, batch_size=batch_size, log=log)
    else:
        captions |= {name: text.from_template(rules[name]) for name in missing}
    captions = {name: captions[name] for name in pictures}
    for line in text.table(captions):
        log(line)
    return captions, nouns, boxes


def look_at(
    captioner: Captioner,
    pictures: Mapping[str, Path],
    kind: str,
    noun: str | None,
    *,
    read: Read,
    batch_size: int,
    log: Log,
) -> list[str]:
    """What the model sees in the pictures that will train badly: one more question about each, in batches."""
    answers = _answers(
        lambda images: captioner.answer(images, look.QUESTION, "", look.TOKENS),
        pictures,
        read=read,
        batch_size=batch_size,
        log=lambda line: log(f"pictures looked at: {line}"),
    )
    return look.warnings({name: look.read(answer) for name, answer in answers}, kind, noun)


def locate(
    captioner: Captioner, pictures: Mapping[str, Path], noun: str | None, *, read: Read, batch_size: int, log: Log
) -> dict[str, ground.Box]:
    """The subject's box in each picture where the model gives one: one more question about each, in batches."""
    answers = _answers(
        lambda images: captioner.answer(images, ground.question(noun), "", ground.TOKENS),
        pictures,
        read=read,
        batch_size=batch_size,
        log=lambda line: log(f"subjects located: {line}"),
    )
    return {name: box for name, answer in answers if (box := ground.read(answer))}


def whether_to_ask(model: str, device: str, *, captioning: str, missing: int, of: int) -> tuple[bool, str]:
    """Whether the model is loaded for `of` pictures, of which `missing` have no caption, and why, for the log."""
    if not missing and captioning != "all":
        return False, f"all {of} pictures have a caption of yours; the captioning model is not loaded"
    if captioning == "disabled":
        return False, f"{missing} of {of} pictures have no caption and captioning is disabled, so they get a template"
    if device == "cpu" and not is_at_hand(model):
        wanted = f"{missing} of {of} pictures have none" if missing else "captioning is all"
        so = "they get a template and the others keep yours" if missing < of else "they get a template"
        return False, (
            f"{wanted}, and the captioning model {model} is not here (without a GPU it is not downloaded), "
            f"so {so if missing else 'all keep yours'}. For better ones put a .txt beside each picture, or set "
            "CAPTIONER to a folder with a Qwen3-VL-Instruct model"
        )
    if captioning == "all":
        return True, f"captioning is all; loading {model} on {device} to write new ones for all {of} pictures"
    return True, f"{missing} of {of} pictures have no caption; loading {model} on {device} to write them"


def caption_pictures(
    captioner: Captioner, pictures: Mapping[str, Path], rules: Rules, *, read: Read, batch_size: int, log: Log
) -> tuple[dict[str, Caption], str | None]:
    """The model's captions: asked once, what the rules reject asked again more plainly, what is left a template.

    Returns them by name and the class noun: that of `rules`, else for a subject what the model says it is.
    """

    def ask(
        names: Sequence[str], question: str, begin: str, what: str, tokens: int = MAX_NEW_TOKENS
    ) -> Iterator[tuple[str, str]]:
        return _answers(
            lambda images: captioner.answer(images, question, begin, tokens),
            {name: pictures[name] for name in names},
            read=read,
            batch_size=batch_size,
            log=lambda line: log(f"{what}: {line}"),
        )

    names = list(pictures)
    if not names:
        return {}, rules.class_noun
    if rules.lora_type == "subject" and rules.kind != "general" and rules.class_noun is None:
        some = names[:: -(-len(names) // NOUN_PICTURES)]
        answers = ask(some, questions.CLASS_NOUN_QUESTION, "", "subjects named", NOUN_TOKENS)
        noun = questions.class_noun([answer for _, answer in answers])
        rules = replace(rules, class_noun=noun)
        log(
            f"captions: the subject is a {noun}"
            if noun
            else "captions: the pictures do not agree on what the subject is"
        )

    captions, reasons = {}, {}
    for name, answer in ask(names, questions.question(rules), rules.prefix.strip(), "captions"):
        made = text.from_model(answer, rules)
        if isinstance(made, Rejected):
            reasons[name] = made.reason
        else:
            captions[name] = Caption(text=made, source="model")

    opening = questions.retry_opening(rules)
    begin = f"{rules.prefix.strip()} {opening}".strip()
    for name, answer in ask(list(reasons), questions.plainer_question(rules), begin, "captions written again"):
        made = text.from_model(questions.continued(opening, answer), rules)
        if isinstance(made, Rejected):
            note = f"both answers were rejected: {reasons[name]}; {made.reason}"
            captions[name] = text.from_template(rules, note)
        else:
            captions[name] = Caption(
                text=made, source="retried", note=f"the first answer was rejected: {reasons[name]}"
            )
    return captions, rules.class_noun


def _answers(
    answer: Callable[[Sequence[Image.Image]], list[str]],
    pictures: Mapping[str, Path],
    *,
    read: Read,
    batch_size: int,
    log: Log,
) -> Iterator[tuple[str, str]]:
    """(name, answer) for each picture; a line for the log after each batch; half the batch where memory runs out."""
    names = list(pictures)
    start, done = time.perf_counter(), 0
    with ThreadPoolExecutor() as pool:
        while done < len(names):
            batch = names[done : done + batch_size]
            images = list(pool.map(lambda name: fit_to_model(read(pictures[name], MAX_PIXELS)), batch))
            try:
                answers = answer(images)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                answers = None
            if answers is None:  # behind the except, which keeps the tensors of the failed call alive
                torch.cuda.empty_cache()
                batch_size = -(-len(batch) // 2)
                log(f"out of memory, continuing with {batch_size} pictures at once")
                continue
            yield from zip(batch, answers, strict=True)
            done += len(batch)
            log(f"{done} of {len(names)}, {done / (time.perf_counter() - start):.2f} pictures/s")
