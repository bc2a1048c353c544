"""Captions a folder or an archive from the command line, to read and mend before training: behind script/caption."""

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captioner import text
from captioner.text import Caption, Rules
from lora.pictures import archive, photos
from lora.pictures.photos import Photo
from script import cli, signature

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("trigger_word", "lora_type", "autocaption_prefix", "autocaption_suffix")
"""Those of train.py that shape a caption."""
FLUX_T5_TOKENS, FLUX_CLIP_TOKENS = 512, 77

HELP = """\
usage: script/caption PICTURES -i NAME=VALUE [-i NAME=VALUE …] [-o FOLDER]

Writes a .txt with a caption beside each picture that has none, never over one that you wrote. The model is the one
that the environment variable CAPTIONER names, a folder or Hub id: Qwen/Qwen3-VL-8B-Instruct if it is not set.

  PICTURES          a folder, or a zip, tar or tar.gz
  -i NAME=VALUE     as for script/train: trigger_word, lora_type, autocaption_prefix, autocaption_suffix
  -o FOLDER         for an archive: where to unpack it; a new folder of its name if not given
  -h, --help        this text"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="script/caption", add_help=False, allow_abbrev=False)
    parser.add_argument("pictures", nargs="?", type=Path)
    parser.add_argument("-i", "--input", action="append", default=[], dest="inputs")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("-h", "--help", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.help:
        cli.say(HELP)
        return 0

    inputs = signature.read(ROOT / "train.py", "train")
    inputs = dataclasses.replace(inputs, inputs={name: inputs.inputs[name] for name in INPUTS})
    values, faults = cli.check(inputs, arguments.inputs, os.environ)
    source, output = arguments.pictures, arguments.output
    if source is None:
        faults.append("PICTURES: missing; name a folder or an archive")
    elif not source.exists():
        faults.append(f"PICTURES: there is no {source}")
    elif source.is_dir() and output is not None:
        faults.append("-o: is for an archive; the captions of a folder go into that folder")
    elif source.is_file():
        output = output or Path(source.name.removesuffix(".gz")).with_suffix("")
        if output.exists():
            faults.append(f"-o: {output} is there already; name a new folder, or caption that one")
    if faults:
        print("script/caption: nothing was started:", *faults, sep="\n  ", file=sys.stderr)
        return 2
    command = cli.Command(program="script/caption", summary="", output="")
    return cli.run(command, lambda: _caption(source, output, values, os.environ.get("CAPTIONER")))


def _caption(source: Path, output: Path | None, values: Mapping[str, Any], model: str | None) -> None:
    rules = Rules(
        trigger_word=values["trigger_word"],
        lora_type=values["lora_type"],
        prefix=values["autocaption_prefix"] or "",
        suffix=values["autocaption_suffix"] or "",
        class_noun=None,
        t5=text.Room(text.estimate_tokens, FLUX_T5_TOKENS),
        clip=text.Room(text.estimate_tokens, FLUX_CLIP_TOKENS),
    )
    text.check(rules)
    if output is None:
        written = caption_folder(source, rules, model)
        folder = source
    else:
        folder = output
        try:
            archive.unpack(source, folder)
            written = caption_folder(folder, rules, model)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    print(f"{written} captions written into {folder}")


def caption_folder(folder: Path, rules: Rules, model: str | None) -> int:
    """Write a caption beside each picture in the folder that has none; how many were written.

    ValueError where a file is no picture or caption, or where no model could write any.
    """
    import torch  # only now: it is slow to load

    from captioner import caption
    from lora.pictures import buckets

    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not archive.is_junk(path.relative_to(folder).as_posix())]
    found, warnings = photos.pair(folder, files)
    for warning in warnings:
        print(f"warning: {warning}")
    missing = [photo for photo in found if photo.caption is None]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if missing and device == "cpu" and not caption.is_at_hand(model or caption.MODEL):
        raise ValueError(
            f"{len(missing)} of {len(found)} pictures have no caption, and nothing was written: the captioning model"
            f" {model or caption.MODEL} is not here, and is not downloaded for a machine without a GPU. Set CAPTIONER"
            " to a folder with a Qwen3-VL-Instruct model, or write a .txt beside each picture"
        )
    captions, _ = caption.caption_all(
        {photo.name: photo.path for photo in found},
        {photo.name: photo.caption for photo in found if photo.caption is not None},
        rules,
        captioning="automatic",
        model=model,
        device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        read=buckets.read_picture,
        log=lambda line: print(line, flush=True),
    )
    write(captions, missing, files)
    return len(missing)


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
