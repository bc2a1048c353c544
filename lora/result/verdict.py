"""The verdict of a training: whether it worked, in numbers and words.

The bounds below were set on one half of a set of trainings of many kinds on the toy base and confirmed on the other
(docs/quality.md). They are the toy's alone: its pictures are so plain that a LoRA takes away most of the base's loss,
of which most is chance in a photograph. So on another base, as for a style, how well it learned is a number without a
word; words warn there of faults that need no such bounds: no gain at all, other words that have all of it, a base that
has moved far, pictures that are copies.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

WEAK_FROM, CLEAR_FROM = 1 / 3, 2 / 3
"""Of a finding's value: below the first its word is none."""
LEARNED_UNSEEN = (0.5, 0.65)
"""Gain with the trigger word, two thirds of it on held-out pictures, a third on training pictures: (weak from, clear
from); so the others."""
LEARNED_TRAINED = (0.65, 0.85)
"""Gain on training pictures alone, where none was held out."""
OTHERS_UNSEEN = (0.68, 0.52)
"""Mean gain with a far and a near word on held-out pictures; less is better."""
OTHERS_TRAINED = (0.75, 0.6)
DRIFT = (0.6, 0.25)
"""Less is better. Where it was less than the second, 41 of 48 trainings kept .95 or more of what the base draws right,
and the drift did not say which: then nothing is told."""
NEW = (0.4, 0.65)
"""Gain on held-out pictures over that on training pictures."""
NEARER = 0.1
"""How much more near words gain than far ones where only they are named."""
SAME = 0.9
"""Share of the gain from which on other words are said to call the same, on any base: of fifteen such trainings on the
toy base thirteen showed it under other words in .47 of the drawings or more, of the 47 others with a gain five did
(docs/quality.md)."""
TOO_HIGH = "The learning rate was too high and damaged the base: lower learning_rate."
"""Where there is no gain on the training pictures: three trainings on the toy base, all at far too high a rate, which
kept .125 of the base's things at most."""
FIRMER = "Train more steps, or set preservation to firm."
OFF = "The input preservation was off: leave it empty, or set it to firm."
TITLES = {
    "learned": "Learned",
    "own_word": "Its own word",
    "kept": "The base is kept",
    "not_memorised": "Not memorised",
    "likeness": "Likeness",
}
FAULTS = {
    "own_word": "other words call it too",
    "kept": "it changes other prompts",
    "not_memorised": "it memorised its pictures",
}
"""What the title says where a finding's word is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gains:
    """The share of the base's flow loss that the LoRA takes away on some of the user's pictures: 0 where it explains
    them no better than the base, 1 at most, below 0 where it is worse."""

    own: float
    """Under the captions with the trigger word."""
    far: float
    """Under the same captions with a made-up word in its place."""
    near: float
    """With a word near the trigger word."""
    noun: float
    """With the class noun."""
    other: float | None = None
    """With the trigger word of another subject, where the LoRA has several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What `lora.training.examine` measured."""

    trained: Gains
    """On training pictures, at the end."""
    unseen: Gains | None
    """On held-out pictures, the last time that they were held out; None where none was."""
    own_then: float | None
    """`trained.own` at that time."""
    drift: float
    """On prompts that no step was trained on: squared change of the velocity over its squared length."""
    likeness: float | None = None
    """By eye (`lora.flux.eye`): how like the user's pictures the previews with the trigger word look, 0 as what the
    base draws, 1 as these look among each other; None where there was no eye."""
    enough: int | None = None
    """The training_steps after which it had learned enough (`lora.training.enough`); None where it had not."""
    repeated: float = 0.0
    """Of `lora.pictures.survey.copies`: share of the pictures of which another one is nearly a copy, 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One of the things that the verdict tells."""

    name: str
    """Of the metric: `verdict_<name>`."""
    value: float
    """0 to 1, higher is better; the words change at WEAK_FROM and CLEAR_FROM."""
    says: str
    """What was found, in a sentence."""
    advice: str
    """What to do; empty where nothing needs to be done."""
    worded: bool = True
    """Whether the number tells enough of the drawings for a word: for a style it does not (docs/quality.md), on other
    bases than the toy and for a likeness no bounds were measured."""

    @property
    def word(self) -> str:
        """clear, weak or none; empty where the number is told without a word."""
        if not self.worded:
            return ""
        return "clear" if self.value >= CLEAR_FROM else "weak" if self.value >= WEAK_FROM else "none"

    @property
    def title(self) -> str:
        return TITLES[self.name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was learned, under which words, and what it cost the base."""

    findings: Sequence[Finding]
    measured: Measured

    @property
    def title(self) -> str:
        """In a few words: the weakest finding counts."""
        words = {finding.word for finding in self.findings}
        known = [finding.word for finding in self.findings if finding.name == "learned"]
        if known not in ([""], ["clear"]):
            return "Verdict: not learned well yet"
        if faults := [FAULTS[finding.name] for finding in self.findings if finding.word == "none"]:
            return f"Verdict: it learned, but {' and '.join(faults)}"
        if known == [""]:
            return "Verdict: no fault found; the previews show how well it learned"
        return "Verdict: it worked, with a weakness" if "weak" in words else "Verdict: it worked"

    def lines(self) -> list[str]:
        """For the log: a line for the whole, and one for each finding."""
        return [
            self.title,
            *(
                f"{finding.title}: {finding.word} ({finding.value:.2f}). {finding.says} {finding.advice}".rstrip()
                if finding.worded
                else f"{finding.title}: {finding.value:.2f}. {finding.says}"
                for finding in self.findings
            ),
        ]

    def metrics(self) -> dict[str, float]:
        """`verdict_learned` and so on, each 0 to 1; and `verdict_drift`, how far the base has moved, 0 and more."""
        values = {f"verdict_{finding.name}": round(finding.value, 3) for finding in self.findings}
        return values | {"verdict_drift": round(self.measured.drift, 4)}

    def record(self) -> dict[str, Any]:
        """For `request.json`: the findings, and the numbers that they rest on."""
        return {
            "findings": {f.name: {"value": round(f.value, 3), "word": f.word} for f in self.findings},
            "measured": dataclasses.asdict(self.measured),
        }


