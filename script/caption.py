"""Looks at pictures before training, and captions them, to read and mend: behind script/caption."""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner import text
from captioner.text import Caption, Rules
from lora import presets, trigger
from lora.pictures import archive, background, names, photos, subjects, survey
from lora.pictures.photos import Photo
from script import cli, signature

ROOT = Path(__file__).resolve().parent.parent
INPUTS = (
    *("trigger_word", "lora_type", "mode", "captioning", "autocaption_prefix", "autocaption_suffix"),
    *("trigger_phrase", "is_style", "autocaption", "caption_prefix", "caption_suffix"),
)
"""Those of train.py that shape a caption, then their old names."""
FLUX_T5_TOKENS, FLUX_CLIP_TOKENS, FLUX_RESOLUTIONS = 512, 77, (512, 768, 1024)

HELP = """\
usage: script/caption PICTURES -i NAME=VALUE [-i NAME=VALUE …] [-o FOLDER]
       script/caption --check PICTURES [-i NAME=VALUE …]

Writes a .txt with a caption beside each picture that has none, never over one that you wrote. The model is the one
that the environment variable CAPTIONER names, a folder or Hub id: Qwen/Qwen3-VL-8B-Instruct if it is not set.

  PICTURES          a folder, or a zip, tar or tar.gz
  --check           write nothing; say what will train badly: small, blurred and nearly equal pictures, one background
                    for all, and where the model is at hand several people, small or hidden faces, the same clothes
  -i NAME=VALUE     as for script/train: trigger_word, lora_type, mode, captioning, autocaption_prefix,
                    autocaption_suffix
  -o FOLDER         for an archive: where to unpack it; a new folder of its name if not given
  -h, --help        this text"""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What lies in a folder, every picture of it seen to be whole."""

    files: Sequence[Path]
    found: Sequence[Photo]
    missing: Sequence[Photo]
    """Those without a caption."""
    warnings: Sequence[str]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="script/caption", add_help=False, allow_abbrev=False)
    parser.add_argument("pictures", nargs="?", type=Path)
    parser.add_argument("-i", "--input", action="append", default=[], dest="inputs")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.help:
        cli.say(HELP)
        return 0

    inputs = signature.read(ROOT / "train.py", "train")
    inputs = dataclasses.replace(inputs, inputs={name: inputs.inputs[name] for name in INPUTS})
    values, faults = cli.check(inputs, arguments.inputs, os.environ)
    settled = presets.settle(presets.Asked.of(values))
    faults += settled.all_faults()
    if settled.captioning == "all":
        faults.append("captioning: this never writes over a caption of yours; delete those that are to be new")
    source, output = arguments.pictures, arguments.output
    if source is None:
        faults.append("PICTURES: missing; name a folder or an archive")
    elif not source.exists():
        faults.append(f"PICTURES: there is no {source}")
    elif arguments.check and output is not None:
        faults.append("-o: --check writes nothing")
    elif source.is_dir() and output is not None:
        faults.append("-o: is for an archive; the captions of a folder go into that folder")
    elif source.is_file() and not arguments.check:
        output = output or Path(source.name.removesuffix(".gz")).with_suffix("")
        if output.exists():
            faults.append(f"-o: {output} is there already; name a new folder, or caption that one")
    if faults:
        print("script/caption: nothing was started:", *faults, sep="\n  ", file=sys.stderr)
        return 2
    rules = Rules(
        trigger_word=settled.trigger_word,
        lora_type=settled.lora_type,
        mode=values.get("mode"),  # type: ignore[arg-type]
        prefix=settled.autocaption_prefix,
        suffix=settled.autocaption_suffix,
        class_noun=None,
        t5=text.Room(text.estimate_tokens, FLUX_T5_TOKENS),
        clip=text.Room(text.estimate_tokens, FLUX_CLIP_TOKENS),
    )
    model = os.environ.get("CAPTIONER")
    command = cli.Command(program="script/caption", summary="", output="")
    if arguments.check:
        return cli.run(command, lambda: check(source, rules, model))
    for note in settled.notes:
        print(note)
    return cli.run(command, lambda: _caption(source, output, rules, settled.captioning, model))


def _caption(source: Path, output: Path | None, rules: Rules, captioning: str, model: str | None) -> None:
    for word in trigger.words(rules.trigger_word):
        text.of_word(rules, word, None)
    if output is None:
        written = caption_folder(source, rules, captioning, model)
        folder = source
    else:
        folder = output
        try:
            with _called_pictures():
                archive.unpack(source, folder)
            written = caption_folder(folder, rules, captioning, model)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    print(f"{written} captions written into {folder}")


def check(source: Path, rules: Rules, model: str | None) -> None:
    """Says what will train badly in a folder or an archive, a line each; nothing is written."""
    folder = source
    if source.is_file():
        folder = Path(tempfile.mkdtemp())
        with _called_pictures():
            archive.unpack(source, folder)
    pictures = look_through(folder, rules)
    warnings = list(pictures.warnings)
    asked = _at_hand(model)
    if asked is None:
        print("the captioning model is not here: checked by pixels alone (CAPTIONER names a folder with one)")
    else:
        warnings += _seen(pictures, rules, asked)
    for warning in warnings:
        print(f"warning: {warning}")
    captioned = len(pictures.found) - len(pictures.missing)
    what = "nothing to say against them"
    if warnings:
        what = f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}"
    print(f"{len(pictures.found)} pictures, {captioned} of them with a caption: {what}")


def look_through(folder: Path, rules: Rules) -> Pictures:
    """The pictures of a folder and what pixels tell of them. ValueError names every file that cannot be used, and the
    folders that do not fit where there are several trigger words."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not names.is_junk(path.relative_to(folder).as_posix())]
    with _called_pictures():
        found, warnings = photos.pair(folder, files)
        found, told = subjects.share_out(found, trigger.words(rules.trigger_word))
        looks = survey.look_at({photo.name: photo.path for photo in found})
    print("\n".join(told), end="\n" * bool(told))
    warnings += survey.report(looks, FLUX_RESOLUTIONS)
    if rules.kind != "style" and (alike := background.warning(looks)):
        warnings.append(alike)
    missing = [photo for photo in found if photo.caption is None]
    return Pictures(files=files, found=found, missing=missing, warnings=warnings)


