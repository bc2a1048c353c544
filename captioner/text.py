"""What a caption must be: the questions to the model, and the rules for its answers and for users' own text.

Every rule is code, none is a hope: the trigger word stands in every caption as the user typed it and as a whole
word, the prefix and the suffix are verbatim at its ends, and it fits the text encoders. Running the rules on their
own result changes nothing. Pure text: no model, no files, no randomness. Only Latin-script captions are accepted from
the model, because T5 and CLIP were trained on English; users may write what they like.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Source = Literal["yours", "model", "retried", "template"]

# Stands for the trigger word while the rules work, so that no rule can touch a trigger word with dots, quotes or
# brackets in it. The last private-use character of Unicode; it is dropped from what the model says.
MARK = "\U0010fffd"


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A picture's caption, where it came from, and what had to be done to it ("" where nothing had)."""

    text: str
    source: Source
    note: str = ""


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
    prefix: str
    suffix: str
    class_noun: str | None
    """What the subject is ("dog"), where it is known."""
    t5: Room
    """The whole caption must fit in here."""
    clip: Room
    """The caption up to the end of the trigger word must fit in here."""


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
        if not rules.clip.holds(_up_to_word(least, rules.trigger_word)):
            faults.append(
                f"the trigger word would end beyond the {rules.clip.limit} tokens that CLIP reads: shorten "
                "trigger_word or autocaption_prefix, or write the trigger word early in the prefix"
            )
    if faults:
        raise ValueError("; ".join(faults))


# --- the questions


def question(rules: Rules) -> str:
    """What the model is asked about every picture. The prefix is put into its mouth and needs no asking."""
    if rules.lora_type == "style":
        task = (
            "Write a caption of what is drawn here: who and what is there, what they do, where everything stands, the "
            "setting, the time of day, the framing. Leave out how it is made: no medium, technique, art style, artist, "
            "brushwork, line or palette, and no word such as illustration, painting or photo."
        )
    else:
        name = subject_name(rules)
        task = (
            f"Write a caption of this picture of {name}. Call the subject {name} and nothing else. Say what could be "
            "different in another picture of the same subject: the setting, the pose or action, clothes and things "
            "carried, the light, the framing and the angle, what else is there. Never say who or what it is, and never "
            "describe what stays the same from picture to picture, such as its face, body, hair, fur, colours, "
            f"markings, shape or brand: {name} already stands for all of that."
        )
    task += (
        " 30 to 50 words of plain English in two or three complete sentences. Begin at once with what is seen, not "
        "with “The image shows”. No list, no mood, no opinion. Answer with the caption alone."
    )
    return task + (f" These words will be put behind it, so do not repeat them: {rules.suffix}" if rules.suffix else "")


def plainer_question(rules: Rules) -> str:
    """What is asked where the first answer was no caption."""
    who = "what is drawn in it" if rules.lora_type == "style" else f"it, calling its subject {subject_name(rules)}"
    return f"This is my own picture. Describe {who}, in one plain English sentence of about 20 words."


def retry_opening(rules: Rules) -> str:
    """What is put into the model's mouth behind the prefix with the plainer question: it makes refusals less likely."""
    return "" if rules.lora_type == "style" or _carried(rules) else subject_name(rules)


def continued(opening: str, answer: str) -> str:
    """The opening and what the model went on with."""
    return opening + answer if answer[:1] in tuple(" ,.;:'’") else f"{opening} {answer}"


def subject_name(rules: Rules) -> str:
    """ "TOK dog", or "TOK" where the class noun is not known."""
    return f"{rules.trigger_word} {rules.class_noun}" if rules.class_noun else rules.trigger_word


CLASS_NOUN_QUESTION = (
    "What kind of thing is the main subject of this picture? Answer with one common English noun in the singular, such "
    "as dog, woman, backpack or car, and nothing else."
)


def class_noun(answers: Sequence[str]) -> str | None:
    """The noun that more than half of the answers give, None where there is none: a lower-case word or two."""
    nouns = Counter(_noun(answer) for answer in answers)
    for noun, count in nouns.most_common(1):
        return noun if count > len(answers) / 2 else None
    return None


def _noun(answer: str) -> str | None:
    text = _until_stable(_normalise, answer).casefold().strip(" .!")
    found = re.fullmatch(r"(?:an? |the )?([a-z]+(?:[ -][a-z]+)?)", text)
    vague = {"image", "picture", "photo", "photograph", "subject", "object", "thing", "none", "unknown"}
    return found[1] if found and found[1] not in vague and len(found[1]) <= 30 else None


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
    if find_word(given, word) < 0:
        given = f"{word}, {given}" if rules.lora_type == "subject" else f"in the style of {word}, {given}"
        notes.append(f"it lacked {word}, which was put in front")
    if not rules.clip.holds(_up_to_word(given, word)):
        notes.append(f"{word} stands beyond the {rules.clip.limit} tokens that CLIP reads")
    if not rules.t5.holds(given):
        notes.append(f"it has {rules.t5.count(given)} tokens, of which T5 reads {rules.t5.limit}")
    return Caption(text=given, source="yours", note="; ".join(notes))


