"""Is the verdict right? Trainings of many kinds on the toy base: what it measured, beside what the judge sees drawn.

`script/bench verdict` trains every kind of `bench.lab.kinds` by the project's own job, takes the verdict's numbers out
of `request.json`, draws with the LoRA and has the judge count. Each training is a line of the results file, and a run
goes on where it was stopped. It prints rank correlations (Spearman's) over all and over each half, and with
`--plot FILE.svg` draws each number against what it should tell:

- learned: the gain with the trigger word, on held-out and training pictures, beside fidelity;
- its own word: the mean gain with a far and a near word, beside the share of such drawings that show what was learned;
- kept: the drift, beside the preservation of the base's own things.
"""

import argparse
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.lab import kinds, scores, training, words
from bench.lab.cell import LOOKS, TRIGGER, Cell, fingerprint, the_base
from bench.lab.kinds import Kind
from bench.lab.recipes import RECIPES
from lora import job
from lora.file import source
from lora.flux import generate
from lora.flux.generate import Lora
from lora.request import LORA_TYPES
from lora.result import verdict
from toyflux import evaluate, examples, judge, world

Line = Mapping[str, Any]
"""Of the results file: `kind`, `measured` (lora.result.verdict.Measured) and `scores`."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A number of the verdict, and the judge's that it should follow."""

    name: str
    measured: Callable[[Line], float]
    seen: Callable[[Line], float]
    says: str
    """What the axes are: across; up."""
    bounds: tuple[float, float]
    """Of the measured number: weak from, clear from."""


def _learned(line: Line) -> float:
    return (2 * line["measured"]["unseen"]["own"] + line["measured"]["trained"]["own"]) / 3


def _other_words(line: Line) -> float:
    gains = line["measured"]["unseen"]
    return (gains["far"] + gains["near"]) / 2


QUESTIONS = (
    Question(
        name="learned",
        measured=_learned,
        seen=lambda line: line["scores"]["fidelity"],
        says="gain with the trigger word; fidelity",
        bounds=verdict.LEARNED_UNSEEN,
    ),
    Question(
        name="own word",
        measured=_other_words,
        seen=lambda line: (line["scores"]["far"] + line["scores"]["near"]) / 2,
        says="gain with other words; shown under them",
        bounds=verdict.OTHERS_UNSEEN,
    ),
    Question(
        name="kept",
        measured=lambda line: line["measured"]["drift"],
        seen=lambda line: line["scores"]["preservation"],
        says="drift; the base's things drawn right",
        bounds=verdict.DRIFT,
    ),
)


