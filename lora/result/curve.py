"""How the loss went: as numbers, as an SVG picture, in sentences."""

import dataclasses
import math
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """How the loss went."""

    losses: Sequence[float]
    """Of every step, from the first: noisy, because every step sees other pictures, noise and timesteps."""
    checks: Sequence[tuple[int, float]]
    """(step, loss of training pictures on fixed noise), the first at step 0."""
    best: int | None = None
    """The step whose weights were kept, where they are not the last step's."""


def smoothed(losses: Sequence[float]) -> list[float]:
    """A running mean that forgets at a rate of 20 steps or a fiftieth of them all, whichever is more, without the pull
    of its start (the correction of Adam, Kingma and Ba 2015, arXiv:1412.6980)."""
    keep = 1 - 1 / max(20, len(losses) / 50)
    mean, weight, means = 0.0, 0.0, []
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 300, 46, 22, 54, 44
"""Of the drawing and of its margins, in pixels."""


def loss_svg(curve: Curve) -> str:
    """The losses as an SVG picture: every step thin, smoothed thick, the loss on fixed noise as dots.

    The colours can be read on white and on black. The vertical axis ends where 1 % of the steps lie above it.
    """
    steps = max(len(curve.losses), 1)
    means = smoothed(curve.losses)
    calm = sorted(curve.losses)[: max(1, math.ceil(0.99 * len(curve.losses)))]
    values = [*calm, *means, *(loss for _, loss in curve.checks)] or [0.0]
    marks = _ticks(min(values), max(values))
    low, high = marks[0], marks[-1]

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / steps

    def y(loss: float) -> float:
        share = (min(max(loss, low), high) - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def line(points: Sequence[tuple[float, float]], colour: str, width: float, opacity: float) -> str:
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
        return (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
            f' stroke-opacity="{opacity}" stroke-linejoin="round"/>'
        )

    blue, orange, gray = "#3b82f6", "#f0700c", "#808080"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Loss by step"'
        ' font-family="system-ui, sans-serif" font-size="14">'
    ]
    for mark in marks:
        parts.append(
            f'<path d="M{_LEFT} {y(mark):.1f}H{_WIDTH - _RIGHT}" stroke="{gray}" stroke-opacity="0.3"/>'
            f'<text x="{_LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end" fill="{gray}">{mark:.4g}</text>'
        )
    for mark in _ticks(0, steps):
        if mark <= steps and mark == int(mark):
            parts.append(
                f'<text x="{x(mark):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle" fill="{gray}">'
                f"{mark:.0f}</text>"
            )
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end" fill="{gray}">step</text>')
    if curve.losses:
        parts.append(line(_thinned(curve.losses), blue, 1, 0.3))
        parts.append(line(list(enumerate(means, 1)), blue, 2.5, 1))
    for step, loss in curve.checks:
        parts.append(f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3.5" fill="{orange}"/>')
    if curve.best is not None:
        parts.append(
            f'<path d="M{x(curve.best):.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="{orange}" stroke-dasharray="4 4"/>'
        )
    legend = [("loss, smoothed", blue)]
    if curve.checks:
        legend.append(("loss on training pictures, fixed noise", orange))
    for row, (words, colour) in enumerate(legend):
        parts.append(
            f'<circle cx="{_LEFT + 5}" cy="{14 + 20 * row}" r="5" fill="{colour}"/>'
            f'<text x="{_LEFT + 16}" y="{19 + 20 * row}" fill="{gray}">{words}</text>'
        )
    return "".join(parts) + "</svg>\n"


def _thinned(losses: Sequence[float], most: int = 400) -> list[tuple[float, float]]:
    """(step, loss) of every step, or the lowest and the highest of every group where there are more than `most`."""
    group = math.ceil(len(losses) / most)
    points: list[tuple[float, float]] = []
    for start in range(0, len(losses), group):
        some = losses[start : start + group]
        points += [(start + 1, some[0])] if group == 1 else [(start + 1, min(some)), (start + len(some), max(some))]
    return points


def _ticks(low: float, high: float) -> list[float]:
    """Five or so round numbers, the first at most `low` and the last at least `high`."""
    span = max(high - low, abs(high) * 0.01, 1e-6)
    unit = 10 ** math.floor(math.log10(span / 4))
    unit *= next(factor for factor in (1, 2, 5, 10) if span / (factor * unit) <= 5)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [round(i * unit, 10) for i in range(first, max(last, first + 1) + 1)]


def in_words(curve: Curve) -> str:
    """The curve in sentences."""
    return " ".join(_sentences(curve))


def _sentences(curve: Curve) -> Iterator[str]:
    if curve.losses:
        yield f"The smoothed loss ended at {smoothed(curve.losses)[-1]:.4f}."
    if curve.checks:
        best, lowest = min(curve.checks, key=lambda check: check[1])
        last, end = curve.checks[-1]
        least = "its lowest" if best == last else f"and {lowest:.4f} at its lowest, at step {best}"
        yield (
            f"On training pictures, with the same noise and timesteps every time, it was {curve.checks[0][1]:.4f}"
            f" before the training, {end:.4f} at the end, {least}."
        )
    if curve.best is not None:
        yield f"The weights of step {curve.best} are the ones returned."
