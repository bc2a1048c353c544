"""The report in the tar: a page that stands by itself, the loss curve, and a sheet of the previews.

`page.html` is the page's template (Jinja2, which torch requires); what users wrote is escaped there. Everything is made
from plain values handed in, so that equal runs give equal bytes: no clock, no randomness. The page holds the user's
photographs as thumbnails and is for the user's own tar; whoever publishes leaves it out.
"""

import base64
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lora.result import curve as curves
from lora.result import preview as pictures
from lora.result.curve import Curve
from lora.result.preview import Preview
from lora.result.verdict import Verdict

SOURCES = {
    "yours": "yours",
    "model": "written by the captioner",
    "retried": "captioner, second try",
    "template": "from a template",
}
"""How the page names a `captioner.text.Source`."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """A training picture with what the model was told of it."""

    name: str
    caption: str
    source: str
    """A `captioner.text.Source`."""
    note: str
    thumbnail: bytes
    """WebP; see `lora.result.preview.thumbnail`."""
    held_out: bool = False
    """Kept out of the first part of the training."""
    close_up: bool = False
    """A part of the picture of this name, around its subject."""
    own: str | None = None
    """The user's own caption, where the captioning model was asked to write another one."""


def page(
    record: Mapping[str, Any],
    lessons: Sequence[Lesson],
    previews: Sequence[Preview],
    curve: Curve,
    verdict: Verdict,
    warnings: Sequence[str],
) -> str:
    """`index.html`: one file with its pictures inside, no scripts, for phones and desktops, in light and dark.

    `record` is what `request.json` holds: `inputs`, `decided`, `versions`, `run_id`.
    """
    inputs, decided = record["inputs"], record["decided"]
    facts = {
        "pictures": len(lessons),
        "steps": curve.best or len(curve.losses),
        "rank": inputs["lora_rank"],
        "learning rate": f"{decided['learning_rate']:.3g}",
        "seed": decided["seed"],
    }
    return _TEMPLATES.get_template("page.html").render(
        word=inputs["trigger_word"],
        kind=inputs["lora_type"],
        base=decided["base"],
        facts=facts,
        verdict=verdict,
        warnings=warnings,
        previews=previews,
        loss_svg=Markup(curves.loss_svg(curve)),
        loss_in_words=curves.in_words(curve),
        held=_held(record.get("held"), inputs["lora_rank"]),
        lessons=lessons,
        sources=SOURCES,
        reasons=[(name, _decided(name, decided), why) for name, why in decided["reasons"].items()],
        settings={**inputs, **{name: value for name, value in decided.items() if name != "reasons"}},
        versions=record["versions"],
        record=json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False),
    )


def _decided(name: str, decided: Mapping[str, Any]) -> Any:
    """What was decided of that name; None where the reason says it itself."""
    value = decided.get(name)
    return None if value == decided["reasons"][name] else value


LEAST_HELD = 5
"""Layers that the page names."""


def _held(held: Mapping[str, Any] | None, rank: int) -> dict[str, Any] | None:
    """What the page tells of `request.json`'s `held`: the share in all, and of the layers of which least is held."""
    if held is None:
        return None
    least = sorted(held["layers"].items(), key=lambda one: one[1])[:LEAST_HELD]
    return {"rank": rank, "share": held["share"], "layers": len(held["layers"]), "least": least}


def write(
    folder: Path,
    request_json: str,
    lessons: Sequence[Lesson],
    previews: Sequence[Preview],
    curve: Curve,
    verdict: Verdict,
    warnings: Sequence[str],
) -> dict[str, Path]:
    """Writes the report into a new folder and returns the tar's member names with the files' paths.

    Where there are no previews (they could not be drawn) it has no `preview.webp`.
    """
    folder.mkdir()
    texts = {
        "loss.svg": curves.loss_svg(curve),
        "index.html": page(json.loads(request_json), lessons, previews, curve, verdict, warnings),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if previews:
        pictures.sheet(previews).save(folder / "preview.webp", quality=90)
    return {f"report/{path.name}": path for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------- the template's filters


def _marked(text: str, word: str) -> Markup:
    """The text as HTML, the trigger word in it marked, whatever its case."""
    parts = re.split(f"({re.escape(word)})", text, flags=re.IGNORECASE)
    return Markup("").join(Markup("<mark>{}</mark>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _address(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _name(name: str) -> Markup:
    """A setting's name, which may break after an underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _shown(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case list() | tuple():
            return ", ".join(_shown(part) for part in value)
    return str(value)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {
    "marked": _marked,
    "address": _address,
    "name": _name,
    "shown": _shown,
    "thumbnail": pictures.thumbnail,
    "webp": pictures.webp,
}
