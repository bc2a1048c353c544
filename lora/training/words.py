"""Words beside the trigger word: made-up ones, words near it, ordinary ones.

Prior preservation asks the base for them, the lab and the tests draw under them. Nothing here needs a model: the words
follow from the trigger word and a seed.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence

THINGS = (
    *("circle", "square", "triangle", "star", "heart", "diamond", "ring", "moon", "house", "tree", "flower", "fish"),
    *("cat", "dog", "bird", "car", "boat", "person", "woman", "man", "child", "chair", "cup", "book", "shoe", "apple"),
)
"""Ordinary nouns that preservation prompts ask for."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
_OTHERS = (
    *("a", "an", "the", "on", "in", "of", "with", "style", "background", "photo", "picture", "image", "drawing"),
    *("painting", "girl", "boy", "baby", "people", "face", "portrait", "anime", "art", "animal"),
)
POPULAR = ("TOK", "SKS", "ohwx", "zwx", "CYBRPNK", "ST1LLSU1T", "JELLOMOLD", "bennycheung")
"""Trigger words of published FLUX LoRAs: the defaults of trainers (TOK, ohwx), the rare words of their examples (sks,
zwx), and names that people made up."""
NEAR = ("changed", "swapped", "added", "part", "case")
"""The ways to be near a word: one or two letters changed, two neighbours swapped, one letter added or left out, a part
of it, the same letters in another case."""
_SYLLABLES = (
    "ba be bo da di do fa fe go ka ke ki ko la le lo ma mi mo na ne no pa pe ra ri ro sa se ta ti to va vo za zo"
)
_TRIES = 200


def whole_word(word: str) -> re.Pattern[str]:
    """Finds the word in any case, where no further ASCII letter or digit makes another of it: "art", not "party"."""
    before = "(?<![A-Za-z0-9_])" if re.match("[A-Za-z0-9_]", word[0]) else ""
    behind = "(?![A-Za-z0-9_])" if re.match("[A-Za-z0-9_]", word[-1]) else ""
    return re.compile(f"{before}{re.escape(word)}{behind}", re.IGNORECASE)


def any_whole_word(words: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the words as `whole_word` does; it has no groups."""
    return re.compile("|".join(whole_word(word).pattern for word in words), re.IGNORECASE)


def is_ordinary(word: str) -> bool:
    """Whether the word is an everyday one, which the base knows well and prompts often hold."""
    return word.casefold() in {*THINGS, *COLOURS, *_OTHERS}


def of_ordinary(trigger_words: Iterable[str]) -> list[str]:
    """A warning for each trigger word that is an ordinary one."""
    return [
        f"trigger_word: {word!r} is an ordinary word, so what is learned will show wherever a prompt has it; a word"
        " that means nothing, such as TOK, keeps the two apart"
        for word in trigger_words
        if is_ordinary(word)
    ]


def made_up_word(rng: random.Random, other_than: str) -> str:
    """A word that means nothing, in one of the shapes that people give trigger words: SKS, Zorvan, zorvan."""
    while True:
        shape = rng.random()
        if shape < 0.4:
            word = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.choice((3, 3, 4))))
        else:
            word = "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.choice((2, 3)))) + rng.choice("klmnrst")
            word = word.capitalize() if shape < 0.7 else word
        if word.casefold() != other_than.casefold():
            return word


def near_words(word: str, rng: random.Random, count: int, kinds: Sequence[str] = NEAR) -> list[str]:
    """`count` different words near `word`, of each of `kinds` (see NEAR) in turn; fewer where there are no more.

    None of them is the word itself, and only those of "case" are it in another case. TOK: TEK, OTK, TOKA, TO, tok.
    Raises ValueError for a kind that is not in NEAR.
    """
    if unknown := set(kinds) - set(NEAR):
        raise ValueError(f"kinds: {', '.join(sorted(unknown))}: not among {', '.join(NEAR)}")
    sources = {kind: _of_kind(word, kind, rng) for kind in dict.fromkeys(kinds)}
    found: dict[str, None] = {}
    while sources and len(found) < count:
        for kind, source in list(sources.items()):
            fresh = next((near for near in source if near not in found), None)
            if fresh is None:
                del sources[kind]
            elif len(found) < count:
                found[fresh] = None
    return list(found)


def _of_kind(word: str, kind: str, rng: random.Random) -> Iterator[str]:
    """Words near `word` in one way, by chance; some come again. It ends after _TRIES."""
    if kind == "case":
        yield from (near for near in (word.lower(), word.upper(), word.capitalize(), word.swapcase()) if near != word)
        return
    itself = whole_word(word)
    for _ in range(_TRIES):
        near = _once(word, kind, rng).strip()
        if near and not itself.search(near):
            yield near


def _once(word: str, kind: str, rng: random.Random) -> str:
    letters = list(word)
    match kind:
        case "changed":
            for at in rng.sample(range(len(letters)), min(len(letters), rng.choice((1, 1, 2)))):
                letters[at] = _like(letters[at], rng)
        case "swapped":
            at = rng.randrange(max(1, len(letters) - 1))
            letters[at : at + 2] = letters[at : at + 2][::-1]
        case "added":
            at = rng.randrange(len(letters))
            if len(letters) > 3 and rng.random() < 0.5:
                del letters[at]
            else:
                letters.insert(at + 1, _like(letters[at], rng))
        case "part":
            parts = [part for part in re.split(r"[\s_-]+", word) if part]
            if len(parts) > 1:
                return rng.choice(parts)
            at = rng.randint(2, max(2, len(letters) - 2))
            letters = rng.choice((letters[:at], letters[-at:]))
    return "".join(letters)


def _like(letter: str, rng: random.Random) -> str:
    """Another letter of the same kind: a digit for a digit, a capital for a capital, a vowel for a vowel mostly."""
    if letter.isdigit():
        return rng.choice("0123456789")
    vowel = letter.lower() in "aeiou" and rng.random() < 0.7
    other = rng.choice("aeiou" if vowel else "abcdefghijklmnopqrstuvwxyz")
    return other.upper() if letter.isupper() else other
