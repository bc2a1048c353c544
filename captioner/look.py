"""What the captioning model sees that will train badly: several people, hidden faces, one background for all.

`question` is asked once about each picture, in batches; `read` takes its answer apart, and what it does not say in the
form that was asked for is not known; `warnings` are sentences for the user, never a reason to refuse. Pure text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

TOKENS = 60
"""How long an answer may be: five short lines."""
FEWEST = 4
"""Pictures from which on they are compared with each other."""
MOSTLY = 0.75
"""The share of pictures with the same background or clothes from which on it is told."""
_SHOWN = 10
_PEOPLE = frozenset({"person", "man", "woman", "boy", "girl", "child", "baby", "lady", "guy", "toddler", "teenager"})
_FACES = ("none", "clear", "small", "hidden")
_NOTHING = frozenset({"", "none", "no", "unknown", "unclear", "n/a", "not visible"})

QUESTION = (
    "Answer with these five lines and nothing else.\n"
    "people: how many people are in the picture, as a number\n"
    "face: of the main person, one word: clear, small, hidden (by sunglasses, a hat, a hand, hair, a mask, or turned "
    "away), or none\n"
    "blurred: yes or no\n"
    "background: what is behind the main subject, in one to three words\n"
    "clothes: what the main person wears, in one to three words, or none"
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen in one picture; None where the answer does not say."""

    people: int | None = None
    face: str | None = None
    """ "none", "clear", "small" or "hidden"."""
    blurred: bool | None = None
    background: str | None = None
    clothes: str | None = None


def read(answer: str) -> Seen:
    """The answer's lines, in any order, case and decoration."""
    found = {
        name.lower(): value.strip(" \t*_.`\"'").lower()
        for name, value in re.findall(r"^\W*(\w+)\W*?:(.*)$", answer, re.MULTILINE)
    }
    people, face, blurred = found.get("people", ""), found.get("face", ""), found.get("blurred", "")
    return Seen(
        people=int(people) if re.fullmatch(r"[0-9]{1,3}", people) else None,
        face=next((kind for kind in _FACES if face.startswith(kind)), None),
        blurred={"yes": True, "no": False}.get(blurred),
        background=_words(found.get("background", "")),
        clothes=_words(found.get("clothes", "")),
    )


def _words(text: str) -> str | None:
    plain = re.sub(r"^(?:an?|the) ", "", " ".join(re.sub(r"[^\w' -]", " ", text).split()))
    return plain if plain not in _NOTHING and len(plain) <= 60 else None


def warnings(seen: Mapping[str, Seen], kind: str, noun: str | None = None) -> list[str]:
    """What will train badly and what to do about it, a line each. `kind` is a mode or a lora_type, `noun` what the
    subject is, where it is known.

    Of people only where the subject may be one. Of a style only blur: its pictures may show whom and what they like.
    """
    person = noun is None or noun.split()[-1] in _PEOPLE
    people = kind == "character" or (kind in ("subject", "general") and person)
    rules: list[tuple[bool, Callable[[Seen], bool], str]] = [
        (
            people,
            lambda one: (one.people or 0) > 1,
            "several people, so the word comes to mean any of them: crop to one, or say in the captions who is who",
        ),
        (people, lambda one: one.face == "hidden", "a hidden face (sunglasses, hat, hand): use pictures that show it"),
        (people, lambda one: one.face == "small", "a small face: crop closer, or add close-ups"),
        (True, lambda one: one.blurred is True, "blurred: leave out, or use sharper ones"),
    ]
    lines = []
    for applies, is_so, told in rules:
        names = [name for name, one in seen.items() if is_so(one)]
        if applies and names:
            lines.append(f"{told}: {_some(names)}")
    if kind != "style" and len(seen) >= FEWEST:
        for what in ("background", "clothes"):
            values = Counter(value for one in seen.values() if (value := getattr(one, what)))
            for value, count in values.most_common(1):
                if count >= MOSTLY * len(seen):
                    lines.append(
                        f"{count} of {len(seen)} pictures have the same {what} ({value}), which will be learned with"
                        " the word: add pictures with others, or name it in the captions"
                    )
    return lines


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
