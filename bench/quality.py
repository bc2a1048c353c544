"""What a recipe is worth: subjects and styles that the toy base cannot draw, trained by the project's own job, scored.

`script/bench quality` trains every recipe on every look, for each number of steps and each seed, and writes a table:

- *fidelity*: with the trigger word, the share of drawings that show the subject (or the style) in places, sizes, on
  backgrounds and in company of chance; beside it the judge's share on true pictures of the same scenes, its ceiling,
  and on those as the base's autoencoder gives them back, above which hardly a LoRA can come;
- *traits*: of the look's parts and colours, the share that those drawings show, cleanly drawn or not: it moves where
  fidelity, which wants all of them, still stands at nothing;
- *following*: of what else those prompts ask (background, places, the other thing), the share that is there; beside it
  the base's, with a creature that it knows in the trigger's place, or the share on true pictures of the style;
- *preservation*: of prompts without the trigger word, the share of right answers; beside it the base's;
- *leak*: the share of drawings with *another* made-up word, or with none, that show what was learned all the same.

A second table has the leak by class of word (`bench.lab.words`): near the trigger word, short capitals, syllables,
trigger words that people really use, the class noun, no word. For each it gives the share of drawings that show the
whole look, and of its traits; the untouched base's line says how many traits such drawings have by chance.

Every line of the results file is one training; a run goes on where it was stopped. Scores come from `toyflux.judge`,
which never saw a generated picture, and every recipe sees the same scenes and the same noise.

The learning rate falls to its end over a training's own length, so a long training that is looked at halfway is not one
of half the steps: each number of steps is a training of its own, as it is for who asks for that number. Trainings are
taken in an order in which a run that stops anywhere (`--minutes`) has seen the recipes on the same looks, and as many
looks as it could.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline

from bench.lab.cell import Cell, fingerprint, the_base
from bench.lab.recipes import RECIPES
from bench.lab.scores import references, scores
from bench.lab.table import differences, leaks, steps_to_goal, table
from bench.lab.training import train
from lora.flux import generate
from lora.flux.generate import Lora
from toyflux import evaluate, world


@functools.cache
def _pipeline() -> FluxPipeline:
    """Where the trainings are, too: on the GPU where there is one."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    return evaluate.load(the_base().folder).to("cuda" if torch.cuda.is_available() else "cpu")


def run(cell: Cell) -> dict[str, Any]:
    """Trains (unless the recipe is "base") and scores; the cell with its results, as a line of the results file."""
    started = time.monotonic()
    pipeline = _pipeline()
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        loras = [] if cell.recipe == "base" else [Lora(name=cell.look, file=train(cell, Path(folder)), scale=1.0)]
        generate.put_on(pipeline, loras, lambda line: None)
    score = scores if loras else references
    return asdict(cell) | {
        "scores": score(pipeline, cell),
        "seconds": round(time.monotonic() - started, 1),
    }


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Every training that the arguments ask for, the base's own scores before the first of each look and seed."""
    subjects = [look.name for look in world.SUBJECTS[: arguments.subjects]]
    styles = [look.name for look in world.UNSEEN_STYLES[: arguments.styles]]
    pairs = itertools.zip_longest(subjects[::2], subjects[1::2], styles)  # two subjects, then a style
    looks = [look for some in pairs for look in some if look is not None]
    some = {name: getattr(arguments, name) for name in ("pictures", "draws", "drawing_steps")} | {"base": fingerprint()}
    wanted: dict[Cell, None] = {}
    for seed, steps, look, recipe in itertools.product(arguments.seeds, arguments.steps, looks, arguments.recipes):
        cell = Cell(look=look, recipe=recipe, steps=steps, seed=seed, **some)
        wanted |= {replace(cell, recipe="base", steps=0): None, cell: None}
    return list(wanted)


def run_all(wanted: Sequence[Cell], workers: int, minutes: float) -> Iterator[dict[str, Any]]:
    """The results as they come; no cell is begun after so many minutes."""
    until, waiting, running = time.monotonic() + 60 * minutes, iter(wanted), set[Future[dict[str, Any]]]()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while True:
            while len(running) < workers and time.monotonic() < until and (cell := next(waiting, None)):
                running.add(pool.submit(run, cell))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def done_before(results: Path) -> Iterator[dict[str, Any]]:
    if results.is_file():
        for line in results.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut when the run was stopped
                yield json.loads(line)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/bench quality", description=__doc__, formatter_class=_Plain)
    parser.add_argument("--recipes", type=_names, default=["defaults", "ostris", "diffusers"], help=", ".join(RECIPES))
    parser.add_argument("--subjects", type=int, default=8, help="of 8")
    parser.add_argument("--styles", type=int, default=4, help="of 4")
    parser.add_argument("--steps", type=_numbers, default=[100, 200, 400, 800], help="in the order to take them")
    parser.add_argument("--seeds", type=_numbers, default=[1, 2, 3], help="in the order to take them")
    parser.add_argument("--pictures", type=int, default=10, help="training pictures of each look, 4 to 20")
    parser.add_argument("--draws", type=int, default=24, help="drawings for each score")
    parser.add_argument("--drawing-steps", type=int, default=28, help="of each drawing; 28 is what people draw with")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no training is begun")
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    arguments = parser.parse_args(argv)
    unknown = set(arguments.recipes) - set(RECIPES)
    if unknown:
        parser.error(f"--recipes: {', '.join(sorted(unknown))}: not one of {', '.join(RECIPES)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    asked = {tuple(asdict(cell).values()): cell for cell in cells(arguments)}
    before = {
        tuple(line.get(key) for key in Cell.__dataclass_fields__): line for line in done_before(arguments.results)
    }
    lines = [line for key, line in before.items() if key in asked]  # what else is in the file is not comparable
    wanted = [cell for key, cell in asked.items() if key not in before]
    print(f"{len(wanted)} trainings to do, {len(lines)} of {len(asked)} in {arguments.results}", flush=True)
    with arguments.results.open("a", encoding="utf-8") as file:
        file.write("\n" if before else "")  # the last line may have been cut
        for line in run_all(wanted, arguments.workers, arguments.minutes):
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            shown = ", ".join(f"{name} {value:.2f}" for name, value in line["scores"].items() if "," not in name)
            print(
                f"{line['look']}, {line['recipe']}, {line['steps']} steps, seed {line['seed']}, {line['seconds']} s:"
                f" {shown}",
                flush=True,
            )
    print(table(lines), leaks(lines), steps_to_goal(lines), differences(lines), sep="\n\n")


class _Plain(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
