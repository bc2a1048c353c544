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
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from PIL import Image

from lora import job, presets
from lora.file import source, weights
from lora.flux import adapter, base, generate
from lora.flux.base import Base
from lora.flux.generate import Lora
from lora.request import TrainRequest
from lora.result import record
from lora.training import recipe as recipe_rows
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
    """Fields of `lora.training.fit.Settings` other than those decided from the inputs."""
    rate: float = 1.0
    """Times the learning rate that suits the type, where the inputs name none."""
    gaussian_start: bool = False
    """A LoRA whose A is normal with a standard deviation of 1 / rank, peft's `init_lora_weights="gaussian"`."""
    short_captions: bool = False
    """The trigger word and nothing else of what a picture shows."""


ATTENTION_AND_DOUBLE_FF = r"\.attn\.(to|add)_|\.ff(_context)?\.net"
RECIPES = {
    "defaults": Recipe(),
    "without preservation": Recipe(inputs={"preservation": "off"}),
    # ostris/flux-dev-lora-trainer on Replicate: the configuration in `train.py` of replicate/flux-fine-tuner, and of
    # ostris/ai-toolkit what that leaves to its defaults. Not so here: its adapters on the modulation, its three sizes
    # of each picture (the toy base has one), Adam's moments in eight bits.
    "ostris": Recipe(
        inputs={"learning_rate": 4e-4, "lora_rank": 16, "caption_dropout_rate": 0.05, "preservation": "off"},
        settings={
            "held": 1.0,
            "ema_decay": 0.99,
            "weight_decay": 1e-2,
            "adam_epsilon": 1e-6,
            "timestep_mean": 0.0,
            "uniform_share": 0.0,
        },
    ),
    # The defaults of diffusers' examples/dreambooth/train_dreambooth_lora_flux.py, with a caption for each picture. One
    # step sees four pictures.
    "diffusers": Recipe(
        inputs={
            "learning_rate": 1e-4,
            "lora_rank": 4,
            "batch_size": 4,
            "caption_dropout_rate": 0.0,
            "preservation": "off",
            "layers_to_optimize_regex": ATTENTION_AND_DOUBLE_FF,
        },
        settings={"held": 1.0, "uniform_share": 1.0, "guidance": 3.5},
        gaussian_start=True,
    ),
    **{f"preservation of {ratio:g}": Recipe(settings={"prior_ratio": ratio}) for ratio in (0.25, 0.5, 1.0, 1.5, 3.0)},
    "preservation every step": Recipe(settings={"prior_every": 1}),
    "preservation every third step": Recipe(settings={"prior_every": 3}),
    "32 drawings": Recipe(settings={"prior_prompts": 32}),
    "held to all kinds": Recipe(settings={"prior_kinds": ("things", "made-up words", "captions")}),
    "held to captions": Recipe(settings={"prior_kinds": ("captions",)}),
    # No other made-up words: ordinary things alone, and as prior preservation with a class noun has it.
    "preserving things": Recipe(settings={"prior_kinds": ("things",)}),
    "preserving captions of things": Recipe(settings={"prior_kinds": ("things", "captions of things")}),
    "guidance 3.5": Recipe(settings={"guidance": 3.5}),
    "timesteps around -0.7": Recipe(settings={"timestep_mean": -0.7}),
    "timesteps around 0": Recipe(settings={"timestep_mean": 0.0}),
    "timesteps around 1.2": Recipe(settings={"timestep_mean": 1.2}),
    "timesteps around 2.5": Recipe(settings={"timestep_mean": 2.5}),
    "uniform timesteps": Recipe(settings={"uniform_share": 1.0}),
    "half uniform timesteps": Recipe(settings={"uniform_share": 0.5}),
    "no uniform timesteps": Recipe(settings={"uniform_share": 0.0}),
    "no dropout": Recipe(inputs={"caption_dropout_rate": 0.0}),
    "dropout 0.1": Recipe(inputs={"caption_dropout_rate": 0.1}),
    "running mean": Recipe(settings={"ema_decay": 0.99}),
    "constant rate": Recipe(settings={"held": 1.0}),
    "rate held for no time": Recipe(settings={"held": 0.0}),
    "rate held for half": Recipe(settings={"held": 0.5}),
    "half the rate": Recipe(rate=0.5),
    "twice the rate": Recipe(rate=2.0),
    "batch 4": Recipe(inputs={"batch_size": 4}),
    "rank 4": Recipe(inputs={"lora_rank": 4}),
    "rank 64": Recipe(inputs={"lora_rank": 64}),
    "rank 128": Recipe(inputs={"lora_rank": 128}),
    "short captions": Recipe(short_captions=True),
    "stopped early": Recipe(inputs={"stop_early": True}),
    # A part of the layers: the words' own stream, as Custom Diffusion (arXiv:2212.04488) trains what reads the words;
    # either kind of block, as B-LoRA (arXiv:2403.14572) tells a style's from a subject's.
    "text stream": Recipe(inputs={"layers_to_optimize_regex": r"\.attn\.(add_|to_add_out)|\.ff_context"}),
    "double blocks": Recipe(inputs={"layers_to_optimize_regex": r"\.transformer_blocks"}),
    "single blocks": Recipe(inputs={"layers_to_optimize_regex": r"\.single_transformer_blocks"}),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its scores."""

    look: str
    recipe: str
    steps: int
    seed: int
    pictures: int
    """To train on."""
    draws: int
    """For each score."""
    drawing_steps: int
    base: str
    """`fingerprint()` of the base and the judge: results of one are not those of another."""

    @property
    def kind(self) -> str:
        return "style" if isinstance(LOOKS[self.look], Style) else "subject"


def fingerprint() -> str:
    """Eight digits of the SHA-256 over the weights of the judge and of the base in FLUX_BASE, or else the toy base."""
    hashes = [record.file_hash(file) for file in (*sorted(_base().folder.rglob("*.safetensors")), judge.WEIGHTS)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:8]


# ---------------------------------------------------------------- training


def request_for(cell: Cell, archive: Path, width: int) -> TrainRequest:
    """The request of a cell: the defaults that stand in `train.py`, the recipe's inputs, and next to no previews."""
    defaults = signature.read(ROOT / "train.py", "train").inputs
    fields = TrainRequest.__dataclass_fields__
    values = {name: defaults[name].default for name in fields if name in defaults}
    text = {name: "" for name in ("autocaption_prefix", "autocaption_suffix", "preservation") if name in fields}
    values |= text | {
        "lora_rank": presets.LORA_RANK,
        "input_images": archive,
        "trigger_word": TRIGGER,
        "lora_type": cell.kind,
        "captioning": "disabled",
        "training_steps": cell.steps,
        "seed": cell.seed,
        "preview_prompts": "a red circle",
    }
    values |= RECIPES[cell.recipe].inputs
    if values["learning_rate"]:
        values["learning_rate"] = recipe_rows.at_width(values["learning_rate"], width)
    else:
        row, _ = recipe_rows.choose(_base().native, cell.kind)
        ours, _ = recipe_rows.learning_rate_for(row, width, values["lora_rank"])
        values["learning_rate"] = ours * RECIPES[cell.recipe].rate
    return TrainRequest(**values)


def gaussian_start(path: Path, flux: Base, request: TrainRequest) -> None:
    """Writes the LoRA that a training goes on from where its recipe starts otherwise than this project's."""
    skeleton = flux.skeleton()
    modules, shapes = adapter.target_modules(skeleton), adapter.shapes(skeleton)
    if request.layers_to_optimize_regex:
        modules = [module for part in adapter.choose(modules, request.layers_to_optimize_regex) for module in part]
    generator, rank = torch.Generator().manual_seed(request.seed or 0), request.lora_rank
    pairs = {
        module: (torch.randn(rank, inputs, generator=generator) / rank, torch.zeros(outputs, rank))
        for module, (outputs, inputs) in shapes.items()
        if module in modules
    }
    weights.write(path, pairs, {})


def train(cell: Cell, folder: Path) -> Path:
    """The safetensors of a cell's training."""
    recipe, look = RECIPES[cell.recipe], replace(LOOKS[cell.look], name=TRIGGER)
    archive = folder / "pictures.zip"
    draw = world.style_set if isinstance(look, Style) else world.subject_set
    pictures = draw(look, cell.pictures, cell.seed)  # type: ignore[arg-type]
    if recipe.short_captions:
        short = f"in the style of {TRIGGER}" if isinstance(look, Style) else f"a {TRIGGER}"
        pictures = [(picture, short) for picture, _ in pictures]
    world.write_zip(archive, pictures)
    flux = _base()
    request = request_for(cell, archive, flux.width)
    if recipe.gaussian_start:
        start = folder / "start.safetensors"
        gaussian_start(start, flux, request)
        request = replace(request, resume_from=str(start))
    tar = job.run(
        request,
        output=folder,
        flux_base=str(flux.folder),
        captioner=None,
        log=lambda line: None,
        metric=lambda name, value: None,
        changes=recipe.settings,
    )
    return source.fetch(str(tar), folder, "the tar")


# ---------------------------------------------------------------- scoring


def scenes_with(look: Creature | Style, count: int, seed: int) -> list[Scene]:
    """Scenes that show the look, other than those it was trained on: a third of a subject's in company."""
    rng = random.Random(f"scenes {seed}")
    scenes = []
    for i in range(count):
        if isinstance(look, Style):
            scenes.append(world.sample_scene(rng, [world.sample_thing(rng, plain=True)], look))
        else:
            scenes.append(world.in_company(rng, look) if i % 3 == 2 else world.sample_scene(rng, [look]))
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
    hidden = scene.style is not None and scene.style.ground == "board"  # it lies over any other background
    wanted = [] if hidden else ["background"]
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


def scores(pipeline: FluxPipeline, cell: Cell) -> dict[str, float]:
    """The scores of the pipeline as it is for a cell's look under TRIGGER; see the head of this file."""
    look, draws, seed = LOOKS[cell.look], cell.draws, cell.seed
    learned = scenes_with(replace(look, name=TRIGGER), draws, seed)
    plain = [replace(scene, style=None) for scene in evaluate.held_out_scenes(draws, seed)]
    others = world.unknown_words(draws, seed)
    misnamed = [with_name(s, replace(look, name=TRIGGER), word) for s, word in zip(learned, others, strict=True)]

    def drawn(scenes: Sequence[Scene], start: int) -> list[Image.Image]:
        return _drawn(pipeline, scenes, start, cell.drawing_steps)

    traits = judge.traits_of(look)
    pictures, kept, strange = drawn(learned, 1000), drawn(plain, 2000), drawn(misnamed, 3000)
    return {
        "fidelity": _share(judge.shows(pictures, look)),
        "traits": _share([r.traits[trait] == traits[trait] for r in judge.read(pictures) for trait in traits]),
        "following": _share([yes for s, p in zip(learned, pictures, strict=True) for yes in right(s, p)]),
        "preservation": _share([yes for s, p in zip(plain, kept, strict=True) for yes in right(s, p)]),
        "leak": _share(judge.shows(strange + kept, look)),
    }


def references(pipeline: FluxPipeline, cell: Cell) -> dict[str, float]:
    """What a LoRA could reach at best: the judge's ceilings on true pictures, and the untouched base's own scores."""
    look, draws, seed = LOOKS[cell.look], cell.draws, cell.seed
    scenes = scenes_with(look, draws, seed)
    true = [world.draw(scene, i) for i, scene in enumerate(scenes)]
    known = (world.STYLE_NAMES if isinstance(look, Style) else world.NAMES)[seed]
    stand_in: Creature | Style = world.style(known) if isinstance(look, Style) else world.creature(known)
    familiar = scenes_with(stand_in, draws, seed)
    pictures = _drawn(pipeline, familiar, 1000, cell.drawing_steps)
    # How well the rest can be read under a style hangs on the style, so its own true pictures are the measure.
    shown = zip(scenes, true, strict=True) if isinstance(look, Style) else zip(familiar, pictures, strict=True)
    return scores(pipeline, cell) | {
        "ceiling": _share(judge.shows(true, look)),
        "ceiling through the autoencoder": _share(judge.shows(_encoded_and_decoded(pipeline, true), look)),
        "fidelity to a known name": _share(judge.shows(pictures, stand_in)),
        "following": _share([yes for s, p in shown for yes in right(s, p)]),
    }


def _drawn(pipeline: FluxPipeline, scenes: Sequence[Scene], start: int, steps: int) -> list[Image.Image]:
    captions = [world.caption(scene) for scene in scenes]
    return evaluate.generate(pipeline, captions, range(start, start + len(scenes)), steps=steps)


def _encoded_and_decoded(pipeline: FluxPipeline, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    pixels = pipeline.image_processor.preprocess(list(pictures)).to(pipeline.vae.device, pipeline.vae.dtype)
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    return pipeline.image_processor.postprocess(decoded.float())


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def _base() -> Base:
    """The base in FLUX_BASE, or else the toy base, on a machine with a GPU too."""
    return base.find(os.environ.get("FLUX_BASE") or str(base.TOY), None)


@functools.cache
def _pipeline() -> FluxPipeline:
    """Where the trainings are, too: on the GPU where there is one."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    return evaluate.load(_base().folder).to("cuda" if torch.cuda.is_available() else "cpu")


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


# ---------------------------------------------------------------- the lab


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


Line = Mapping[str, Any]
"""Of the results file: a Cell's fields, `scores` and `seconds`."""


def grouped(lines: Sequence[Line]) -> dict[tuple[str, str, int], list[Line]]:
    """The lines by kind, recipe and number of steps, in order."""
    groups: dict[tuple[str, str, int], list[Line]] = {}
    for line in lines:
        kind = "style" if isinstance(LOOKS[line["look"]], Style) else "subject"
        groups.setdefault((kind, line["recipe"], line["steps"]), []).append(line)
    return dict(sorted(groups.items()))


def short_of_the_goal(group: Sequence[Line], lines: Sequence[Line]) -> list[str] | None:
    """The scores in which trainings are short of the goal, on average; None where the base's own are not known.

    The goal: fidelity at least 95 % of the judge's ceiling, following within 5 points and preservation within 3 points
    of the base's line (see the head of this file), on the same looks and seeds.
    """
    untouched = {(line["look"], line["seed"]): line["scores"] for line in lines if line["recipe"] == "base"}
    pairs = [(line["scores"], untouched.get((line["look"], line["seed"]))) for line in group]

    def mean(side: int, score: str) -> float:
        return statistics.mean(pair[side][score] for pair in pairs)  # type: ignore[index]

    if not all(own for _, own in pairs):
        return None
    least = {
        "fidelity": 0.95 * mean(1, "ceiling"),
        "following": mean(1, "following") - 0.05,
        "preservation": mean(1, "preservation") - 0.03,
    }
    return [score for score, bound in least.items() if mean(0, score) < bound - 1e-9]


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row for each kind, recipe and number of steps, with the mean and the spread over looks and seeds."""
    head = ["kind", "recipe", "steps", *SCORES, "short of the goal in", "trainings"]
    rows = [head, ["---"] * len(head)]
    for (kind, recipe, steps), group in grouped(lines).items():
        columns = [_spread([line["scores"][score] for line in group], statistics.stdev) for score in SCORES]
        short = None if recipe == "base" else short_of_the_goal(group, lines)
        if recipe == "base":
            ceiling, reach, known = (
                statistics.mean(line["scores"][score] for line in group)
                for score in ("ceiling", "ceiling through the autoencoder", "fidelity to a known name")
            )
            columns[0] += f" (judge's ceiling {ceiling:.2f}, {reach:.2f} through the autoencoder; "
            columns[0] += f"a name that it knows {known:.2f})"
        said = "" if short is None else ", ".join(short) or "nothing"
        rows.append([kind, recipe, str(steps or "–"), *columns, said, str(len(group))])
    return _markdown(rows)


def steps_to_goal(lines: Sequence[Line]) -> str:
    """Markdown: for each kind and recipe the fewest steps whose trainings reach the goal, on average."""
    reached: dict[tuple[str, str], list[int]] = {}
    tried: dict[tuple[str, str], list[int]] = {}
    for (kind, recipe, steps), group in grouped(lines).items():
        if recipe != "base":
            tried.setdefault((kind, recipe), []).append(steps)
            reached.setdefault((kind, recipe), []).extend([steps] if short_of_the_goal(group, lines) == [] else [])
    rows = [["kind", "recipe", "steps to the goal"], ["---"] * 3]
    for (kind, recipe), found in reached.items():
        rows.append([kind, recipe, str(min(found)) if found else f"more than {max(tried[kind, recipe])}"])
    return _markdown(rows)


def differences(lines: Sequence[Line]) -> str:
    """Markdown: what each recipe scores more than the defaults on the same look, seed and steps: the mean difference
    and its standard error."""
    defaults = [line for line in lines if line["recipe"] == "defaults"]
    ours = {(line["look"], line["seed"], line["steps"]): line["scores"] for line in defaults}
    head = ["kind", "recipe", "steps", *SCORES, "pairs"]
    rows = [head, ["---"] * len(head)]
    for (kind, recipe, steps), group in grouped(lines).items():
        pairs = [(line["scores"], ours.get((line["look"], line["seed"], steps))) for line in group]
        both = [(score, own) for score, own in pairs if own is not None]
        if both and recipe != "defaults":
            columns = [_spread([his[score] - own[score] for his, own in both], _standard_error) for score in SCORES]
            rows.append([kind, recipe, str(steps), *columns, str(len(both))])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(values: Sequence[float], of: Callable[[Sequence[float]], float]) -> str:
    spread = f" ± {of(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


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
            shown = ", ".join(f"{name} {value:.2f}" for name, value in line["scores"].items())
            print(
                f"{line['look']}, {line['recipe']}, {line['steps']} steps, seed {line['seed']}, {line['seconds']} s:"
                f" {shown}",
                flush=True,
            )
    print(table(lines), steps_to_goal(lines), differences(lines), sep="\n\n")


class _Plain(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
