"""The trigger word: what is tidied of it, and what can be none."""

import dataclasses
import re
import unicodedata

PLACEHOLDER = "[trigger]"
"""Stands for the trigger word in a user's captions and prompts, in any case."""
MOST_WORDS = 4
"""More words than this are a sentence: its ordinary words would learn with it."""
_QUOTES = ('""', "''", "“”", "„“", "„”", "‘’", "«»", "‹›", "「」", "``")
_COMMAS = ",;:，、；："
# Soft hyphen, zero-width space, word joiner and what follows it, byte-order mark, marks of the writing direction. Not
# the two zero-width joiners (U+200C, U+200D), which Persian and emoji need.
_INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")


def tidy(word: str) -> tuple[str, str]:
    """The word without invisible characters, quotes around it, commas and spaces at its ends; and what was taken off.

    Nobody types these on purpose: they come with a word that is copied from a page or out of a program. The second is
    "" where there was nothing to take off.
    """
    seen = _INVISIBLE.sub("", word)
    taken = [f"invisible characters ({', '.join(_names(word))})"] if seen != word else []
    while True:
        bare = seen.strip().strip(_COMMAS).strip()
        if len(bare) > 1 and bare[0] + bare[-1] in _QUOTES and len(words(bare)) == 1:
            bare = bare[1:-1]
        if bare == seen:
            return seen, " and ".join(dict.fromkeys(taken))
        taken.append("spaces" if bare == seen.strip() else "quotes or commas")
        seen = bare


def _names(word: str) -> list[str]:
    return sorted({f"U+{ord(sign):04X}" for sign in _INVISIBLE.findall(word)})


@dataclasses.dataclass(frozen=True)
class Subject:
    """What one trigger word stands for: a subject or a style."""

    word: str
    class_noun: str | None = None
    """What it is (dog, woman), where that is known."""


def words(trigger_word: str) -> tuple[str, ...]:
    """The words of the input: one, or several between commas, each of a subject of its own."""
    return tuple(word.strip() for word in re.split("[,，、]", trigger_word))


def fault(trigger_word: str) -> str | None:
    """Why this is no trigger word, nor several, with what to give instead; None where it is."""
    several = words(trigger_word)
    if len(several) == 1 or tidy(trigger_word)[1]:
        return _fault(trigger_word)
    if "" in several:
        return f"{trigger_word[:80]!r} has nothing between two commas; give one word, or several such as 'ANNA, BOB'"
    for word in several:
        if why := _fault(word):
            return f"of the {len(several)} words between commas {why}"
    for word in several:
        for other in several:
            if word is not other and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", other, re.IGNORECASE):
                return f"{word!r} is part of {other!r}, so captions cannot tell the two apart; give other words"
    return None


def _fault(word: str) -> str | None:
    """`fault` of one word."""
    shown = repr(word[:80])
    if not _INVISIBLE.sub("", word).strip():
        return "it is blank; give 1 to 60 characters, such as TOK"
    if breaks_the_line(word):
        return f"{shown} holds a line break or control character; give it on one line without them"
    if PLACEHOLDER in word.casefold():
        return f"{shown}: {PLACEHOLDER} only stands for the trigger word in captions; give the word itself, such as TOK"
    tidied, taken = tidy(word)
    if not any(unicodedata.category(sign)[0] in "LNS" for sign in tidied):
        return f"{shown} is punctuation alone; give a word, such as TOK"
    if taken:
        return f"{shown} has {taken} around it or in it; give {tidied!r}"
    count = len(word.split())
    if count > MOST_WORDS or (count > 2 and word[-1] in ".!?"):
        return (
            f"{shown} is a sentence of {count} words; give one word that means nothing yet, such as TOK, and write"
            " sentences into the captions"
        )
    return None


def breaks_the_line(text: str) -> bool:
    """Whether it holds a line break, a control character, or half of a character."""
    return any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in text)
