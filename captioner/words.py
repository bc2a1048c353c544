"""Whole words in captions, and the mark that stands for the trigger word while the rules work."""

from __future__ import annotations

import re
import unicodedata

MARK = "\U0010fffd"
"""Stands for the trigger word while the rules work, so that no rule can touch a trigger word with dots, quotes or
brackets in it. The last private-use character of Unicode; it is dropped from what the model says."""


def find_word(text: str, word: str, start: int = 0) -> int:
    """Where `word` first stands in `text` at or after `start` as a whole word, exactly as typed; -1 where it does not.

    A word ends where the letters, digits, marks and underscores end. In a script written without spaces (Chinese,
    Japanese, Thai, …) every character may begin or end a word. An accent, a joiner or a skin tone behind the word
    makes another word of it.
    """
    at = text.find(word, start)
    while at >= 0:
        before, behind = text[at - 1 : at], text[at + len(word) : at + len(word) + 1]
        if not (before and _joins_before(before, word[0])) and not (behind and _joins_behind(word[-1], behind)):
            return at
        at = text.find(word, at + 1)
    return -1


# Thai, Lao, Myanmar, Khmer, kana, Han
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_ZERO_WIDTH_JOINER = "\u200d"


def _is_wordlike(c: str) -> bool:
    return c.isalnum() or c == "_" or unicodedata.category(c).startswith("M")


def _joins_before(before: str, first: str) -> bool:
    if before == _ZERO_WIDTH_JOINER:
        return True
    return _is_wordlike(before) and _is_wordlike(first) and not (_UNSPACED.match(before) or _UNSPACED.match(first))


def _joins_behind(last: str, behind: str) -> bool:
    skin_tone = "\U0001f3fb" <= behind <= "\U0001f3ff"
    if behind == _ZERO_WIDTH_JOINER or skin_tone or unicodedata.category(behind).startswith("M"):
        return True
    return _is_wordlike(last) and _is_wordlike(behind) and not (_UNSPACED.match(last) or _UNSPACED.match(behind))


def up_to_word(text: str, word: str) -> str:
    """`text` up to the end of the first whole `word`; all of it where there is none."""
    at = find_word(text, word)
    return text if at < 0 else text[: at + len(word)]


def in_its_case(text: str, word: str) -> str:
    """`text` with every whole word that is `word` in another case written as `word`."""
    for other in {found.group() for found in re.finditer(re.escape(word), text, re.IGNORECASE)} - {word}:
        while (at := find_word(text, other)) >= 0:
            text = text[:at] + word + text[at + len(other) :]
    return text


def mask(text: str, word: str) -> str:
    """The trigger word as MARK, wherever it stands whole; where only another case of it stands, that.

    A MARK that cleaning has glued to other letters is no whole word any more, and becomes text again.
    """
    text = text.replace(MARK, word)
    if find_word(text, word) < 0:
        others = [found.group() for found in re.finditer(re.escape(word), text, re.IGNORECASE)]
        word = next((other for other in others if find_word(text, other) >= 0), word)
    at = find_word(text, word)
    while at >= 0:
        text = text[:at] + MARK + text[at + len(word) :]
        at = find_word(text, word, at + 1)
    return text
