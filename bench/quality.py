"""What a recipe is worth: subjects and styles that the toy base cannot draw, trained by the project's own job, scored.

`script/bench quality` trains every recipe on every look, for each number of steps and each seed, and writes a table:

- *fidelity*: with the trigger word, the share of drawings that show the subject (or the style) in places, sizes, on
  backgrounds and in company of chance; beside it the judge's share on true pictures of the same scenes, its ceiling;
- *traits*: of the look's parts and colours, the share that those drawings show, cleanly drawn or not: it moves where
  fidelity, which wants all of them, still stands at nothing;
- *following*: of what else those prompts ask (background, places, the other thing), the share that is there; beside it
  the base's, with a name that it knows in the trigger's place;
- *preservation*: of prompts without the trigger word, the share of right answers; beside it the base's;
- *leak*: the share of drawings with *another* made-up word, or with none, that show what was learned all the same.

Every line of the results file is one training; a run goes on where it was stopped. Scores come from `toyflux.judge`,
which never saw a generated picture, and every recipe sees the same scenes and the same noise.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from PIL import Image

from lora import base, generate, job, source
from lora.generate import Lora
from lora.request import TrainRequest
from script import signature
from toyflux import evaluate, judge, world
from toyflux.world import Creature, Scene, Style

ROOT = Path(__file__).resolve().parent.parent
TRIGGER = "TOK"
LOOKS: dict[str, Creature | Style] = {look.name: look for look in (*world.SUBJECTS, *world.UNSEEN_STYLES)}
SCORES = ("fidelity", "traits", "following", "preservation", "leak")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings, run by the project's own code."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Inputs of `train` other than its defaults. A learning rate is for FLUX.1-dev's width, as its source gives it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `lora.fit.Settings` other than those decided from the inputs."""


