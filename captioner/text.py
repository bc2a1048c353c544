"""What a caption must be: the rules for the model's answers and for users' own text.

Every rule is code, none is a hope: the trigger word stands in every caption as the user typed it and as a whole
word, the prefix and the suffix are verbatim at its ends, and it fits the text encoders. Running the rules on their
own result changes nothing. Pure text: no model, no files, no randomness. Only Latin-script captions are accepted from
the model, because T5 and CLIP were trained on English; users may write what they like.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from captioner.clean import STYLE_CLOSE, fault_of, is_finished, normalised, pruned, shortenings, until_stable
from captioner.words import MARK, find_word, in_its_case, mask, up_to_word

Source = Literal["yours", "model", "retried", "template"]


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A picture's caption, where it came from, and what had to be done to it ("" where nothing had)."""

    text: str
    source: Source
    note: str = ""
    own: str | None = None
    """The user's own caption, where another was written in its place."""


@dataclass(frozen=True)
class Rejected:
    """The model's answer makes no caption, for this reason."""

    reason: str


@dataclass(frozen=True)
class Room:
    """What a text encoder reads: `count(text)` tokens, its special ones included, of at most `limit`."""

    count: Callable[[str], int]
    limit: int

    def holds(self, text: str) -> bool:
        return self.count(text) <= self.limit