def from_template(rules: Rules, note: str = "") -> Caption:
    """The caption of a picture of which nothing is known. Needs rules that passed `check`."""
    if _carried(rules):
        body = ""
    elif rules.lora_type == "style":
        body = f"in the style of {MARK}"
    else:
        body = " ".join(filter(None, ["A photo of", MARK, rules.class_noun]))
    text = _whole(body, rules)
    return Caption(text=text if _fits(text, rules) else _shortest(rules), source="template", note=note)


def from_model(raw: str, rules: Rules) -> str | Rejected:
    """A sound caption of whatever the model wrote, or why there is none. Needs rules that passed `check`."""
    body = _mask(_unjoin(raw.replace(MARK, ""), rules), rules)
    normal = _until_stable(lambda text: _mask(_normalise(text), rules), body)
    if reason := _fault(normal):
        return Rejected(reason)
    body = _until_stable(lambda text: _mask(_prune(_normalise(text), rules), rules), normal)
    for shorter in _shortenings(body):
        named = _name(shorter, rules)
        text = _whole(named, rules)
        if _fits(text, rules):
            reason = _fault(shorter) or _fault(named)
            return Rejected(reason) if reason else text
    return Rejected("no sentence of it fits the text encoders")


# --- whole words


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


def _up_to_word(text: str, word: str) -> str:
    """`text` up to the end of the first whole `word`; all of it where there is none."""
    at = find_word(text, word)
    return text if at < 0 else text[: at + len(word)]


def _mask(text: str, rules: Rules) -> str:
    """The trigger word as MARK, wherever it stands whole; where only another case of it stands, that.

    A MARK that cleaning has glued to other letters is no whole word any more, and becomes text again.
    """
    word = rules.trigger_word
    text = text.replace(MARK, word)
    if find_word(text, word) < 0 and (other := re.search(re.escape(word), text, re.IGNORECASE)):
        word = other.group()
    at = find_word(text, word)
    while at >= 0:
        text = text[:at] + MARK + text[at + len(word) :]
        at = find_word(text, word, at + 1)
    return text


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
            if suffix[0] in _CLOSING and text and not _is_finished(text):
                text += "."
    return text


def _carried(rules: Rules) -> bool:
    """Whether prefix or suffix bring the trigger word, so that the body need not."""
    return any(find_word(end, rules.trigger_word) >= 0 for end in (rules.prefix, rules.suffix))


def _shortest(rules: Rules) -> str:
    return _whole("" if _carried(rules) else MARK, rules)


def _whole(body: str, rules: Rules) -> str:
    """The caption of a masked body."""
    return _join(rules.prefix, body, rules.suffix).replace(MARK, rules.trigger_word)


def _fits(text: str, rules: Rules) -> bool:
    return rules.t5.holds(text) and rules.clip.holds(_up_to_word(text, rules.trigger_word))


_STYLE_CLOSE = f", in the style of {MARK}."


def _name(body: str, rules: Rules) -> str:
    """The masked body with the trigger word in it."""
    if MARK in body or _carried(rules):
        return body
    if rules.lora_type == "style":
        return body.rstrip(".!?… ") + _STYLE_CLOSE
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


# --- cleaning


def _until_stable(rule: Callable[[str], str], text: str) -> str:
    """The rule again and again until it changes nothing: removing one thing may uncover another."""
    while (changed := rule(text)) != text:
        text = changed
    return text


_TAG = re.compile(r"<[^<>\s]*>")
_MARKDOWN = re.compile(r"[*`]+|~~|(?<!\w)__|__(?!\w)|^[ \t]*(?:#+\s.*|[-•>]\s+)", re.MULTILINE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}


def _normalise(text: str) -> str:
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


def _fault(text: str) -> str:
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


def _prune(text: str, rules: Rules) -> str:
    """Rules 3 to 5: without openers, unfinished, repeated and empty sentences, and for a style without its name."""
    if text.endswith(_STYLE_CLOSE) and rules.lora_type == "style":
        text = text.removesuffix(_STYLE_CLOSE) + "."
    for opener in [*_OPENERS, _STYLE_OPENER] if rules.lora_type == "style" else _OPENERS:
        if (found := opener.match(text)) and found.end() < len(text):
            text = text[found.end() :]
            text = text if rules.prefix else text[0].upper() + text[1:]
    sentences = [s for s in _sentences(text) if _words(s)]
    if len(sentences) > 1 and not _is_finished(sentences[-1]):
        sentences.pop()
    sentences = list({sentence.casefold(): sentence for sentence in sentences}.values())
    sentences = [s for s in sentences if not _MOOD.match(s)] or sentences
    if rules.lora_type == "style":
        sentences = [s for s in sentences if not _STYLE_WORDS.search(s)] or sentences
    text = " ".join(sentences)
    return text if not text or _is_finished(text) else text.rstrip(",;:- ") + "."


def _sentences(text: str) -> list[str]:
    return re.split(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’)]))\s+", text)


def _is_finished(text: str) -> bool:
    return re.search(r"[.!?…][\"'”’)]?$", text) is not None


def _shortenings(body: str) -> Iterator[str]:
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


# --- telling


def table(captions: Mapping[str, Caption]) -> list[str]:
    """A line for every picture: its name, where its caption came from, the caption; below, what had to be done."""
    wide = max(map(len, captions), default=0)
    lines = [f"{name:<{wide}}  {caption.source:<8}  {caption.text}" for name, caption in captions.items()]
    return lines + [f"{name}: {caption.note}" for name, caption in captions.items() if caption.note]
