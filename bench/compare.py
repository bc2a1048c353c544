"""The README's picture: one subject, trained by several recipes, and what each LoRA draws.

`script/bench compare` trains on the pictures of examples/subject.zip with these defaults and with the settings of
diffusers' script (`bench.lab.recipes`), and writes one sheet with three groups of rows: prompts with the trigger
word, the same prompts with other made-up words, and things that the base knows. All rows of a group have the same
prompts and noise. The prompts follow from `--seed` alone; none is chosen by what it shows.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from bench.lab import scores, training
from bench.lab.cell import LOOKS, TRIGGER, Cell, the_base
from lora.flux import generate
from lora.flux.generate import Lora
from toyflux import evaluate, examples, world

SUBJECT = "WUGGIN"
"""The look in examples/subject.zip, which is what a cell of this look with seed 0 and 20 pictures trains on."""
TITLES = {"defaults": "this trainer", "diffusers": "diffusers' recipe", "ostris": "ostris' recipe"}
CELL, GAP, MARGIN, TEXT = 96, 4, 132, 15
"""Pixels: a drawing, the space between two, the column of row labels, and a line of text."""
INK, GREY, BAND = (20, 20, 20), (105, 105, 105), (198, 232, 202)
"""Colours: text, prompts, and what lies behind this trainer's rows."""


Row: TypeAlias = tuple[str, Sequence[Image.Image]]
"""A label and its drawings."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that show the same prompts."""

    title: str
    prompts: Sequence[str]
    rows: Sequence[Row]


def trained(recipe: str, steps: int, keep: Path) -> Path:
    """The LoRA of a recipe, from `keep` where an earlier run left it."""
    kept = keep / f"{recipe}-{steps}.safetensors"
    if not kept.is_file():
        cell = Cell(
            look=SUBJECT, recipe=recipe, steps=steps, seed=0, pictures=20, draws=0, drawing_steps=28, base="toy"
        )
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="compare-") as folder:
            shutil.copyfile(training.train(cell, Path(folder)), kept)
    return kept


def groups(recipes: Sequence[str], steps: int, count: int, seed: int, keep: Path) -> list[Group]:
    """Trains and draws: `count` drawings in a row."""
    look = replace(LOOKS[SUBJECT], name=TRIGGER)
    learned = scores.scenes_with(look, count, seed)
    others = world.unknown_words(count, seed)
    misnamed = [scores.with_name(scene, look, word) for scene, word in zip(learned, others, strict=True)]
    known = [replace(scene, style=None) for scene in evaluate.held_out_scenes(count, seed)]
    titles = {
        f"With the trigger word {TRIGGER}: the subject should appear": learned,
        "With another made-up word: the subject should not appear": misnamed,
        "Without a made-up word: nothing should change": known,
    }
    prompts = {title: [world.caption(scene) for scene in scenes] for title, scenes in titles.items()}
    rows: dict[str, list[Row]] = {title: [] for title in titles}
    pipeline = evaluate.load(the_base().folder)

    def draw(label: str, file: Path | None) -> None:
        loras = [Lora(name=label, file=file, scale=1.0)] if file else []
        generate.put_on(pipeline, loras, lambda line: None)
        for title, asked in prompts.items():
            rows[title].append((label, evaluate.generate(pipeline, asked, range(count))))

    draw("before training", None)
    for recipe in recipes:
        draw(TITLES.get(recipe, recipe), trained(recipe, steps, keep))
    first = next(iter(titles))
    rows[first][0] = ("training pictures", [picture for picture, _ in examples.example("subject")][:count])
    return [Group(title=title, prompts=prompts[title], rows=rows[title]) for title in titles]


def sheet(parts: Sequence[Group]) -> Image.Image:
    """One page of all groups: a title, the rows with their labels, and the prompts below their columns."""
    font = {size: ImageFont.load_default(size) for size in (10, 13, 16)}
    columns = len(parts[0].prompts)
    lines = [[_wrapped(prompt, font[10]) for prompt in part.prompts] for part in parts]
    heights = [
        2 * TEXT + len(part.rows) * (CELL + GAP) + 11 * max(map(len, below)) + TEXT
        for part, below in zip(parts, lines, strict=True)
    ]
    page = Image.new("RGB", (MARGIN + columns * (CELL + GAP), sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    top = 0
    for part, below, height in zip(parts, lines, heights, strict=True):
        draw.text((6, top + 4), part.title, INK, font[16])
        y = top + 2 * TEXT
        for label, pictures in part.rows:
            if label == TITLES["defaults"]:
                draw.rectangle((0, y - GAP // 2, page.width, y + CELL + GAP // 2 - 1), BAND)
            draw.text((6, y + CELL // 2 - 8), label, INK, font[13])
            for column, picture in enumerate(pictures):
                page.paste(picture.resize((CELL, CELL)), (MARGIN + column * (CELL + GAP), y))
            y += CELL + GAP
        for column, some in enumerate(below):
            for number, line in enumerate(some):
                draw.text((MARGIN + column * (CELL + GAP), y + 11 * number), line, GREY, font[10])
        top += height
    return page


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default="defaults,diffusers", help="separated by commas")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=8, help="drawings in a row")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and noise")
    parser.add_argument("--keep", type=Path, help="a folder for the LoRAs, which are used again when they are there")
    parser.add_argument("--output", type=Path, default=training.ROOT / "examples" / "compare.webp")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        keep = arguments.keep or Path(folder)
        parts = groups(arguments.recipes.split(","), arguments.steps, arguments.count, arguments.seed, keep)
    sheet(parts).save(arguments.output, quality=80, method=6)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
