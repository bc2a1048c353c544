"""Two subjects in one LoRA, on the toy base: does each show under its own word, and under no other?

`script/bench subjects`: both are trained together from folders named by their words, with the defaults. Then each is
drawn alone under its word, both under a made-up word, and the judge says what every drawing shows.
"""

import argparse
import io
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bench.lab import scores, training
from bench.lab.cell import Cell
from lora import job
from lora.file import source
from lora.flux import base, generate
from lora.flux.generate import Lora
from toyflux import evaluate, examples, judge, world
from toyflux.world import Creature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--looks", type=int, nargs=2, default=[0, 5], help="two numbers of toyflux.world.SUBJECTS")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--pictures", type=int, default=12, help="of each")
    parser.add_argument("--draws", type=int, default=24, help="under each word")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    looks = dict(zip(("ANNA", "BOB"), (world.SUBJECTS[number] for number in args.looks), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        file = _train(looks, args, Path(folder))
        pipeline = evaluate.load(base.TOY)
        generate.put_on(pipeline, [Lora(name="both", file=file, scale=1.0)], lambda line: None)
    made_up = world.unknown_words(args.draws, args.seed)
    for word, look in {**looks, "made-up words": looks["ANNA"]}.items():
        scenes = [one for one in scores.scenes_with(look, 5 * args.draws, args.seed) if len(one.items) == 1]
        called = [word] * args.draws if word in looks else made_up
        named = [scores.with_name(scene, look, name) for scene, name in zip(scenes, called, strict=False)]
        pictures = evaluate.generate(
            pipeline, [world.caption(scene) for scene in named], range(1000, 1000 + len(named))
        )
        shown = {other: sum(judge.shows(pictures, of)) / len(pictures) for other, of in looks.items()}
        print(f"under {word}: " + ", ".join(f"{other} {share:.2f}" for other, share in shown.items()), flush=True)


def _train(looks: Mapping[str, Creature], args: argparse.Namespace, folder: Path) -> Path:
    """The safetensors of a training on both."""
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for word, look in looks.items():
            drawn = examples.subject_set(replace(look, name=word), args.pictures, args.seed)
            for number, (picture, caption) in enumerate(drawn):
                data = io.BytesIO()
                picture.save(data, "PNG")
                archive.writestr(f"{word}/{number:02d}.png", data.getvalue())
                archive.writestr(f"{word}/{number:02d}.txt", caption)
    cell = Cell(
        look=looks["ANNA"].name,
        recipe="defaults",
        steps=args.steps,
        seed=args.seed,
        pictures=args.pictures,
        draws=args.draws,
        drawing_steps=28,
        base="",
    )
    wanted = training.request_for(cell, folder / "pictures.zip", base.find(str(base.TOY), None).width)
    tar = job.run(
        replace(wanted, trigger_word=", ".join(looks)),
        output=folder,
        flux_base=str(base.TOY),
        captioner=None,
        log=lambda line: None,
        metric=lambda name, value: None,
    )
    return source.fetch(str(tar), folder, "the tar")


if __name__ == "__main__":
    main()