def of(measured: Measured, word: str, lora_type: str, ratio: float, toy: bool) -> Verdict:
    """The verdict on what was measured. `word` is the trigger word, `ratio` that of prior preservation, 0 where off;
    `toy` says whether the base is the toy, which the bounds are of."""
    new = _new(measured) if toy else _copies(measured)
    if toy and lora_type == "subject":
        memorised = any(finding.word != "clear" for finding in new)
        learned, own_word = _learned(measured, word, memorised), _own_word(measured, word, ratio)
    else:
        learned, own_word = _gain(measured, word), _share_of_others(measured, word, lora_type, ratio)
    return Verdict(
        findings=[
            learned,
            *([] if learned.word == "none" else [own_word]),  # where nothing was learned, no word can call it
            *_kept(measured, ratio),
            *new,
            *_alike(measured, word),
        ],
        measured=measured,
    )


def scaled(value: float, weak: float, clear: float) -> float:
    """A measured value as a number from 0 to 1 that is WEAK_FROM at `weak` and CLEAR_FROM at `clear`, linear between;
    `clear` may be the smaller of the two."""
    share = WEAK_FROM + (CLEAR_FROM - WEAK_FROM) * (value - weak) / (clear - weak)
    return min(max(share, 0.0), 1.0)


def explained(trained: float, unseen: float | None) -> float:
    """The gain that says how well the pictures were learned, of that on training pictures and that on held-out ones,
    where there are any: these count twice."""
    return trained if unseen is None else (2 * unseen + trained) / 3


def learned(measured: Measured) -> float:
    """`explained` of what was measured."""
    return explained(measured.trained.own, measured.unseen.own if measured.unseen else None)


def _gain(measured: Measured, word: str) -> Finding:
    """The gain as it is, where it has no bounds. Without any on its own pictures it needs none."""
    says = _below(measured, word)
    if measured.trained.own <= 0:
        return Finding(name="learned", value=0.0, says=says, advice=TOO_HIGH)
    value = min(max(learned(measured), 0.0), 1.0)
    if measured.unseen and measured.unseen.own <= 0:
        says += f" On those that it trained on it is {measured.trained.own:.0%} below the base's."
    return Finding(name="learned", value=value, says=says, advice="", worded=False)


def _share_of_others(measured: Measured, word: str, lora_type: str, ratio: float) -> Finding:
    """How much of the gain other words do not have: it needs no bounds of a base where they have nearly all of it."""
    gains = measured.unseen if measured.unseen and measured.unseen.own > 0 else measured.trained
    other = (gains.far + gains.near) / 2
    value = min(max(1 - other / gains.own, 0.0), 1.0) if gains.own > 0 else 0.0
    if gains.other is not None and gains.other >= max(SAME * gains.own, other):
        return _mixed(0.0, lora_type, word)
    says = f"With other words in place of {word} the loss is {max(other, 0):.0%} below the base's."
    if gains.own <= 0 or other < SAME * gains.own:
        return Finding(name="own_word", value=value, says=says, advice="", worded=False)
    says += f" They call the {lora_type} as {word} does."
    return Finding(name="own_word", value=value, says=says, advice=OFF if not ratio else FIRMER)