def estimate_tokens(text: str) -> int:
    """Tokens of `text` for T5 or CLIP without their tokenizers, on the careful side for English.

    One for every three letters or digits of an ASCII word begun, one for every other ASCII sign, one for every byte
    beyond ASCII, two special ones. English words are mostly one token in both vocabularies. Made-up words can take
    more than estimated: whoever has the tokenizers counts with those.
    """
    words = re.findall(r"[A-Za-z0-9]+", text)
    signs = re.findall(r"[^A-Za-z0-9\s]", text)
    return 2 + sum(-(-len(word) // 3) for word in words) + sum(len(s.encode(errors="replace")) for s in signs)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What every caption of a set obeys."""

    trigger_word: str
    lora_type: str
    """ "subject" or "style"."""
    mode: str | None = None
    """ "general" describes the whole picture, "character" a person, "product" a thing that is sold, "style" a style;
    None: as `lora_type` says."""
    prefix: str
    suffix: str
    class_noun: str | None
    """What the subject is ("dog"), where it is known."""
    t5: Room
    """The whole caption must fit in here."""
    clip: Room
    """The caption up to the end of the trigger word must fit in here."""

    @property
    def kind(self) -> str:
        """What is written about: the mode, or the type where there is none."""
        return self.mode or self.lora_type


def check(rules: Rules) -> None:
    """Refuse, all faults at once, a trigger word, prefix and suffix of which no caption can be made (ValueError)."""
    faults = []
    named = {
        "trigger_word": rules.trigger_word,
        "autocaption_prefix": rules.prefix,
        "autocaption_suffix": rules.suffix,
    }
    for name, value in named.items():
        bad = sorted({c for c in value if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c == MARK})
        if bad:
            shown = ", ".join(map(ascii, bad))
            faults.append(f"{name} holds {shown}: write it on one line, without control characters")
    if not rules.trigger_word or rules.trigger_word != rules.trigger_word.strip():
        faults.append(f"trigger_word is {rules.trigger_word!r}: give a word without spaces at its ends, such as TOK")
    if not faults:
        least = _shortest(rules)
        if not rules.t5.holds(least):
            faults.append(
                f"trigger_word, autocaption_prefix and autocaption_suffix are {rules.t5.count(least)} tokens together; "
                f"T5 reads {rules.t5.limit} of a caption: shorten them"
            )
        if not rules.clip.holds(up_to_word(least, rules.trigger_word)):
            faults.append(
                f"the trigger word would end beyond the {rules.clip.limit} tokens that CLIP reads: shorten "
                "trigger_word or autocaption_prefix, or write the trigger word early in the prefix"
            )
    if faults:
        raise ValueError("; ".join(faults))


def of_word(rules: Rules, word: str, class_noun: str | None) -> Rules:
    """The rules with this trigger word and noun, and the word for `[trigger]` in prefix and suffix. Raises
    ValueError where `check` does."""
    prefix, suffix = fill_in(rules.prefix, word), fill_in(rules.suffix, word)
    made = replace(rules, trigger_word=word, prefix=prefix, suffix=suffix, class_noun=class_noun)
    check(made)
    return made


def beside(made: Caption, own: Caption | None, given: str | None) -> Caption:
    """The model's caption, with the text that the user gave beside it; the user's own where the model's is a template,
    which says less."""
    if own is None or given is None:
        return made
    return replace(own, note=made.note) if made.source == "template" else replace(made, own=given)


# --- the three ways to a caption


def fill_in(text: str, word: str) -> str:
    """The user's text with the trigger word wherever `[trigger]` stands, in any case."""
    return re.sub(r"\[trigger\]", lambda _: word, text, flags=re.IGNORECASE)


def from_user(text: str, rules: Rules) -> Caption:
    """The user's own caption, as given, with `[trigger]` replaced and the trigger word put in front where it lacks.

    It is never shortened: what the encoders will not read is told in the note instead.
    """
    word = rules.trigger_word
    given = fill_in(text.strip(), word)
    notes = []
    if find_word(given, word) < 0 and (written := in_its_case(given, word)) != given:
        given = written
        notes.append(f"{word} was written in another case, and now as you typed it")
    if find_word(given, word) < 0:
        given = f"{word}, {given}" if rules.lora_type == "subject" else f"in the style of {word}, {given}"
        notes.append(f"it lacked {word}, which was put in front")
    if not rules.clip.holds(up_to_word(given, word)):
        notes.append(f"{word} stands beyond the {rules.clip.limit} tokens that CLIP reads")
    if not rules.t5.holds(given):
        notes.append(f"it has {rules.t5.count(given)} tokens, of which T5 reads {rules.t5.limit}")
    return Caption(text=given, source="yours", note="; ".join(notes))


def from_template(rules: Rules, note: str = "") -> Caption:
    """The caption of a picture of which nothing is known. Needs rules that passed `check`."""
    if is_carried(rules):
        body = ""
    elif rules.lora_type == "style":
        body = f"in the style of {MARK}"
    else:
        body = " ".join(filter(None, ["A photo of", MARK, rules.class_noun]))
    text = _whole(body, rules)
    return Caption(text=text if _fits(text, rules) else _shortest(rules), source="template", note=note)


def from_model(raw: str, rules: Rules) -> str | Rejected:
    """A sound caption of whatever the model wrote, or why there is none. Needs rules that passed `check`."""

    def tidied(text: str) -> str:
        return mask(normalised(text), rules.trigger_word)

    def cut(text: str) -> str:
        return mask(pruned(normalised(text), rules.kind, begun=bool(rules.prefix)), rules.trigger_word)

    normal = until_stable(tidied, mask(_unjoin(raw.replace(MARK, ""), rules), rules.trigger_word))
    if reason := fault_of(normal):
        return Rejected(reason)
    for shorter in shortenings(until_stable(cut, normal)):
        named = _name(shorter, rules)
        text = _whole(named, rules)
        if _fits(text, rules):
            reason = fault_of(shorter) or fault_of(named)
            return Rejected(reason) if reason else text
    return Rejected("no sentence of it fits the text encoders")


# --- prefix, suffix, trigger word


_CLOSING = ",.;:!?)"


def _join(prefix: str, body: str, suffix: str) -> str:
    """The three with single spaces between, none before a comma; the body's full stop gives way to such a suffix."""
    if suffix[:1] in tuple(_CLOSING):
        body = body.rstrip(".")
    text = prefix
    for part in (body, suffix):
        glued = not text or not part or text[-1].isspace() or part[0].isspace() or part[0] in _CLOSING
        text += part if glued else f" {part}"
    return text


def _unjoin(text: str, rules: Rules) -> str:
    """What `_join` put between prefix and suffix; all of the text where they are not at its ends."""
    prefix, suffix = rules.prefix, rules.suffix
    if prefix and text.startswith(prefix):
        rest = text[len(prefix) :]
        if not rest or prefix[-1].isspace() or rest[0].isspace() or rest[0] in _CLOSING:
            text = rest
    if suffix and text.endswith(suffix):
        rest = text[: -len(suffix)]
        if not rest or rest[-1].isspace() or suffix[0].isspace() or suffix[0] in _CLOSING:
            text = rest.rstrip()
            if suffix[0] in _CLOSING and text and not is_finished(text):
                text += "."
    return text


def is_carried(rules: Rules) -> bool:
    """Whether prefix or suffix bring the trigger word, so that the body need not."""
    return any(find_word(end, rules.trigger_word) >= 0 for end in (rules.prefix, rules.suffix))


def _shortest(rules: Rules) -> str:
    return _whole("" if is_carried(rules) else MARK, rules)


def _whole(body: str, rules: Rules) -> str:
    """The caption of a masked body."""
    return _join(rules.prefix, body, rules.suffix).replace(MARK, rules.trigger_word)


def _fits(text: str, rules: Rules) -> bool:
    return rules.t5.holds(text) and rules.clip.holds(up_to_word(text, rules.trigger_word))


def _name(body: str, rules: Rules) -> str:
    """The masked body with the trigger word in it."""
    if MARK in body or is_carried(rules):
        return body
    if rules.lora_type == "style":
        return body.rstrip(".!?… ") + STYLE_CLOSE
    if rules.class_noun:
        named, count = _noun_phrase(rules.class_noun).subn(_named_noun, body, count=1)
        if count:
            return named
    first, space, rest = body.partition(" ")
    return f"{MARK}, {first.lower() if first in ('A', 'An', 'The') else first}{space}{rest}"


# Words that end a noun phrase: "a man with a dog" must not become "TOK dog".
_FUNCTION_WORDS = "a|an|the|of|with|and|or|in|on|at|by|to|for|from|near|is|are|as|that|which|who|his|her|its|their"


def _noun_phrase(noun: str) -> re.Pattern[str]:
    between = rf"(?:(?!(?:{_FUNCTION_WORDS})\b)[a-z-]+,? ){{0,4}}"
    return re.compile(rf"\b(an?|the|this|one) ({between})({re.escape(noun)})\b", re.IGNORECASE)


def _named_noun(found: re.Match[str]) -> str:
    """ "a small brown dog" → "TOK dog": traits belong to the trigger word. "a sleeping dog" keeps what it does."""
    article, between, noun = found.groups()
    doing = [word for word in between.replace(",", "").split() if word.lower().endswith("ing")]
    return " ".join([article, *doing, MARK, noun]) if doing else f"{MARK} {noun}"


# --- telling


_NAMED = 3
"""Captions that a note on several names."""


def table(captions: Mapping[str, Caption]) -> list[str]:
    """A line for every picture: its name, where its caption came from, the caption; below, what had to be done."""
    wide = max(map(len, captions), default=0)
    lines = [f"{name:<{wide}}  {caption.source:<8}  {caption.text}" for name, caption in captions.items()]
    lines += [f"{name}: yours was: {caption.own}" for name, caption in captions.items() if caption.own]
    noted: dict[str, list[str]] = {}
    for name, caption in captions.items():
        if caption.note:
            noted.setdefault(caption.note, []).append(name)
    for note, names in noted.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"{', '.join(names[:_NAMED])}{more}: {note}")
    return lines
