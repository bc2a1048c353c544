"""What a run shows of itself: the prompts it draws, before and after side by side, the loss as a curve, and a page.

Everything here is made from plain values handed in, so that equal runs give equal bytes: no clock, no randomness. The
page holds the user's photographs as thumbnails and is for the user's own tar; whoever publishes leaves it out.
"""

import base64
import dataclasses
import html
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

TOY_SIDE = 256
"""Pixels. A base that draws best below this is the toy, which knows things and backgrounds, not photographs."""
_SOURCES = {
    "yours": "yours",
    "model": "written by the captioner",
    "retried": "captioner, second try",
    "template": "from a template",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """A training picture with what the model was told of it."""

    name: str
    caption: str
    source: str
    """A `captioner.text.Source`."""
    note: str
    thumbnail: bytes
    """WebP; see `thumbnail`."""
    held_out: bool = False
    """Kept out of the training, to see when it turns."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Preview:
    """One prompt and seed, drawn without the LoRA and with it: after so many steps, the last of them at the end."""

    prompt: str
    without: Image.Image
    drawn: tuple[tuple[int, Image.Image], ...]

    @property
    def after(self) -> Image.Image:
        return self.drawn[-1][1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """How the loss went."""

    losses: Sequence[float]
    """Of every step, from the first: noisy, because every step sees other pictures, noise and timesteps."""
    checks: Sequence[tuple[int, float]]
    """(step, loss on fixed noise), the first at step 0."""
    held_out: bool
    """Whether the checks look at a picture that is not trained on, rather than at training pictures."""
    best: int | None = None
    """The step whose weights were kept, where they are not the last step's."""


# ---------------------------------------------------------------- prompts


def preview_prompts(
    trigger_word: str, lora_type: str, class_noun: str | None, native: int, own: Sequence[str] = ()
) -> list[str]:
    """Prompts that call up what was learned, in settings of their own, and at least one that must stay as it was.

    `native` is the side in pixels that the base draws best; `own` are the user's prompts, which come first and replace
    all but the one without the trigger word.
    """
    name = f"{trigger_word} {class_noun}" if class_noun else trigger_word
    if native < TOY_SIDE:
        things = [
            "a red house on a white background",
            "a blue cat on a pink background",
            "a tree on a yellow background",
        ]
        plain = things[0]
        subject = [
            f"a {name} on a white background",
            f"a {name} on a red background",
            f"a yellow star on the left and a {name} on the right on a green background",
        ]
    else:
        things = ["a lighthouse on a cliff", "a cat asleep on a chair", "a woman reading in a garden"]
        noun = class_noun or "person"
        article = "an" if noun[0].lower() in "aeiou" else "a"
        plain = things[0] if lora_type == "style" else f"a photo of {article} {noun} on a beach at sunset"
        subject = [
            f"a photo of {name} on a beach at sunset",
            f"a close-up of {name} by a window, soft light",
            f"a watercolour painting of {name}",
        ]
    wanted = [f"{thing}, in the style of {trigger_word}" for thing in things] if lora_type == "style" else subject
    chosen = list(own) or wanted
    if all(trigger_word.casefold() in prompt.casefold() for prompt in chosen):
        chosen.append(plain)
    return list(dict.fromkeys(chosen))


# ---------------------------------------------------------------- pictures


def thumbnail(picture: Image.Image, side: int = 256) -> bytes:
    """The picture as WebP, no side longer than `side` pixels; a smaller one keeps its size."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _webp(small)


def _webp(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=85)
    return data.getvalue()


def preview_sheet(previews: Sequence[Preview]) -> Image.Image:
    """Without and with, as one picture: a row for each prompt, under its words.

    The pictures are brought to about 400 to 512 pixels, small ones by a whole factor, so that a person sees them.
    """
    width, height = _shown_size(*previews[0].without.size)
    margin, line = 12, 28
    sheet = Image.new("RGB", (2 * width + 3 * margin, line + len(previews) * (line + height + margin)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    pen.text((margin, 7), "without the LoRA", "gray", font=font)
    pen.text((width + 2 * margin, 7), "with the LoRA", "gray", font=font)
    for row, preview in enumerate(previews):
        top = line + row * (line + height + margin)
        words = preview.prompt if _has_all(font, preview.prompt) else f"prompt {row + 1} (its words are on the page)"
        pen.text((margin, top + 5), _fitting(words, pen, font, sheet.width - 2 * margin), "black", font=font)
        for column, picture in enumerate((preview.without, preview.after)):
            shown = picture.resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(shown, (margin + column * (width + margin), top + line))
    return sheet


def _shown_size(width: int, height: int) -> tuple[int, int]:
    long = max(width, height)
    scale = 512 // long if long <= 512 else 512 / long
    return round(width * scale), round(height * scale)


def _has_all(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether the font has a sign for every character: one that it lacks is drawn as the noncharacter U+FFFF is."""
    lacking = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(sign)) != lacking for sign in text)


