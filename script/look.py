"""Looks at pictures for the server's page: each one's fate, a thumbnail, and what will train badly, as JSON.

    script/python -m script.look FOLDER [--without NAMES.json]            prints what it sees
    script/python -m script.look FOLDER --pack OUT.zip --captions C.json  packs them with these captions, to train on
    script/python -m script.look FOLDER --unpack OUT --captions C.json    lays them there, for script/caption

FOLDER holds files as they were sent: pictures, captions, and archives of them. The server has no library that opens
pictures: what strangers send is decoded in this process alone, by the same code as in a training.
"""

import argparse
import base64
import io
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora.pictures import archive, background, buckets, names, photos, survey
from lora.pictures.photos import Photo

RESOLUTIONS = (512, 768, 1024)
"""FLUX.1's."""
THUMBNAIL = 224
"""Pixels of the longer side."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="script.look", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without", type=Path)
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--unpack", type=Path)
    arguments = parser.parse_args(argv)
    without = set(json.loads(arguments.without.read_text(encoding="utf-8"))) if arguments.without else set()
    captions = json.loads(arguments.captions.read_text(encoding="utf-8")) if arguments.captions else {}
    with tempfile.TemporaryDirectory() as made:
        found, notes, faults = gather(arguments.folder, Path(made), without)
        if arguments.pack:
            pack(found, captions, arguments.pack)
        elif arguments.unpack:
            unpack(found, captions, arguments.unpack)
        else:
            json.dump(look(found, notes, faults), sys.stdout)
    return 0


def gather(folder: Path, work: Path, without: Collection[str]) -> tuple[list[Photo], list[str], list[str]]:
    """The pictures among the files and in the archives of `folder`; what was left out or decided; what is wrong."""
    faults: list[str] = []
    for file in sorted(folder.iterdir()):
        if zipfile.is_zipfile(file) or archive.is_tar(file):
            place = work / file.name.rpartition(".")[0].replace(".", "_")
            try:
                archive.unpack(file, place)
            except ValueError as error:
                shutil.rmtree(place, ignore_errors=True)
                faults += f"{file.name}: {_plain(error)}".splitlines()
        else:
            shutil.copy(file, work / file.name)
    files = [path for path in work.rglob("*") if path.is_file()]
    kept = []
    for path in files:
        name = path.relative_to(work).as_posix()
        if not names.is_junk(name) and name not in without:
            kept.append(path)
    if not kept:
        return [], [], faults
    try:
        found, notes = photos.pair(work, kept)
    except ValueError as error:
        # What can be shown is shown all the same, so that whoever mends it sees the rest.
        faults += [line.strip() for line in _plain(error).splitlines()[1:]]
        pictures = [path for path in kept if path.suffix.casefold() in photos.PICTURE_SUFFIXES]
        found = [Photo(name=p.relative_to(work).as_posix(), path=p, caption=None) for p in sorted(pictures)]
        return found, [], faults
    return found, notes, faults


def look(found: Sequence[Photo], notes: Sequence[str], faults: Sequence[str]) -> dict[str, Any]:
    """What the page shows: for each picture its size, caption, thumbnail, warnings or fault; then what concerns all."""
    pictures, looks = [], []
    for photo in found:
        shown: dict[str, Any] = {"name": photo.name, "caption": photo.caption or "", "warnings": [], "fault": ""}
        try:
            [seen] = survey.look_at({photo.name: photo.path}, threads=1)
            shown |= {"width": seen.width, "height": seen.height, "thumbnail": thumbnail(photo)}
            told = [line for line in survey.report([seen], RESOLUTIONS) if not line.startswith("only ")]
            shown["warnings"] = [_of_one(line, photo.name) for line in told]
            looks.append(seen)
        except ValueError as error:
            shown["fault"] = _plain(error).partition("\n")[2].strip() or _plain(error)
        pictures.append(shown)
    of_all = [line for line in survey.report(looks, RESOLUTIONS) if "look alike" in line or line.startswith("only ")]
    if looks and (same := background.warning(looks)):
        of_all.append(same)
    return {"pictures": pictures, "warnings": of_all, "notes": list(notes), "faults": list(faults)}


def thumbnail(photo: Photo) -> str:
    """A data URI."""
    with buckets.opened(photo.path, photo.name) as picture:
        image = picture.decode((THUMBNAIL, THUMBNAIL))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    image.convert("RGB").save(written, "webp", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"


def pack(found: Sequence[Photo], captions: Mapping[str, str], out: Path) -> None:
    """A zip of the pictures as they are, each with its caption beside it."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as packed:
        for photo in found:
            packed.write(photo.path, photo.name)
            if photo.mask:
                packed.write(photo.mask, f"{photo.name.rpartition('.')[0]}.mask{photo.mask.suffix}")
            if text := captions.get(photo.name, photo.caption or "").strip():
                packed.writestr(f"{photo.name}.txt", text)


def unpack(found: Sequence[Photo], captions: Mapping[str, str], out: Path) -> None:
    """The pictures and captions as files of a new folder; the captions of `x.jpg` in `x.jpg.txt`."""
    for photo in found:
        path = out / photo.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo.path, path)
        if text := captions.get(photo.name, photo.caption or "").strip():
            path.with_name(f"{path.name}.txt").write_text(text, encoding="utf-8")


def _of_one(line: str, name: str) -> str:
    """A warning without the picture's name, which is beside it."""
    head, _, rest = line.partition(": ")
    facts = rest.replace(repr(name), "").strip(" ()")
    return f"{head} ({facts})" if facts else head


def _plain(error: Exception) -> str:
    return str(error).removeprefix("input_images: ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
