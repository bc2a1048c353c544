"""What the model wrote becomes clean text: what is stripped, what is rejected, how it is shortened.

Pure text, in which the trigger word is masked already (`words.MARK`). Where the trigger word goes and what stands at
the ends is `text.py`'s.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator

from captioner.words import MARK

STYLE_CLOSE = f", in the style of {MARK}."


def until_stable(rule: Callable[[str], str], text: str) -> str:
    """The rule again and again until it changes nothing: removing one thing may uncover another."""
    while (changed := rule(text)) != text:
        text = changed
    return text


_TAG = re.compile(r"<[^<>\s]*>")
_MARKDOWN = re.compile(r"[*`]+|~~|(?<!\w)__|__(?!\w)|^[ \t]*(?:#+\s.*|[-•>]\s+)", re.MULTILINE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}


def normalised(text: str) -> str:
    """Rule 1: what follows the thinking, in NFC, without control tokens, markdown, wrapping quotes, double spaces."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    text = _MARKDOWN.sub("", _TAG.sub("", text))
    text = "".join(c for c in text if c == MARK or c.isspace() or not unicodedata.category(c).startswith("C"))
    text = " ".join(unicodedata.normalize("NFC", text).split())
    closing = _QUOTES.get(text[:1])
    if closing and text.endswith(closing) and len(text) > 1 and not {text[0], closing} & set(text[1:-1]):
        text = text[1:-1]
    return text


_REFUSAL = re.compile(
    r"\b(?:i['’]m (?:(?:so|very) )?sorry|i am (?:(?:so|very) )?sorry|i apologi[sz]e|unfortunately, i|as an ai|"
    r"language model|i (?:can['’]t|cannot|can not|am unable|won['’]t|do not|don['’]t)|i['’]m (?:unable|not able)|"
    r"(?:please|could you) (?:provide|upload|share|attach)|no image (?:was|is|has)|unable to (?:see|view|identify))\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|‘[^’]*’|«[^»]*»|「[^」]*」|『[^』]*』")


def _words(text: str) -> list[str]:
    return re.findall(rf"[\w{MARK}]+(?:['’-]\w+)*", text.casefold())


def fault_of(text: str) -> str:
    """Rule 2: why this is no caption, "" where it is one."""
    words = _words(text)
    fours = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if refusal := _REFUSAL.search(text):
        return f"a refusal: “{refusal.group()}”"
    if (fours and max(fours.values()) >= 4) or (len(words) >= 20 and len(set(words)) < len(words) / 4):
        return "it repeats itself"
    foreign = {c for c in _QUOTED.sub("", text) if c.isalpha() and "LATIN" not in unicodedata.name(c, "")}
    if foreign:
        return f"not in Latin script: {''.join(sorted(foreign)[:8])}"
    if len(words) < 3:
        return f"fewer than three words: {text!r}"
    signs = [c for c in text if not c.isspace()]
    if "\ufffd" in text or sum(c.isalnum() or c == MARK for c in signs) < 0.6 * len(signs):
        return "broken text"
    return ""


_VIEW = r"(?:image|photo|photograph|picture|scene|illustration|drawing|painting|artwork)"
_SHOWS = r"(?:shows|depicts|features|captures|displays|presents|portrays|contains|is of|showcases|illustrates)"
_OPENERS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:sure|certainly|of course|okay|ok|absolutely)[,!.:]+ ",
        r"here(?:['’]s| is) (?:an?|the|your|one) [^.:]*?(?:caption|description)[^.:]*: ?",
        r"(?:\w+ )?(?:caption|description): ?",
        rf"(?:the|this) (?:[\w-]+ )?{_VIEW} {_SHOWS} ",
        rf"in (?:the|this) (?:[\w-]+ )?{_VIEW}, ?",
        r"(?:we|you|i)(?: can)? see ",
        r"there (?:is|are) (?=an?\b|the\b|one\b|two\b|some\b)",
    )
]
_MEDIUM = (
    r"photo(?:graph)?|painting|watercolou?r|illustration|drawing|sketch|cartoon|anime|manga|comic|render|rendering|"
    r"artwork|engraving|collage"
)
_STYLE_OPENER = re.compile(
    rf"(?:an?|the|this) (?:[\w-]+,? ){{0,4}}?(?:{_MEDIUM}|image|picture) (?:of|showing|depicting|featuring|with) ",
    re.IGNORECASE,
)
_STYLE_WORDS = re.compile(
    rf"\b(?:(?:{_MEDIUM})s?|(?:[\w-]+ )?styles?|styli[sz]ed|aesthetics?|brush ?(?:strokes?|work)|line ?(?:art|work)|"
    r"cel[- ]shad(?:ed|ing)|flat colou?rs?|pixel art|3d|cgi|impasto|hand[- ]drawn|artistic|artist)\b",
    re.IGNORECASE,
)
_MOOD = re.compile(
    r"(?:the )?(?:overall|general)\b|the (?:mood|atmosphere|tone|vibe|ambiance|ambience)\b|"
    r"(?:the|this) (?:\w+ )?(?:scene|setting|image|composition) (?:evokes|conveys|exudes|creates|suggests)\b",
    re.IGNORECASE,
)


def pruned(text: str, kind: str, begun: bool) -> str:
    """Rules 3 to 5: without openers, unfinished, repeated and empty sentences, and for a style without its name.

    `kind` is `text.Rules.kind`: "general" keeps what names the style, and may end as a style's caption does. `begun`
    says that a prefix stands before it, so that it need not begin with a capital.
    """
    if text.endswith(STYLE_CLOSE) and kind in ("style", "general"):
        text = text.removesuffix(STYLE_CLOSE) + "."
    for opener in [*_OPENERS, _STYLE_OPENER] if kind == "style" else _OPENERS:
        if (found := opener.match(text)) and found.end() < len(text):
            text = text[found.end() :]
            text = text if begun else text[0].upper() + text[1:]
    sentences = [s for s in _sentences(text) if _words(s)]
    if len(sentences) > 1 and not is_finished(sentences[-1]):
        sentences.pop()
    sentences = list({sentence.casefold(): sentence for sentence in sentences}.values())
    sentences = [s for s in sentences if not _MOOD.match(s)] or sentences
    if kind == "style":
        sentences = [s for s in sentences if not _STYLE_WORDS.search(s)] or sentences
    text = " ".join(sentences)
    return text if not text or is_finished(text) else text.rstrip(",;:- ") + "."


def _sentences(text: str) -> list[str]:
    return re.split(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’)]))\s+", text)


def is_finished(text: str) -> bool:
    return re.search(r"[.!?…][\"'”’)]?$", text) is not None


def shortenings(body: str) -> Iterator[str]:
    """Rule 8: the body, then with ever fewer sentences, then clauses, then words, at last nothing."""
    sentences = _sentences(body)
    for count in range(len(sentences), 0, -1):
        yield " ".join(sentences[:count])
    clauses = sentences[0].rstrip(".!?…").split(", ")
    for count in range(len(clauses) - 1, 0, -1):
        yield ", ".join(clauses[:count]) + "."
    words = clauses[0].split(" ")
    for count in range(len(words) - 1, 0, -1):
        yield " ".join(words[:count]).rstrip(",;:- ") + "."