def _fitting(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """The text, cut where it is wider than `width` pixels."""
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text}…"


def pair_up(
    prompts: Sequence[str], without: Sequence[Image.Image], drawn: Mapping[int, Sequence[Image.Image]]
) -> list[Preview]:
    """A Preview for each prompt, of the pictures drawn without, and with after so many steps, the last of them last.

    One picture a prompt each time; none at all where drawing failed without or at last, so that nothing is compared.
    """
    if not (without and list(drawn.values())[-1]):
        return []
    return [
        Preview(prompt=prompt, without=without[i], drawn=tuple((step, pictures[i]) for step, pictures in drawn.items()))
        for i, prompt in enumerate(prompts)
    ]


# ---------------------------------------------------------------- the curve


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
    fixed = "a held-out picture, fixed noise" if curve.held_out else "training pictures, fixed noise"
    legend = [("loss, smoothed", blue), (f"loss on {fixed}", orange)] if curve.checks else [("loss, smoothed", blue)]
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


# ---------------------------------------------------------------- the page

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #68686e; --line: #dcdce0; --paper: #fff; --card: #f5f5f7;
  --warn: #fff3d6; --warn-ink: #6b4700; --mark: #2463d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececef; --soft: #a0a0a8; --line: #3a3a40; --paper: #131316;
  --card: #1e1e22; --warn: #3a2e10; --warn-ink: #ffdc94; --mark: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 2.2rem; line-height: 1.15; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