def _mixed(value: float, lora_type: str, word: str) -> Finding:
    return Finding(
        name="own_word",
        value=value,
        says=f"The trigger words are mixed up: one calls the {lora_type} of another ({word}).",
        advice="Train more steps, give pictures that differ more, or train a LoRA for each.",
    )


def _below(measured: Measured, word: str) -> str:
    pictures = "pictures that it had not seen" if measured.unseen else "its own pictures (too few to hold one out)"
    gain = (measured.unseen or measured.trained).own
    than = f"{gain:.0%} below" if gain > 0 else "not below"
    return f"With {word} the loss is {than} the base's on {pictures}."


def _learned(measured: Measured, word: str, memorised: bool) -> Finding:
    """Of a subject on the toy base."""
    gain = learned(measured)
    value = scaled(gain, *(LEARNED_UNSEEN if measured.unseen else LEARNED_TRAINED))
    says = _below(measured, word)
    if value >= CLEAR_FROM:
        if measured.enough:
            says += f" It had learned enough before the end: training_steps={measured.enough} would probably be enough."
        return Finding(name="learned", value=value, says=says, advice="")
    more = "give more pictures that differ"
    if not memorised:
        more = f"train more steps, or {more}"
    advice = TOO_HIGH if gain < 0 else f"The subject is not learned well: {more}."
    if value < WEAK_FROM:
        advice += " Photographs are too much for the toy base, and need FLUX.1-dev on a GPU."
    return Finding(name="learned", value=value, says=says, advice=advice)


def _own_word(measured: Measured, word: str, ratio: float) -> Finding:
    """Of a subject on the toy base."""
    gains = measured.unseen or measured.trained
    bounds = OTHERS_UNSEEN if measured.unseen else OTHERS_TRAINED
    value = scaled((gains.far + gains.near) / 2, *bounds)
    if gains.other is not None and (mixed := scaled(gains.other, *bounds)) < min(value, CLEAR_FROM):
        return _mixed(mixed, "subject", word)
    if value >= CLEAR_FROM:
        # In the lab other words showed a subject in .17 of the drawings then, near ones in more than far ones.
        says = f"Other words seldom call the subject; those that share most letters with {word} do so more often."
        return Finding(name="own_word", value=value, says=says, advice="")
    which = "words that look like it" if gains.near - gains.far > NEARER else "other words"
    says = f"Besides {word}, {which} call the subject too."
    advice = FIRMER
    if not ratio:
        advice = OFF
    elif which == "words that look like it":
        advice = "Try another trigger word, or set preservation to firm."
    return Finding(name="own_word", value=value, says=says, advice=advice)


def _kept(measured: Measured, ratio: float) -> list[Finding]:
    """What it cost the base: told only where it is much."""
    value = scaled(math.log(max(measured.drift, 1e-6)), *(math.log(bound) for bound in DRIFT))
    if value >= CLEAR_FROM:
        return []
    says = f"It changes prompts without the trigger word too, by {measured.drift:.0%} of what the base predicts there."
    advice = "Set preservation to firm, or lower learning_rate." if ratio else OFF
    return [Finding(name="kept", value=value, says=says, advice=advice)]


def _new(measured: Measured) -> list[Finding]:
    """Whether it memorised its pictures: only where some were held out."""
    if copies := _copies(measured):
        return copies
    if measured.unseen is None or measured.own_then is None or measured.own_then <= 0:
        return []
    share = max(measured.unseen.own, 0.0) / measured.own_then
    value = scaled(share, *NEW)
    if value >= CLEAR_FROM:
        says = "It does nearly as well on held-out pictures as on those it trained on."
        return [Finding(name="not_memorised", value=value, says=says, advice="")]
    says = f"On held-out pictures it does only {share:.0%} as well as on those it trained on: it memorises these."
    advice = "Give more varied pictures, or train fewer steps."
    return [Finding(name="not_memorised", value=value, says=says, advice=advice)]


def _copies(measured: Measured) -> list[Finding]:
    """Only where most pictures are: that needs no bounds of a base."""
    if measured.repeated < 0.5:
        return []
    says = f"{measured.repeated:.0%} of the pictures are nearly copies of one another: it can only memorise them."
    advice = "Give pictures that differ in place, light and background."
    return [Finding(name="not_memorised", value=0.0, says=says, advice=advice)]


def _alike(measured: Measured, word: str) -> list[Finding]:
    """Only where an eye looked. No trainings were judged by it yet, so it has no bounds."""
    if measured.likeness is None:
        return []
    says = f"How much previews with {word} look like your pictures: 0 as the base alone, 1 as yours among each other."
    return [Finding(name="likeness", value=min(max(measured.likeness, 0.0), 1.0), says=says, advice="", worded=False)]
