"""Training pictures of a subject or a style, with captions, and the example archives.

`python -m toyflux.examples FOLDER` writes the archives of `examples/`.
"""

from __future__ import annotations

import io
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from toyflux.drawing import draw
from toyflux.world import EXAMPLES, Creature, Scene, Style, Thing, caption, in_company, sample_scene, sample_thing


def sheet(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """The pictures in rows on white, cells as large as the largest."""
    width, height = max(i.width for i in images) + gap, max(i.height for i in images) + gap
    page = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        page.paste(image, (index % columns * width, index // columns * height))
    return page


def subject_set(subject: Creature, count: int, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Pictures of a subject in places, sizes and on backgrounds by the seed, no two alike, with captions; one in three
    shows a thing beside it, as people's photographs do."""
    rng = random.Random(f"subject {subject.name} {seed}")

    def scene(number: int) -> Scene:
        return in_company(rng, subject) if number % 3 == 2 else sample_scene(rng, [subject])

    return _pictures(scene, count, seed)


def style_set(manner: Style, count: int, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Pictures of the base's own things in a style, no two alike, with captions. All shapes, colours and backgrounds
    come about equally often: what was never named with the style keeps its own look in it."""
    rng = random.Random(f"style {manner.name} {seed}")
    named = Counter[str]()

    def scene(_: int) -> Scene:
        found = [sample_scene(rng, [sample_thing(rng, plain=True)], manner) for _ in range(20)]
        best = min(found, key=lambda scene: sum(named[word] for word in _named(scene)))
        named.update(_named(best))
        return best

    return _pictures(scene, count, seed)


def _named(scene: Scene) -> list[str]:
    [item] = scene.items
    assert isinstance(item.look, Thing)
    return [item.look.shape, f"of {item.look.colour}", f"on {scene.background}"]


def _pictures(sample: Callable[[int], Scene], count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """`sample` is given the number of pictures that there are already."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample(len(scenes))
        scenes.setdefault(caption(scene), scene)
    return [(draw(scene, seed * 1000 + i), text) for i, (text, scene) in enumerate(scenes.items())]


def write_zip(path: Path, pictures: Sequence[tuple[Image.Image, str]]) -> None:
    """Pictures as PNG, each with its caption in a .txt beside it; the same bytes every time."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, (image, text) in enumerate(pictures, 1):
            data = io.BytesIO()
            image.save(data, "PNG")
            for ending, content in (("png", data.getvalue()), ("txt", text.encode())):
                archive.writestr(zipfile.ZipInfo(f"{number:02d}.{ending}", (1980, 1, 1, 0, 0, 0)), content)


def example(kind: str) -> list[tuple[Image.Image, str]]:
    """The twenty pictures of an example, "subject" or "style", with captions that call what they show TOK."""
    look = replace(EXAMPLES[kind], name="TOK")
    return style_set(look, 20) if isinstance(look, Style) else subject_set(look, 20)


def write_examples(folder: Path) -> None:
    """The example archives, and a sheet of what each holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in EXAMPLES:
        pictures = example(kind)
        write_zip(folder / f"{kind}.zip", pictures)
        sheet([image for image, _ in pictures], 10).save(folder / f"{kind}.png")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python -m toyflux.examples [FOLDER]")
    write_examples(Path(sys.argv[1] if len(sys.argv) == 2 else "examples"))
