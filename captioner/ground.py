"""Where the subject is in a picture: the question to the captioning model, and what its answer says.

Qwen3-VL grounds objects in JSON, as `bbox_2d` with left, top, right and bottom from 0 to 1000 of the picture's width
and height, whatever its size (github.com/QwenLM/Qwen3-VL, cookbooks/2d_grounding.ipynb). Pure text: no model.
"""

from __future__ import annotations

import json
import re

TOKENS = 80
"""How long an answer may be: one box in a code block has some 50."""
SCALE = 1000

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of the picture's width and height: 0 <= left < right <= 1."""


def question(noun: str | None) -> str:
    """What is asked about every picture; `noun` is what the subject is (dog), where that is known."""
    what = f"the {noun} that is the main subject of this picture" if noun else "the main subject of this picture"
    return (
        f"Locate {what}, all of it. Report its bbox coordinates in JSON format like this:"
        f' {{"bbox_2d": [x1, y1, x2, y2], "label": "{noun or "subject"}"}}. Answer with one box and nothing'
        " else; if it is not there, answer []."
    )


def read(answer: str) -> Box | None:
    """The one box that the answer gives; None where it gives none, several, or something else."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", answer, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, list) and len(found) == 1:
        [found] = found
    corners = found.get("bbox_2d") if isinstance(found, dict) else None
    if not isinstance(corners, list) or len(corners) != 4 or any(type(one) not in (int, float) for one in corners):
        return None
    left, top, right, bottom = corners
    if not (0 <= left < right <= SCALE and 0 <= top < bottom <= SCALE):
        return None
    return left / SCALE, top / SCALE, right / SCALE, bottom / SCALE
