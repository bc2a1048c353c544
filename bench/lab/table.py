"""The lab's results added up, as Markdown tables."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.lab.cell import LOOKS
from bench.lab.scores import SCORES
from bench.lab.words import CLASSES
from toyflux.world import Style

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


def leaks(lines: Sequence[Line]) -> str:
    """Markdown: for each class of other words, how often the whole look shows, and how many of its traits."""
    head = ["kind", "recipe", "steps", *(f"{kind}: whole, traits" for kind in CLASSES), "trainings"]
    rows = [head, ["---"] * len(head)]
    for (kind, recipe, steps), group in grouped(lines).items():
        known = [line["scores"] for line in group if "leak, near" in line["scores"]]  # earlier results lack them
        if known:
            columns = [_whole_and_traits(known, word) for word in CLASSES]
            rows.append([kind, recipe, str(steps or "–"), *columns, str(len(known))])
    return _markdown(rows)


def _whole_and_traits(scores: Sequence[Mapping[str, float]], word: str) -> str:
    found = [(score[f"leak, {word}"], score[f"traits, {word}"]) for score in scores if f"leak, {word}" in score]
    return ", ".join(f"{statistics.mean(values):.2f}" for values in zip(*found, strict=True)) or "–"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(values: Sequence[float], of: Callable[[Sequence[float]], float]) -> str:
    spread = f" ± {of(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5