p { margin: .5rem 0; max-width: 44rem; }
.soft, figcaption, dt, .source { color: var(--soft); font-size: .875rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .75rem; margin: 1.25rem 0 0; }
.facts div { background: var(--card); border-radius: .6rem; padding: .6rem .8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.warnings { background: var(--warn); color: var(--warn-ink); border-radius: .6rem; padding: .75rem 1rem; }
.warnings ul { margin: 0; padding-left: 1.1rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: .5rem; background: var(--card); }
.previews { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem 1.5rem; }
.previews h3 { font-size: 1rem; font-weight: 500; margin: 0 0 .5rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
.course { display: flex; gap: .5rem; overflow-x: auto; margin-top: .5rem; padding-bottom: .25rem; }
.course figure { flex: 0 0 5.5rem; }
figcaption { margin-top: .25rem; }
mark { background: none; color: var(--mark); font-weight: 600; }
.chart svg { display: block; width: 100%; max-width: 34rem; height: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1.25rem 1rem; }
.pictures img { aspect-ratio: 1; object-fit: contain; }
.pictures p { margin: .4rem 0 .1rem; font-size: .9rem; line-height: 1.4; }
table { border-collapse: collapse; width: 100%; font-size: .925rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); width: 13rem; overflow-wrap: normal; }
pre, code { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; overflow-x: auto; }
summary { cursor: pointer; }
@media (max-width: 32rem) { h1 { font-size: 1.8rem; } .pictures { grid-template-columns: 1fr 1fr; }
  th { width: 9rem; } }
"""


def page(
    record: Mapping[str, Any],
    lessons: Sequence[Lesson],
    previews: Sequence[Preview],
    curve: Curve,
    warnings: Sequence[str],
) -> str:
    """`index.html`: one file with its pictures inside, no scripts, for phones and desktops, in light and dark.

    `record` is what `request.json` holds: `inputs`, `decided`, `versions`, `run_id`.
    """
    inputs, decided = record["inputs"], record["decided"]
    word, kind = inputs["trigger_word"], inputs["lora_type"]
    facts = {
        "pictures": str(sum(not lesson.held_out for lesson in lessons)),
        "steps": str(curve.best or len(curve.losses)),
        "rank": str(inputs["lora_rank"]),
        "learning rate": f"{decided['learning_rate']:.3g}",
        "seed": str(decided["seed"]),
    }
    parts = [
        f"<h1>{_text(word)}</h1>",
        f'<p class="soft">A {_text(kind)} LoRA for {_text(decided["base"])}. Write <mark>{_text(word)}</mark> in a'
        f" prompt to call up the {_text(kind)}.</p>",
        _facts(facts),
    ]
    if warnings:
        listed = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
        parts.append(f'<h2>Warnings</h2><div class="warnings"><ul>{listed}</ul></div>')
    if previews:
        parts.append("<h2>Before and after</h2>")
        parts.append('<p class="soft">The same prompt and seed, drawn by the base alone and with this LoRA.</p>')
        parts.append(f'<div class="previews">{"".join(_preview(preview, word) for preview in previews)}</div>')
    parts.append(f'<h2>Loss</h2><div class="chart">{loss_svg(curve)}</div><p class="soft">{_in_words(curve)}</p>')
    parts.append("<h2>Training pictures</h2>")
    parts.append(
        '<p class="soft">As the training saw them: cut to a size that it trains at, each with its caption.</p>'
    )
    parts.append(f'<div class="pictures">{"".join(_lesson(lesson, word) for lesson in lessons)}</div>')
    parts.append("<h2>Settings</h2>")
    parts.append(_table({**inputs, **decided}))
    parts.append(
        '<p class="soft">How long each stage took stands in the log: it differs from run to run, and equal requests'
        " give equal files.</p>"
    )
    parts.append("<h2>Made with</h2>")
    parts.append(_table(record["versions"]))
    whole = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False)
    parts.append(f"<details><summary>request.json</summary><pre>{_text(whole)}</pre></details>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(word)}: a FLUX LoRA</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def write(
    folder: Path,
    request_json: str,
    lessons: Sequence[Lesson],
    previews: Sequence[Preview],
    curve: Curve,
    warnings: Sequence[str],
) -> dict[str, Path]:
    """Writes the report into a new folder and returns the tar's member names with the files' paths.

    Where there are no previews (they could not be drawn) it has no `preview.webp`.
    """
    folder.mkdir()
    words = {
        "loss.svg": loss_svg(curve),
        "index.html": page(json.loads(request_json), lessons, previews, curve, warnings),
    }
    for name, text in words.items():
        (folder / name).write_text(text, encoding="utf-8")
    if previews:
        preview_sheet(previews).save(folder / "preview.webp", quality=90)
    return {f"report/{path.name}": path for path in sorted(folder.iterdir())}


def _text(value: object) -> str:
    return html.escape(str(value))


def _with_word(text: str, word: str) -> str:
    """The text as HTML, the trigger word in it marked, whatever its case."""
    parts = re.split(f"({re.escape(word)})", text, flags=re.IGNORECASE)
    return "".join(f"<mark>{_text(part)}</mark>" if i % 2 else _text(part) for i, part in enumerate(parts))


def _image(webp: bytes, alt: str) -> str:
    return f'<img src="data:image/webp;base64,{base64.b64encode(webp).decode()}" alt="{_text(alt)}">'


def _facts(facts: Mapping[str, str]) -> str:
    pairs = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{pairs}</dl>'


def _preview(preview: Preview, word: str) -> str:
    def figure(webp: bytes, says: str) -> str:
        return f"<figure>{_image(webp, f'{preview.prompt}, {says}')}<figcaption>{says}</figcaption></figure>"

    pair = figure(_webp(preview.without), "without") + figure(_webp(preview.after), "with")
    course = "".join(figure(thumbnail(picture), f"step {step}") for step, picture in preview.drawn[:-1])
    course = f'<div class="course">{course}</div>' if course else ""
    return f'<section><h3>{_with_word(preview.prompt, word)}</h3><div class="pair">{pair}</div>{course}</section>'


def _lesson(lesson: Lesson, word: str) -> str:
    note = f": {_text(lesson.note)}" if lesson.note else ""
    note += "; kept out of the training, to see when it turns" if lesson.held_out else ""
    return (
        f"<figure>{_image(lesson.thumbnail, lesson.name)}<p>{_with_word(lesson.caption, word)}</p>"
        f'<div class="source">{_text(lesson.name)}, caption {_SOURCES[lesson.source]}{note}</div></figure>'
    )


def _table(values: Mapping[str, Any]) -> str:
    """A row for each value that is not empty; names may break after an underscore."""
    rows = "".join(
        f"<tr><th>{_text(name).replace('_', '_<wbr>')}</th><td>{_text(_shown(value))}</td></tr>"
        for name, value in values.items()
        if value not in (None, "")
    )
    return f"<table>{rows}</table>"


def _shown(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case list() | tuple():
            return ", ".join(_shown(part) for part in value)
    return str(value)


def _in_words(curve: Curve) -> str:
    """The curve in sentences."""
    return " ".join(_sentences(curve))


def _sentences(curve: Curve) -> Iterator[str]:
    if curve.losses:
        yield f"The smoothed loss ended at {smoothed(curve.losses)[-1]:.4f}."
    if curve.checks:
        best, lowest = min(curve.checks, key=lambda check: check[1])
        where = "a picture kept out of the training" if curve.held_out else "training pictures"
        yield (
            f"On {where}, with the same noise and timesteps every time, it was {curve.checks[0][1]:.4f} before the"
            f" training, {curve.checks[-1][1]:.4f} at the end and lowest, {lowest:.4f}, at step {best}."
        )
    if curve.best is not None:
        yield f"The weights of step {curve.best}, where it was lowest, are the ones kept."
