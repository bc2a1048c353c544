"""What the measured times say: a table, ratios turn against turn, and the goals."""

import itertools
import statistics
from collections.abc import Sequence

from bench.speed.case import CASES
from bench.speed.measure import Cell
from lora.training import recipe


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row for each case and way."""
    rows = [
        "| pictures | way | seconds a step (10 % to 90 %) | of the processors | TFLOP/s | of the matrix rate | peak GB"
        " | first lap, s |",
        "|" + " --- |" * 8,
    ]
    for cell in cells:
        if cell.fault:
            rows.append(f"| {cell.case} | {cell.way} | {cell.fault} | | | | | |")
            continue
        seconds, rate = cell.seconds, cell.tflop / cell.median
        processor = statistics.median(itertools.chain(*cell.processor))
        low, high = seconds[len(seconds) // 10], seconds[-1 - len(seconds) // 10]
        rows.append(
            f"| {cell.case} | {cell.way} | {cell.median:.4f} ({low:.4f} to {high:.4f}) | {processor:.4f} | {rate:.4g}"
            f" | {rate / cell.matrix_rate:.0%} | {'' if cell.peak is None else f'{cell.peak:.1f}'} | {cell.first:.1f} |"
        )
    return "\n".join(rows)


RATIOS = (
    # a way, what it is held against, what is said of the two, and the goal for it in each case: at most so much
    ("ours", "no-prior", "what holding on to the base costs", None),
    ("no-prior", "bare", "what the loop costs", 1.1),
    ("ours", "bare-prior", "what the loop costs, with both passes", 1.1),
    ("no-prior", "eager", "what recordings gain", None),
    ("float8", "no-prior", "what the way for 24 GB costs", None),
    ("no-prior", "peft", "against diffusers without checkpointing", 1 / 1.5),
    ("no-prior", "peft-checkpointing", "against diffusers with checkpointing", None),
    ("no-prior", "ostris", "against the ostris way", 1 / 2),
)
GOALS = {"1024": 0.30, "768": 0.16, "512": 0.085}
"""Seconds a step on an H200, without the prior pass."""
GOAL_THOUSAND = 180.0
"""Seconds for 1000 steps over 512, 768 and 1024, as trained by default."""
GOAL_PEAK = 75.0
"""GB at 1024, so that an 80 GB GPU runs the same plan."""


def verdicts(cells: Sequence[Cell]) -> list[str]:
    """What the cells say of each other, turn against turn, and of the goals; a line each. On a CPU, which others use
    too, by processor time."""
    lines = []
    on_a_gpu = any(cell.peak is not None for cell in cells)
    by_case: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        if not cell.fault:
            by_case.setdefault(cell.case, {})[cell.way] = cell
    for case, found in by_case.items():
        for one, other, what, goal in RATIOS:
            if one in found and other in found:
                ratios = turn_against_turn(found[one].rounds, found[other].rounds)
                if not on_a_gpu:
                    ratios = turn_against_turn(found[one].processor, found[other].processor)
                ratio = statistics.median(ratios)
                reached = "" if goal is None or (other == "peft" and not on_a_gpu) else _reached(ratio, goal, "")
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                lines.append(f"{case}: {one} / {other} = {ratio:.3f} ({spread}), {what}{reached}")
        if on_a_gpu and "no-prior" in found and case in GOALS:
            lines.append(
                f"{case}: {found['no-prior'].median:.3f} s{_reached(found['no-prior'].median, GOALS[case], ' s')}"
            )
        if on_a_gpu and {"ours", "no-prior"} <= found.keys() and case == CASES[0].name:
            held = 1 / recipe.FLUX_DEV["subject"].prior_every
            thousand = 1000 * (held * found["ours"].median + (1 - held) * found["no-prior"].median)
            lines.append(f"{case}: {thousand:.0f} s for 1000 steps{_reached(thousand, GOAL_THOUSAND, ' s')}")
        if on_a_gpu and "ours" in found and case == "1024":
            peak = found["ours"].peak or 0.0
            lines.append(f"{case}: {peak:.1f} GB at the most{_reached(peak, GOAL_PEAK, ' GB')}")
    return lines


def turn_against_turn(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(of_a) / statistics.median(of_b) for of_a, of_b in zip(a, b, strict=True)]


def _reached(value: float, goal: float, unit: str) -> str:
    return f"; goal {goal:.3g}{unit}: {'reached' if value <= goal else 'MISSED'}"
