"""The README's picture: what it was trained on, and how the sheet is laid out."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from bench import compare
from bench.compare import CELL, GAP, MARGIN, Group
from bench.lab.cell import LOOKS, TRIGGER
from toyflux import examples

ROOT = Path(__file__).resolve().parents[2]


def test_it_trains_on_the_pictures_of_the_example(tmp_path: Path) -> None:
    look = replace(LOOKS[compare.SUBJECT], name=TRIGGER)
    examples.write_zip(tmp_path / "pictures.zip", examples.subject_set(look, 20, seed=0))  # as the lab makes them
    assert (tmp_path / "pictures.zip").read_bytes() == (ROOT / "examples" / "subject.zip").read_bytes()


def test_the_sheet_shows_every_drawing_in_its_row_and_column() -> None:
    colours = {"training pictures": ("red", "blue"), "this trainer": ("lime", "black")}
    rows = [(label, [Image.new("RGB", (96, 96), colour) for colour in some]) for label, some in colours.items()]
    page = compare.sheet([Group(title="a title", prompts=["a TOK", "a TOK on a red background"], rows=rows)])
    assert page.width == MARGIN + 2 * (CELL + GAP)
    first = 2 * compare.TEXT + CELL // 2
    middles = [
        [page.getpixel((MARGIN + column * (CELL + GAP) + CELL // 2, first + row * (CELL + GAP))) for column in range(2)]
        for row in range(2)
    ]
    assert middles == [[(255, 0, 0), (0, 0, 255)], [(0, 255, 0), (0, 0, 0)]]


def test_a_prompt_is_broken_into_lines_as_wide_as_a_drawing() -> None:
    font = compare.ImageFont.load_default(10)
    lines = compare._wrapped("a TOK at the top and an orange square at the bottom on a brown background", font)
    assert len(lines) > 2
    assert all(font.getlength(line) <= CELL for line in lines)