def train(kind: Kind, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The LoRA of a kind, and what its verdict measured."""
    archive, flux = folder / "pictures.zip", the_base()
    examples.write_zip(archive, kinds.pictures_of(kind, TRIGGER))
    cell = Cell(
        look=kind.look,
        recipe=kind.recipe,
        steps=kind.steps,
        seed=kind.seed,
        pictures=kind.pictures,
        draws=0,
        drawing_steps=0,
        base="",
    )
    request = training.request_for(cell, archive, flux.width)
    assert request.learning_rate is not None
    tar = job.run(
        replace(request, learning_rate=request.learning_rate * kind.rate),
        output=folder,
        flux_base=str(flux.folder),
        captioner=None,
        log=lambda line: None,
        metric=lambda name, value: None,
        changes={**RECIPES[kind.recipe].settings, **kind.settings},
    )
    with tarfile.open(tar) as opened:
        written = opened.extractfile("request.json")
        assert written is not None
        measured = json.load(written)["verdict"]["measured"]
    return source.fetch(str(tar), folder, "the tar"), measured


def drawn_scores(file: Path, kind: Kind, draws: int, steps: int) -> dict[str, float]:
    """What the judge counts in drawings with the LoRA."""
    pipeline, look = evaluate.load(the_base().folder), LOOKS[kind.look]
    generate.put_on(pipeline, [Lora(name=kind.name, file=file, scale=1.0)], lambda line: None)
    named = replace(look, name=TRIGGER)
    learned = scores.scenes_with(named, draws, kind.seed)

    def draw(scenes: Sequence[world.Scene], start: int) -> list[Any]:
        captions = [world.caption(scene) for scene in scenes]
        return evaluate.generate(pipeline, captions, range(start, start + len(scenes)), steps=steps)

    def shown(names: Sequence[str], start: int) -> float:
        scenes = [scores.with_name(scene, named, name) for scene, name in zip(learned, names, strict=True)]
        return statistics.mean(judge.shows(draw(scenes, start), look))

    plain = [replace(scene, style=None) for scene in evaluate.held_out_scenes(2 * draws, kind.seed)]
    kept = [yes for s, p in zip(plain, draw(plain, 2000), strict=True) for yes in scores.right(s, p)]
    return {
        "fidelity": shown([TRIGGER] * draws, 1000),
        "far": shown(world.unknown_words(draws, kind.seed), 3000),
        "near": shown(words.of_class("near", TRIGGER, look, draws, kind.seed), 4000),
        "preservation": statistics.mean(kept),
    }


# ---------------------------------------------------------------- what it says


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal ones share the mean of theirs."""
    order = sorted(values)
    first = {value: order.index(value) + 1 for value in set(values)}
    return [first[value] + (order.count(value) - 1) / 2 for value in values]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, -1 to 1."""
    return statistics.correlation(ranks(one), ranks(other))


def told(lines: Sequence[Line]) -> str:
    """Markdown: for each type the rank correlation of each question, over all lines and over each half of them."""
    rows = ["| | verdict | told by | trainings | rank correlation | first half, second half |", "| --- " * 6 + "|"]
    for lora_type in LORA_TYPES:
        asked = [line for line in lines if line["measured"]["unseen"] and line["lora_type"] == lora_type]
        for question in QUESTIONS if len(asked) > 5 else ():
            both = [(question.measured(line), question.seen(line)) for line in asked]
            whole, one, other = (rank_correlation(*zip(*some, strict=True)) for some in (both, both[::2], both[1::2]))
            columns = (
                lora_type,
                question.name,
                question.says,
                str(len(both)),
                f"{whole:.2f}",
                f"{one:.2f}, {other:.2f}",
            )
            rows.append(f"| {' | '.join(columns)} |")
    return "\n".join(rows)


OFTEN = 0.47
"""Of the drawings under other words."""


def warned(lines: Sequence[Line]) -> str:
    """What the warnings that need no bounds (`verdict.of` on a base that is not the toy) say of these trainings."""
    others: dict[bool, list[float]] = {True: [], False: []}
    kept = []
    for line in lines:
        gains = {name: verdict.Gains(**found) for name in ("trained", "unseen") if (found := line["measured"][name])}
        measured = verdict.Measured(**{**line["measured"], **gains})
        words = {one.name: one.word for one in verdict.of(measured, TRIGGER, line["lora_type"], 0, False).findings}
        if words["learned"] == "none":
            kept.append(line["scores"]["preservation"])
        else:
            shown = (line["scores"]["far"] + line["scores"]["near"]) / 2
            others[words["own_word"] == "none"].append(shown)
    often = {told: sum(shown >= OFTEN for shown in found) for told, found in others.items()}
    return (
        f"warned of other words: {len(others[True])} trainings, {often[True]} show it under them in {OFTEN} or more;"
        f" not warned: {len(others[False])}, {often[False]} do\n"
        f"warned of no gain: {len(kept)} trainings, which keep {max(kept, default=0):.3f} of the base's things at most"
    )


SIDE, MARGIN = 260, 46
"""Pixels of a plot and of the space around it."""


def plot(lines: Sequence[Line]) -> str:
    """An SVG with a plot for each question: a dot a training, subjects round and styles square, the bounds dashed."""
    width = len(QUESTIONS) * (SIDE + 2 * MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {SIDE + 2 * MARGIN}" font-size="12"'
        ' font-family="system-ui, sans-serif" fill="#808080" role="img" aria-label="The verdict beside the judge">'
    ]
    asked = [line for line in lines if line["measured"]["unseen"]]
    for number, question in enumerate(QUESTIONS):
        left = number * (SIDE + 2 * MARGIN) + MARGIN
        values = [min(max(question.measured(line), 0.0), 1.0) for line in asked]
        parts.append(
            f'<rect x="{left}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#808080"/>'
            f'<text x="{left}" y="{MARGIN - 22}" font-weight="600" font-size="14">{question.name}</text>'
            f'<text x="{left}" y="{MARGIN - 7}">{question.says}</text>'
        )
        for bound in question.bounds:
            parts.append(
                f'<path d="M{left + SIDE * bound:.1f} {MARGIN}v{SIDE}" stroke="#f0700c" stroke-dasharray="4 4"/>'
            )
        for line, value in zip(asked, values, strict=True):
            x, y = left + SIDE * value, MARGIN + SIDE * (1 - question.seen(line))
            style = line["lora_type"] == "style"
            mark = f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"' if style else ""
            mark = mark or f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
            parts.append(f'{mark} fill="{"#f0700c" if style else "#3b82f6"}" fill-opacity="0.6"/>')
        for tick in (0, 0.5, 1):
            parts.append(
                f'<text x="{left + SIDE * tick:.0f}" y="{MARGIN + SIDE + 16}" text-anchor="middle">{tick}</text>'
            )
            parts.append(
                f'<text x="{left - 6}" y="{MARGIN + SIDE * (1 - tick) + 4:.0f}" text-anchor="end">{tick}</text>'
            )
    return "".join(parts) + "</svg>\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench verdict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainings", type=int, default=1000, help="at most, those in the results file included")
    parser.add_argument("--draws", type=int, default=24, help="for each score")
    parser.add_argument("--drawing-steps", type=int, default=16)
    parser.add_argument("--results", type=Path, default=Path("verdict.jsonl"))
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = []
    if arguments.results.is_file():
        lines = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    base, before = fingerprint(), [line["kind"] for line in lines]
    for kind in kinds.kinds()[: arguments.trainings]:
        if asdict(kind) in before:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="verdict-") as folder:
            try:
                file, measured = train(kind, Path(folder))
            except ValueError as error:  # a training that broke down before half has no verdict
                print(f"{kind.name}, {kind.look}: {error}", flush=True)
                continue
            counted = drawn_scores(file, kind, arguments.draws, arguments.drawing_steps)
        line = {
            "kind": asdict(kind),
            "lora_type": kind.lora_type,
            "base": base,
            "measured": measured,
            "scores": counted,
            "seconds": round(time.monotonic() - started, 1),
        }
        lines.append(line)
        with arguments.results.open("a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")
        print(f"{kind.name}, {kind.look}, {kind.steps} steps: {counted}", flush=True)
    print(told(lines))
    print(warned(lines))
    if arguments.plot:
        arguments.plot.write_text(plot(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