ATTENTION_AND_DOUBLE_FF = r"\.attn\.(to|add)_|\.ff(_context)?\.net"
RECIPES = {
    "defaults": Recipe(),
    "without preservation": Recipe(inputs={"prior_loss_weight": 0.0}),
    # ostris/flux-dev-lora-trainer on Replicate; its EMA of 0.99 and its adapters on the modulation are not in this code
    "ostris": Recipe(
        inputs={"learning_rate": 4e-4, "lora_rank": 16, "caption_dropout_rate": 0.05, "prior_loss_weight": 0.0}
    ),
    # diffusers' train_dreambooth_lora_flux.py; its uniform timesteps and guidance of 3.5 are not in this code
    "diffusers": Recipe(
        inputs={
            "learning_rate": 1e-4,
            "lora_rank": 4,
            "batch_size": 4,
            "caption_dropout_rate": 0.0,
            "prior_loss_weight": 0.0,
            "layers_to_optimize_regex": ATTENTION_AND_DOUBLE_FF,
        }
    ),
    "more noise": Recipe(settings={"timestep_mean": 0.7}),
    "less noise": Recipe(settings={"timestep_mean": -0.7}),
    "no dropout": Recipe(inputs={"caption_dropout_rate": 0.0}),
    "batch 4": Recipe(inputs={"batch_size": 4}),
    "rank 4": Recipe(inputs={"lora_rank": 4}),
    "half the rate": Recipe(inputs={"learning_rate": 2e-4}),
    "twice the rate": Recipe(inputs={"learning_rate": 8e-4}),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its scores."""

    look: str
    recipe: str
    steps: int
    seed: int
    pictures: int
    draws: int

    @property
    def kind(self) -> str:
        return "style" if isinstance(LOOKS[self.look], Style) else "subject"


# ---------------------------------------------------------------- training


def request_for(cell: Cell, archive: Path, width: int) -> TrainRequest:
    """The request of a cell: the defaults that stand in `train.py`, the recipe's inputs, and next to no previews."""
    defaults = signature.read(ROOT / "train.py", "train").inputs
    fields = TrainRequest.__dataclass_fields__
    values = {name: defaults[name].default for name in fields if name in defaults}
    text = {name: "" for name in ("autocaption_prefix", "autocaption_suffix") if name in fields}
    values |= text | {
        "input_images": archive,
        "trigger_word": TRIGGER,
        "lora_type": cell.kind,
        "autocaption": False,
        "training_steps": cell.steps,
        "seed": cell.seed,
        "preview_prompts": "a red circle",
    }
    values |= RECIPES[cell.recipe].inputs
    if values["learning_rate"] is not None:
        values["learning_rate"] *= (3072 / width) ** 0.5  # as `fit.default_learning_rate` says
    return TrainRequest(**values)


def train(cell: Cell, folder: Path) -> Path:
    """The safetensors of a cell's training."""
    look = replace(LOOKS[cell.look], name=TRIGGER)
    archive = folder / "pictures.zip"
    draw = world.style_set if isinstance(look, Style) else world.subject_set
    world.write_zip(archive, draw(look, cell.pictures, cell.seed))  # type: ignore[arg-type]
    flux = base.find(os.environ.get("FLUX_BASE"), None)
    tar = job.run(
        request_for(cell, archive, flux.width),
        output=folder,
        flux_base=os.environ.get("FLUX_BASE"),
        captioner=None,
        log=lambda line: None,
        metric=lambda name, value: None,
        changes=RECIPES[cell.recipe].settings,
    )
    return source.fetch(str(tar), folder, "the tar")


# ---------------------------------------------------------------- scoring


def scenes_with(look: Creature | Style, count: int, seed: int) -> list[Scene]:
    """Scenes that show the look, other than those it was trained on: a third of a subject's in company."""
    rng = random.Random(f"scenes {seed}")
    scenes = []
    for i in range(count):
        thing = world.sample_thing(rng, plain=True)
        if isinstance(look, Style):
            scenes.append(world.sample_scene(rng, [thing], look))
        else:
            scenes.append(world.sample_scene(rng, [look, thing] if i % 3 == 2 else [look]))
    return scenes


def with_name(scene: Scene, look: Creature | Style, name: str) -> Scene:
    """The scene with another look's name in its caption where this look stands."""
    if isinstance(look, Style):
        return replace(scene, style=replace(look, name=name))
    items = tuple(replace(i, look=replace(look, name=name)) if i.look == look else i for i in scene.items)
    return replace(scene, items=items)


def asked_besides(scene: Scene) -> dict[str, str | int]:
    """What a scene asks besides its subject or style, as the judge's questions and their right answers."""
    answers = judge.answers_of(scene)
    wanted = ["background"]
    for number, item in enumerate(scene.items, 1):
        wanted += [f"place {number}"]
        wanted += [] if isinstance(item.look, Creature) else [f"what {number}", f"colour {number}"]
    return {question: answers[question] for question in wanted if question in answers}


def right(scene: Scene, picture: Image.Image) -> list[bool]:
    """Of what a scene asks besides its look, what is there."""
    [reading] = judge.read([picture])

    def said(question: str) -> str | int:
        chances = reading.probabilities[question]
        return judge.QUESTIONS[question][chances.index(max(chances))]

    return [said(question) == answer for question, answer in asked_besides(scene).items()]


def scores(pipeline: FluxPipeline, look: Creature | Style, draws: int, seed: int) -> dict[str, float]:
    """The scores of the pipeline as it is for a look under TRIGGER; see the head of this file."""
    learned = scenes_with(replace(look, name=TRIGGER), draws, seed)
    plain = [replace(scene, style=None) for scene in evaluate.held_out_scenes(draws, seed)]
    others = world.unknown_words(draws, seed)
    misnamed = [with_name(s, replace(look, name=TRIGGER), word) for s, word in zip(learned, others, strict=True)]

    def drawn(scenes: Sequence[Scene], start: int) -> list[Image.Image]:
        captions = [world.caption(scene) for scene in scenes]
        return evaluate.generate(pipeline, captions, range(start, start + len(scenes)), _native(pipeline))

    traits = judge.traits_of(look)
    pictures, kept, strange = drawn(learned, 1000), drawn(plain, 2000), drawn(misnamed, 3000)
    return {
        "fidelity": _share(judge.shows(pictures, look)),
        "traits": _share([r.traits[trait] == traits[trait] for r in judge.read(pictures) for trait in traits]),
        "following": _share([yes for s, p in zip(learned, pictures, strict=True) for yes in right(s, p)]),
        "preservation": _share([yes for s, p in zip(plain, kept, strict=True) for yes in right(s, p)]),
        "leak": _share(judge.shows(strange + kept, look)),
    }


def references(pipeline: FluxPipeline, look: Creature | Style, draws: int, seed: int) -> dict[str, float]:
    """What a LoRA could reach at best: the judge's ceiling on true pictures, and the untouched base's own scores."""
    scenes = scenes_with(look, draws, seed)
    true = [world.draw(scene, i) for i, scene in enumerate(scenes)]
    known = (world.STYLE_NAMES if isinstance(look, Style) else world.NAMES)[seed]
    stand_in: Creature | Style = world.style(known) if isinstance(look, Style) else world.creature(known)
    familiar = scenes_with(stand_in, draws, seed)
    captions = [world.caption(scene) for scene in familiar]
    pictures = evaluate.generate(pipeline, captions, range(1000, 1000 + draws), _native(pipeline))
    alone = scores(pipeline, look, draws, seed)
    return alone | {
        "ceiling": _share(judge.shows(true, look)),
        "fidelity to a known name": _share(judge.shows(pictures, stand_in)),
        "following": _share([yes for s, p in zip(familiar, pictures, strict=True) for yes in right(s, p)]),
    }


def _native(pipeline: FluxPipeline) -> tuple[int, int]:
    side = pipeline.vae.config.sample_size
    return side, side


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def run(cell: Cell) -> dict[str, Any]:
    """Trains (unless the recipe is "base") and scores; the cell with its results, as a line of the results file."""
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    started = time.monotonic()
    pipeline = evaluate.load(base.find(os.environ.get("FLUX_BASE"), None).folder)
    look = LOOKS[cell.look]
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        if cell.recipe == "base":
            results = references(pipeline, look, cell.draws, cell.seed)
        else:
            file = train(cell, Path(folder))
            generate.put_on(pipeline, [Lora(name=cell.look, file=file, scale=1.0)], lambda line: None)
            results = scores(pipeline, look, cell.draws, cell.seed)
    return asdict(cell) | {"scores": results, "seconds": round(time.monotonic() - started, 1)}


# ---------------------------------------------------------------- the lab


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Every training that the arguments ask for, the base's own scores first."""
    looks = [look.name for look in world.SUBJECTS[: arguments.subjects]]
    looks += [look.name for look in world.UNSEEN_STYLES[: arguments.styles]]
    some = {"pictures": arguments.pictures, "draws": arguments.draws}
    seeds = range(1, arguments.seeds + 1)
    untouched = [Cell(look=look, recipe="base", steps=0, seed=seed, **some) for seed in seeds for look in looks]
    return untouched + [
        Cell(look=look, recipe=recipe, steps=steps, seed=seed, **some)
        for seed in seeds
        for steps in arguments.steps
        for look in looks
        for recipe in arguments.recipes
    ]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each kind, recipe and number of steps, with the mean and the spread over looks and seeds."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        kind = "style" if isinstance(LOOKS[line["look"]], Style) else "subject"
        groups.setdefault((kind, line["recipe"], line["steps"]), []).append(line)
    rows = [f"| kind | recipe | steps | {' | '.join(SCORES)} | trainings |", "|" + " --- |" * (len(SCORES) + 4)]
    for (kind, recipe, steps), group in sorted(groups.items()):
        columns = [_spread([line["scores"][score] for line in group]) for score in SCORES]
        if recipe == "base":
            ceiling = statistics.mean(line["scores"]["ceiling"] for line in group)
            columns[0] += f" (judge's ceiling {ceiling:.2f})"
        rows.append(f"| {kind} | {recipe} | {steps or '–'} | {' | '.join(columns)} | {len(group)} |")
    return "\n".join(rows)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


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
    parser.add_argument("--steps", type=_numbers, default=[100, 200, 400, 800], help="100,200,400,800")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=10, help="training pictures of each look, 4 to 20")
    parser.add_argument("--draws", type=int, default=24, help="drawings for each score")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    arguments = parser.parse_args(argv)
    unknown = set(arguments.recipes) - set(RECIPES)
    if unknown:
        parser.error(f"--recipes: {', '.join(sorted(unknown))}: not one of {', '.join(RECIPES)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    lines = list(done_before(arguments.results))
    finished = {tuple(line[key] for key in Cell.__dataclass_fields__) for line in lines}
    wanted = [cell for cell in cells(arguments) if tuple(asdict(cell).values()) not in finished]
    print(f"{len(wanted)} trainings to do, {len(lines)} in {arguments.results}", flush=True)
    with (
        ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool,
        arguments.results.open("a", encoding="utf-8") as file,
    ):
        file.write("\n" if lines else "")  # the last line may have been cut
        for future in as_completed(pool.submit(run, cell) for cell in wanted):
            line = future.result()
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            shown = ", ".join(f"{name} {value:.2f}" for name, value in line["scores"].items())
            print(f"{line['look']}, {line['recipe']}, {line['steps']} steps, seed {line['seed']}: {shown}", flush=True)
    print(table(lines))


class _Plain(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