@contextlib.contextmanager
def _called_pictures() -> Iterator[None]:
    """Calls the pictures by this command's name for them, where the trainer's input is named."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("input_images:", "PICTURES:")) from error


def _at_hand(model: str | None) -> str | None:
    """The captioning model where it can be asked: it is here, or there is a GPU for it."""
    import torch  # only now: it is slow to load

    from captioner import model as captioner_model

    name = model or captioner_model.MODEL
    return name if torch.cuda.is_available() or captioner_model.is_at_hand(name) else None


def _machine() -> Mapping[str, Any]:
    """Where the model runs, in which type."""
    import torch

    gpu = torch.cuda.is_available()
    return {"device": "cuda" if gpu else "cpu", "dtype": torch.bfloat16 if gpu else torch.float32}


def _seen(pictures: Pictures, rules: Rules, model: str) -> list[str]:
    """What the model sees that will train badly."""
    from captioner import caption
    from captioner import model as captioner_model
    from lora.pictures import buckets

    where = _machine()
    size = caption.CPU_BATCH_SIZE if where["device"] == "cpu" else caption.BATCH_SIZE
    paths = {photo.name: photo.path for photo in pictures.found}
    with captioner_model.load(model, **where) as captioner:
        return caption.look_at(
            captioner, paths, rules.kind, None, read=buckets.read_picture, batch_size=size, log=cli.say
        )


def caption_folder(folder: Path, rules: Rules, captioning: str, model: str | None) -> int:
    """Write a caption beside each picture in the folder that has none; how many were written.

    All pictures are looked at before the model is loaded. ValueError where a file is no picture or caption, or where no
    model could write any.
    """
    pictures = look_through(folder, rules)
    for warning in pictures.warnings:
        print(f"warning: {warning}")
    from captioner import caption  # only now, as torch: it is slow to load
    from captioner import model as captioner_model
    from lora.pictures import buckets

    if pictures.missing and captioning != "disabled" and _at_hand(model) is None:
        raise ValueError(
            f"{len(pictures.missing)} of {len(pictures.found)} pictures have no caption, and nothing was written: the"
            f" captioning model {model or captioner_model.MODEL} is not here, and is not"
            " downloaded for a machine without a"
            " GPU. Set CAPTIONER to a folder with a Qwen3-VL-Instruct model, or write a .txt beside each picture"
        )
    captions, _, _ = caption.caption_all(
        {photo.name: photo.path for photo in pictures.found},
        {photo.name: photo.caption for photo in pictures.found if photo.caption is not None},
        {photo.name: text.of_word(rules, photo.word or "", photo.class_noun) for photo in pictures.found},
        captioning=captioning,
        model=model,
        read=buckets.read_picture,
        log=cli.say,
        **_machine(),
    )
    write(captions, pictures.missing, pictures.files)
    return len(pictures.missing)


def write(captions: Mapping[str, Caption], missing: Sequence[Photo], files: Sequence[Path]) -> None:
    """The captions of the missing ones as `a.txt` for `a.jpg`, `a.jpg.txt` where there is an `a.png` too.

    A `.txt` that is there already is empty, or the picture would not be missing, and is filled.
    """
    for photo in missing:
        twins = [file for file in files if file.with_suffix("") == photo.path.with_suffix("")]
        names = [photo.path.with_suffix(".txt"), photo.path.with_name(photo.path.name + ".txt")]
        empty = [file for file in files if str(file).casefold() in [str(name).casefold() for name in names]]
        file = empty[0] if empty else names[len(twins) > 1]
        with file.open("w" if empty else "x", encoding="utf-8") as out:
            out.write(captions[photo.name].text + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
